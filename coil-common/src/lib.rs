//! The map ABI: whatever the datapath in the kernel and the agents in user space must agree on.
//!
//! Keys, values, constants, names and capacities live here and nowhere else. Every shared struct is
//! `repr(C)` without implicit padding (a `bytemuck::Pod` derive makes padding a compile error) and
//! asserts its size. Addresses and ports are byte arrays in network order. A change of any layout
//! bumps [`ABI_VERSION`], which is part of the path that maps are pinned under.

#![no_std]

pub mod config;
pub mod events;
pub mod keys;
pub mod names;
mod pod;
pub mod stats;
pub mod usage;
pub mod values;

/// Version of the layouts in this crate; a component of the pin path.
pub const ABI_VERSION: u32 = 1;
