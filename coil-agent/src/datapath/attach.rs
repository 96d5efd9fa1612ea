//! Programs on interfaces, so that they stay while no process of ours runs.
//!
//! There are two ways: pinned tcx links (Linux 6.6), and `clsact` filters with a fixed priority and handle, found
//! again by a pin of the program that bears the same name. A program is replaced atomically in either. What an
//! interface has it keeps, whatever the way of new ones is: to go over from one to the other there would have to be
//! a moment with both programs, or with none.
//!
//! A link belongs to whoever made it, a filter can be removed by everybody, and all tcx programs come before all
//! filters. But to make a link the kernel waits for a grace period of RCU (10 to 20 ms) and keeps everybody else
//! from changing interfaces meanwhile, twice for a pod; filters take a fraction of a millisecond.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{ProgramError, ProgramFd, SchedClassifier, TcAttachType};
use coil_common::names::{PROGRAM_FROM_POD, PROGRAM_TO_POD};

use super::pins::PinError;
use super::sys::{self, ObjectKind};
use super::writer::Attachments;

/// Priority and handle of our filters.
const PRIORITY: u16 = 0xc01;
const HANDLE: TcHandle = TcHandle::new(0, 1);
/// What the name of a pin ends with that is about to take the place of another; a BPF file system has no dots.
const FRESH: &str = "_new";

/// Why a program cannot be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The interface does not exist (any more).
    #[error("interface {ifindex} does not exist")]
    InterfaceGone {
        /// Its index.
        ifindex: u32,
    },
    /// Links were asked for.
    #[error("this kernel has no tcx links, which came with Linux 6.6; leave --attach at auto")]
    NoTcx,
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

/// How programs are attached to interfaces that have none of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// Links, from Linux 6.6 on.
    Tcx,
    /// Filters of the `clsact` queueing discipline.
    Clsact,
}

/// Which of the two is chosen for interfaces of new pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum AttachChoice {
    /// Filters where Coil itself wires the pods, since nobody else attaches anything to their interfaces before it
    /// and they are ready sooner; where another plugin wires them links, if the kernel has them.
    #[default]
    Auto,
    /// Links.
    Tcx,
    /// Filters.
    Clsact,
}

