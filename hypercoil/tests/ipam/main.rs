//! Handing out addresses, of the node's agent and the controller together: only here both can be had.

mod kubernetes;
mod random;
mod world;
