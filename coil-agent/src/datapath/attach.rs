//! Programs on interfaces, so that they stay while no process of ours runs.
//!
//! From Linux 6.6 on these are pinned tcx links: adopting one swaps the program atomically. Before,
//! they are `clsact` filters with a fixed priority and handle, found again by a pin of the program
//! that bears the same name; adopting one replaces the filter.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{ProgramError, ProgramFd, SchedClassifier, TcAttachType};
use coil_common::names::{PROGRAM_FROM_POD, PROGRAM_TO_POD};

use super::pins::PinError;
use super::sys::{self, ObjectKind};
use super::writer::Attachments;

/// Priority and handle of our filters where there is no tcx.
const PRIORITY: u16 = 0xc01;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// Why a program cannot be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The interface does not exist (any more).
    #[error("interface {ifindex} does not exist")]
    InterfaceGone {
        /// Its index.
        ifindex: u32,
    },
    /// The kernel refused.
    #[error("cannot {operation} {program} at interface {ifindex}")]
    Link {
        /// What was tried.
        operation: &'static str,
        /// Name of the program.
        program: &'static str,
        /// Index of the interface.
        ifindex: u32,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a filter.
    #[error("cannot {operation} filter {program} at interface {ifindex}")]
    Filter {
        /// What was tried.
        operation: &'static str,
        /// Name of the program.
        program: &'static str,
        /// Index of the interface.
        ifindex: u32,
        /// Why not.
        #[source]
        source: Box<ProgramError>,
    },
    /// A pin cannot be used.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// Where a program sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    Ingress,
    Egress,
}

impl Hook {
    fn tcx(self) -> u32 {
        match self {
            Self::Ingress => sys::TCX_INGRESS,
            Self::Egress => sys::TCX_EGRESS,
        }
    }

    fn clsact(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }
}

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// Links, from Linux 6.6 on.
    Tcx,
    /// Filters of the `clsact` queueing discipline.
    Clsact,
}

/// One program that can be attached to interfaces.
#[derive(Debug)]
pub(crate) struct Attachable {
    pub(crate) name: &'static str,
    pub(crate) hook: Hook,
    pub(crate) program: ProgramFd,
}

impl Attachable {
    /// The way of attaching that the kernel offers.
    pub(crate) fn mode(&self) -> AttachMode {
        if sys::has_tcx(&self.program) { AttachMode::Tcx } else { AttachMode::Clsact }
    }

    /// Sees to it that the interface has this program, pinned at `path`; true if it had none of ours.
    pub(crate) fn attach(&self, ifindex: u32, path: &Path, mode: AttachMode) -> Result<bool, AttachError> {
        match mode {
            AttachMode::Tcx => self.attach_link(ifindex, path),
            AttachMode::Clsact => self.attach_filter(ifindex, path),
        }
    }

    fn link_error(&self, operation: &'static str, ifindex: u32) -> impl FnOnce(io::Error) -> AttachError {
        let program = self.name;
        move |source| match source.raw_os_error() {
            Some(libc::ENODEV) => AttachError::InterfaceGone { ifindex },
            _ => AttachError::Link { operation, program, ifindex, source },
        }
    }

    fn attach_link(&self, ifindex: u32, path: &Path) -> Result<bool, AttachError> {
        if let Some(link) = pinned_link(path)? {
            let info = sys::link_info(&link).map_err(PinError::path("describe", path))?;
            if info.ifindex == ifindex && info.attach_type == self.hook.tcx() {
                sys::link_update(&link, &self.program).map_err(self.link_error("replace", ifindex))?;
                return Ok(false);
            }
            // The interface it was for is gone and its index in use again: not ours to update.
            remove(path)?;
        }
        let link = sys::tcx_attach(&self.program, ifindex, self.hook.tcx())
            .map_err(self.link_error("attach", ifindex))?;
        sys::object_pin(&link, path).map_err(PinError::path("pin a link at", path))?;
        Ok(true)
    }

    fn attach_filter(&self, ifindex: u32, path: &Path) -> Result<bool, AttachError> {
        let filter_error = |operation| {
            let program = self.name;
            move |source| AttachError::Filter { operation, program, ifindex, source: Box::new(source) }
        };
        let name = interface_name(ifindex)?;
        // A program's pin outlives its filter: the filter itself tells whether this is an adoption.
        remove(path)?;
        sys::object_pin(&self.program, path).map_err(PinError::path("pin a program at", path))?;
        let mut program = SchedClassifier::from_pin(path).map_err(filter_error("open"))?;
        match qdisc_add_clsact(&name) {
            Ok(()) => {}
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(filter_error("prepare")(error.into())),
        }
        let attach = self.hook.clsact();
        let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
        let options = TcAttachOptions::Netlink(options);
        let (link, fresh) = match program.attach_with_options(&name, attach, options) {
            Ok(link) => (link, true),
            Err(_) => {
                let old = SchedClassifierLink::attached(&name, attach, PRIORITY, HANDLE, None)
                    .map_err(self.link_error("find", ifindex))?;
                (program.attach_to_link(old).map_err(filter_error("replace"))?, false)
            }
        };
        let link = program.take_link(link).map_err(filter_error("keep"))?;
        // Dropping it would detach the filter.
        std::mem::forget(link);
        Ok(fresh)
    }

