//! Plans: from objects and what was observed to what should be written. Pure.

mod deployment;
pub mod egress;
pub mod ipam;
mod ownership;
mod status;
#[cfg(test)]
mod tests;
