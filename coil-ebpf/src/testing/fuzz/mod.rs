//! Fuzzing of the datapath: cases of packets that follow each other from pod to gateway to world and back,
//! honest ones and hostile ones, through the library and the reference [`model`] side by side.
//!
//! A case is a string of bytes (see [`input`]). It is run by [`play::run`], which is a pure function: tests
//! of this package call it with the corpus and with random cases, `examples/fuzz.rs` calls it for as long as
//! one likes and looks for new cases by coverage, and privileged tests of `coil-agent` show the same packets
//! to the loaded programs and compare them with the library.

pub mod check;
pub mod corpus;
pub mod input;
pub mod model;
pub mod play;
pub mod wire;
pub mod world;
