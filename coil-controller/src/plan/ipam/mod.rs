//! What the leader knows of pools, blocks and nodes, and what follows from it: which block a node gets
//! ([`Book`]), which nodes have been gone for long enough ([`Nodes`]). Pure: no client, no clock.

mod book;
mod indexes;
mod nets;
mod nodes;

pub use book::{Book, Choice, PoolFigures, Refusal};
pub use nodes::Nodes;
