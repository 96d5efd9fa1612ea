//! `coilctl`: looks into the datapath of this node and says what it does and why.
//!
//! Reads pinned maps, read-only, and needs neither `coild` nor the API. What would happen to a packet is
//! found out by the datapath's own decision code over these maps; nothing here decides anything itself.
//! `monitor` alone writes: into the map that says who listens.

mod args;
mod conntrack;
mod drops;
mod egress;
mod error;
mod explain;
mod filter;
pub mod kubectl;
mod maps;
mod monitor;
mod node;
mod output;
mod packet;
mod policy;
mod remedy;
mod source;
mod state;

use std::process::ExitCode;

pub use self::args::Args;
use self::args::Command;
pub use self::error::InspectError;
use self::node::Node;

/// Name of the program.
pub const NAME: &str = "coilctl";

/// How a command ended, beside failing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it was asked for.
    Done,
    /// `explain`: the packet would be dropped.
    Dropped,
}

impl Outcome {
    /// The exit status.
    #[must_use]
    pub fn status(self) -> ExitCode {
        match self {
            Self::Done => ExitCode::SUCCESS,
            Self::Dropped => ExitCode::from(2),
        }
    }
}

/// Runs a command.
pub async fn run(args: Args) -> Result<Outcome, InspectError> {
    let Args { bpffs_root, output, node: _, command } = args;
    if let Command::Maps(options) = command {
        return maps::run(&bpffs_root, output, options);
    }
    let node = Node::open(&bpffs_root).await?;
    match command {
        Command::Conntrack(options) => conntrack::run(&node, output, &options),
        Command::Policy(options) => policy::run(&node, output, &options),
        Command::Egress(options) => egress::run(&node, output, &options),
        Command::Drops(options) => drops::run(&node, output, &options).await,
        Command::Explain(options) => explain::run(&node, output, &options),
        Command::Monitor(options) => monitor::run(&bpffs_root, node, output, &options).await,
        Command::Maps(options) => maps::run(&bpffs_root, output, options),
    }
}
