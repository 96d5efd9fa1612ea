//! Plans: from an object and what was observed of its children to what should be written. Pure.

mod deployment;
pub mod egress;
mod ownership;
mod status;
#[cfg(test)]
mod tests;
