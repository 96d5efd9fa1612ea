//! The Coil node agent (`coild`), the CNI plugin (`coil`) and the egress gateway (`coil-egress`).

pub mod datapath;
pub mod desired;
pub mod netlink;
