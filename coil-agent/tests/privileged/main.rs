//! Tests of the agent's datapath in a real kernel. They need root and the eBPF object, make name spaces
//! and BPF file systems of their own, and are run by `cargo xtask test`.

mod attach;
mod cni;
mod errors;
mod forged;
mod fuzz;
mod hostile;
mod inspect;
mod ipam;
mod merged;
mod near;
mod netlink;
mod others;
mod pickup;
mod pins;
mod ports;
mod race;
mod restart;
mod router;
mod routes;
mod scenarios;
mod shortcut;
mod split;
mod summed;
mod support;
mod traffic;
mod tunnel;
mod upgrade;
mod verifier;
mod wiring;
