//! coil-lab
