//! coil-runtime