impl AttachChoice {
    /// The way of attaching; `None` for the best that the kernel has.
    #[must_use]
    pub fn mode(self, own_interfaces: bool) -> Option<AttachMode> {
        match self {
            Self::Auto => own_interfaces.then_some(AttachMode::Clsact),
            Self::Tcx => Some(AttachMode::Tcx),
            Self::Clsact => Some(AttachMode::Clsact),
        }
    }
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
        match pinned(path)? {
            Some(Pinned::Link(link)) => {
                let info = sys::link_info(&link).map_err(PinError::path("describe", path))?;
                if info.ifindex == ifindex && info.attach_type == self.hook.tcx() {
                    sys::link_update(&link, &self.program).map_err(self.link_error("replace", ifindex))?;
                    return Ok(false);
                }
                // The interface it was for is gone and its index in use again: not ours to update.
                remove(path)?;
            }
            Some(Pinned::Program(old)) => {
                if self.replace_filter(ifindex, path, &old)? {
                    return Ok(false);
                }
                // The filter went with its interface, or somebody has removed it.
                remove(path)?;
            }
            None => {}
        }
        match mode {
            AttachMode::Tcx => self.attach_link(ifindex, path).map(|()| true),
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

    fn filter_error(
        &self,
        operation: &'static str,
        ifindex: u32,
    ) -> impl Fn(ProgramError) -> AttachError + use<> {
        let program = self.name;
        move |source| match errno(&source) {
            Some(libc::ENODEV) => AttachError::InterfaceGone { ifindex },
            _ => AttachError::Filter { operation, program, ifindex, source: Box::new(source) },
        }
    }

    fn attach_link(&self, ifindex: u32, path: &Path) -> Result<(), AttachError> {
        let link = sys::tcx_attach(&self.program, ifindex, self.hook.tcx())
            .map_err(self.link_error("attach", ifindex))?;
        Ok(sys::object_pin(&link, path).map_err(PinError::path("pin a link at", path))?)
    }

    /// Makes the filter; false if it was there without a pin, so that it was replaced.
    fn attach_filter(&self, ifindex: u32, path: &Path) -> Result<bool, AttachError> {
        let name = interface_name(ifindex)?;
        // The pin comes first: what has a filter of ours can be found by it.
        sys::object_pin(&self.program, path).map_err(PinError::path("pin a program at", path))?;
        match qdisc_add_clsact(&name) {
            Ok(()) => {}
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => return Err(self.filter_error("prepare", ifindex)(error.into())),
        }
        let mut program = SchedClassifier::from_pin(path).map_err(self.filter_error("open", ifindex))?;
        let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
        let options = TcAttachOptions::Netlink(options);
        match program.attach_with_options(&name, self.hook.clsact(), options) {
            Ok(link) => {
                keep(program.take_link(link).map_err(self.filter_error("keep", ifindex))?);
                Ok(true)
            }
            Err(error) if errno(&error) == Some(libc::EEXIST) => {
                self.set_filter(&mut program, &name, ifindex).map(|()| false)
            }
            Err(error) => Err(self.filter_error("attach", ifindex)(error)),
        }
    }

    /// Replaces the program of the filter, and then the pin at `path`, which is of `old`; false if there is no
    /// filter.
    fn replace_filter(&self, ifindex: u32, path: &Path, old: &OwnedFd) -> Result<bool, AttachError> {
        let name = match interface_name(ifindex) {
            Err(AttachError::InterfaceGone { .. }) => return Ok(false),
            name => name?,
        };
        let id = |program: BorrowedFd<'_>| sys::program_id(program).map_err(PinError::path("describe", path));
        let same = id(old.as_fd())? == id(self.program.as_fd())?;
        let fresh = match same {
            true => path.to_path_buf(),
            false => fresh_pin(path),
        };
        if !same {
            // Left behind by one that was killed here.
            remove(&fresh)?;
            sys::object_pin(&self.program, &fresh).map_err(PinError::path("pin a program at", &fresh))?;
        }
        let mut program = SchedClassifier::from_pin(&fresh).map_err(self.filter_error("open", ifindex))?;
        match self.set_filter(&mut program, &name, ifindex) {
            Ok(()) => {}
            Err(AttachError::Filter { source, .. }) if is_absent(&source) => {
                if !same {
                    remove(&fresh)?;
                }
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        if !same {
            std::fs::rename(&fresh, path).map_err(PinError::path("replace", path))?;
        }
        Ok(true)
    }

    /// Gives the filter that is there another program; no packet sees neither.
    fn set_filter(&self, program: &mut SchedClassifier, name: &str, ifindex: u32) -> Result<(), AttachError> {
        let old = SchedClassifierLink::attached(name, self.hook.clsact(), PRIORITY, HANDLE, None)
            .map_err(self.link_error("find", ifindex))?;
        let link = program.attach_to_link(old).map_err(self.filter_error("replace", ifindex))?;
        keep(program.take_link(link).map_err(self.filter_error("keep", ifindex))?);
        Ok(())
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
                        Err(error) if is_absent(&error) || errno(&error) == Some(libc::ENODEV) => {}
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
        remove(&fresh_pin(path))?;
        remove(path).map_err(AttachError::from)
    }
}

/// What tells how a program is attached.
enum Pinned {
    /// A link.
    Link(OwnedFd),
    /// The program of a filter.
    Program(OwnedFd),
}

/// Opens a pin; what is neither link nor program is removed.
fn pinned(path: &Path) -> Result<Option<Pinned>, PinError> {
    match sys::object_get(path) {
        Ok((link, ObjectKind::Link)) => Ok(Some(Pinned::Link(link))),
        Ok((program, ObjectKind::Program)) => Ok(Some(Pinned::Program(program))),
        Ok((_, kind)) => {
            tracing::warn!(path = %path.display(), ?kind, "removing a pin that is neither link nor program");
            remove(path)?;
            Ok(None)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(PinError::path("open", path)(error)),
    }
}

/// Where the program that replaces another is pinned until it takes its place.
fn fresh_pin(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(FRESH);
    path.with_file_name(name)
}

/// Dropping it would detach the filter.
fn keep(link: SchedClassifierLink) {
    std::mem::forget(link);
}

fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::NetlinkError(error) | ProgramError::TcError(TcError::NetlinkError(error)) => {
            error.raw_os_error()
        }
        ProgramError::IOError(error) | ProgramError::TcError(TcError::IoError(error)) => error.raw_os_error(),
        _ => None,
    }
}

/// There is no such filter, or no queueing discipline for it.
fn is_absent(error: &ProgramError) -> bool {
    matches!(errno(error), Some(libc::ENOENT | libc::EINVAL))
}

fn remove(path: &Path) -> Result<(), PinError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(PinError::path("remove", path)(error)),
        _ => Ok(()),
    }
}

pub(super) fn interface_name(ifindex: u32) -> Result<String, AttachError> {
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
    /// Attaches with pins in `folder`, in the best way that the kernel offers unless `mode` is given.
    pub(crate) fn new(
        folder: PathBuf,
        programs: [Attachable; 2],
        mode: Option<AttachMode>,
    ) -> Result<Self, AttachError> {
        let best = programs[0].mode();
        let mode = mode.unwrap_or(best);
        if (mode, best) == (AttachMode::Tcx, AttachMode::Clsact) {
            return Err(AttachError::NoTcx);
        }
        Ok(Self { folder, programs, mode })
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
                // Somebody was killed while replacing a program: the next to do so removes it.
                Some((Ok(index), program)) if program.ends_with(FRESH) => {
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
