//! coil-ebpf
