//! What can go wrong when one looks into a datapath.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::args::PodRef;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The pins may not be read.
    #[error("may not read {}: run as root, in the container of coild for example: kubectl exec -n kube-system ds/coild -- coilctl …", path.display())]
    Forbidden {
        /// What.
        path: PathBuf,
    },
    /// Nothing is there.
    #[error("nothing is pinned under {}: no coild has run on this node, or --bpffs-root is another", root.display())]
    NothingPinned {
        /// Where.
        root: PathBuf,
    },
    /// Only maps of other versions are there.
    #[error("{} holds maps of version {found}, this program reads v{}: use the coilctl of the coild that runs here", root.display(), coil_common::ABI_VERSION)]
    OtherAbi {
        /// Where.
        root: PathBuf,
        /// Folders found.
        found: String,
    },
    /// A map has another layout.
    #[error("map {} has {what} of {found} bytes, this program needs {wanted}: use the coilctl of the coild that runs here", path.display())]
    Layout {
        /// The pin.
        path: PathBuf,
        /// `keys` or `values`.
        what: &'static str,
        /// As it is.
        found: u32,
        /// As this program knows it.
        wanted: usize,
    },
    /// A pin cannot be used.
    #[error("cannot {operation} {}", path.display())]
    Pin {
        /// What was tried.
        operation: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no such pod here.
    #[error("the datapath of this node knows no pod {wanted}; it knows {known}")]
    NoPod {
        /// What was asked for.
        wanted: PodRef,
        /// What there is.
        known: String,
    },
    /// There is no such gateway here.
    #[error("there is no egress pod {wanted} on this node; there is {known}")]
    NoGateway {
        /// What was asked for.
        wanted: String,
        /// What there is.
        known: String,
    },
    /// There is no such reason.
    #[error("nothing is dropped for a reason {reason:?}; `coilctl drops --all` lists all there are")]
    NoReason {
        /// What was asked for.
        reason: String,
    },
    /// The pod has no address of the destination's family.
    #[error("pod {pod} has no {family} address")]
    Family {
        /// The pod.
        pod: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// Somebody else listens.
    #[error("another coilctl monitor listens on this node; there can be one at a time")]
    Busy,
    /// The datapath was loaded by a coild that has no events.
    #[error("the datapath of this node reports no events: it was loaded by an older coild")]
    NoEvents,
    /// Standard output cannot be written.
    #[error("cannot write")]
    Output(#[source] io::Error),
    /// The system lacks something.
    #[error("cannot read {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl InspectError {
    /// An error at a pin, with the usual causes told apart.
    pub(crate) fn pin(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::PermissionDenied => Self::Forbidden { path: path.to_path_buf() },
            _ => Self::Pin { operation, path: path.to_path_buf(), source },
        }
    }

    /// The exit status.
    #[must_use]
    pub fn status(&self) -> ExitCode {
        match self {
            Self::NothingPinned { .. } | Self::OtherAbi { .. } | Self::Layout { .. } => ExitCode::from(3),
            // Whoever reads has read enough.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        }
    }

    /// It is worth a message.
    #[must_use]
    pub fn is_worth_saying(&self) -> bool {
        !matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}
