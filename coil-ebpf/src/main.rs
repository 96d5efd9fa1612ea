//! coil-ebpf
fn main() {}
