//! The programs of this package, each callable by its name from one binary.

pub mod coil;
pub mod coil_egress;
pub mod coil_installer;
pub mod coil_router;
pub mod coilctl;
pub mod coild;
