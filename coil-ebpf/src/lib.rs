//! The datapath as a pure library: parse a packet, decide what happens to it, say how it is
//! rewritten.
//!
//! Nothing here touches the kernel. A [`packet::Packet`] supplies bytes, [`tables`] answer
//! questions, and the result is a [`verdict::Verdict`]: data that the TC programs (`src/bpf`) and the
//! tests (`testing`) carry out each in their way. All code is generic over the address
//! [`family::Family`], so that IPv4 and IPv6 cannot drift apart.

#![cfg_attr(not(feature = "testing"), no_std)]
#![forbid(unsafe_code)]

pub mod csum;
pub mod decide;
pub mod encap;
pub mod family;
pub mod flow;
pub mod head;
pub mod notes;
pub mod packet;
pub mod parse;
pub mod tables;
#[cfg(feature = "testing")]
pub mod testing;
pub mod usage;
pub mod verdict;
