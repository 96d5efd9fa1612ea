//! coil-controller
