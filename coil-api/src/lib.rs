//! coil-api