    /// Takes the program away from an interface.
    pub(crate) fn detach(
        name: &'static str,
        hook: Hook,
        ifindex: u32,
        path: &Path,
    ) -> Result<(), AttachError> {
        if let Ok((_, ObjectKind::Program)) = sys::object_get(path) {
            match interface_name(ifindex) {
                Ok(interface) => {
                    let attach = hook.clsact();
                    let link = SchedClassifierLink::attached(&interface, attach, PRIORITY, HANDLE, None);
                    match link.map_err(ProgramError::IOError).and_then(aya::programs::Link::detach) {
                        Ok(()) => {}
                        // It went with the queueing discipline or the interface.
                        Err(ProgramError::NetlinkError(error))
                            if matches!(
                                error.raw_os_error(),
                                Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
                            ) => {}
                        Err(source) => {
                            return Err(AttachError::Filter {
                                operation: "remove",
                                program: name,
                                ifindex,
                                source: Box::new(source),
                            });
                        }
                    }
                }
                Err(AttachError::InterfaceGone { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        remove(path).map_err(AttachError::from)
    }
}

/// Opens a pinned link; what is pinned there and is no link is removed.
fn pinned_link(path: &Path) -> Result<Option<OwnedFd>, PinError> {
    match sys::object_get(path) {
        Ok((link, ObjectKind::Link)) => Ok(Some(link)),
        Ok((_, kind)) => {
            tracing::warn!(path = %path.display(), ?kind, "removing a pin that is not a link");
            remove(path)?;
            Ok(None)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(PinError::path("open", path)(error)),
    }
}

fn remove(path: &Path) -> Result<(), PinError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(PinError::path("remove", path)(error)),
        _ => Ok(()),
    }
}

fn interface_name(ifindex: u32) -> Result<String, AttachError> {
    nix::net::if_::if_indextoname(ifindex)
        .ok()
        .and_then(|name| name.into_string().ok())
        // That is what it gives for an index that nothing has.
        .filter(|name| !name.is_empty())
        .ok_or(AttachError::InterfaceGone { ifindex })
}

/// Whether a pinned link is still attached to an interface; `None` if there is no link.
pub(crate) fn link_alive(path: &Path) -> Result<Option<bool>, PinError> {
    match sys::object_get(path) {
        Ok((link, ObjectKind::Link)) => {
            let info = sys::link_info(&link).map_err(PinError::path("describe", path))?;
            Ok(Some(info.ifindex != 0))
        }
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(PinError::path("open", path)(error)),
    }
}

/// `from_pod` and `to_pod` at the host-side interfaces of pods.
#[derive(Debug)]
pub(crate) struct PodPrograms {
    folder: PathBuf,
    programs: [Attachable; 2],
    mode: AttachMode,
}

impl PodPrograms {
    /// Attaches with pins in `folder`, in the way that the kernel offers unless `mode` is given.
    pub(crate) fn new(folder: PathBuf, programs: [Attachable; 2], mode: Option<AttachMode>) -> Self {
        let mode = mode.unwrap_or_else(|| programs[0].mode());
        Self { folder, programs, mode }
    }

    fn path(&self, ifindex: u32, program: &str) -> PathBuf {
        self.folder.join(format!("{ifindex}-{program}"))
    }
}

impl Attachments for PodPrograms {
    type Error = AttachError;

    fn list(&self) -> Result<BTreeSet<u32>, AttachError> {
        let error = || PinError::path("list", &self.folder);
        let mut interfaces = BTreeSet::new();
        for entry in std::fs::read_dir(&self.folder).map_err(error())? {
            let name = entry.map_err(error())?.file_name();
            let parsed = name.to_str().and_then(|name| name.split_once('-'));
            match parsed.map(|(index, program)| (index.parse(), program)) {
                Some((Ok(index), PROGRAM_FROM_POD | PROGRAM_TO_POD)) => {
                    interfaces.insert(index);
                }
                _ => tracing::warn!(?name, "a pin among the links that is not ours"),
            }
        }
        Ok(interfaces)
    }

    fn attach(&mut self, ifindex: u32) -> Result<bool, AttachError> {
        let mut fresh = false;
        for program in &self.programs {
            let path = self.path(ifindex, program.name);
            match program.attach(ifindex, &path, self.mode) {
                Ok(new) => fresh |= new,
                Err(error) => {
                    if matches!(error, AttachError::InterfaceGone { .. }) {
                        self.detach(ifindex)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(fresh)
    }

    fn detach(&mut self, ifindex: u32) -> Result<(), AttachError> {
        for program in &self.programs {
            let path = self.path(ifindex, program.name);
            Attachable::detach(program.name, program.hook, ifindex, &path)?;
        }
        Ok(())
    }
}
