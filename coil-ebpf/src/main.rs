//! The TC programs; an empty program on the host.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// The target has atomic instructions, but core offers them to it only as intrinsics.
#![cfg_attr(target_arch = "bpf", feature(core_intrinsics), allow(internal_features))]

#[cfg(target_arch = "bpf")]
mod bpf;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
