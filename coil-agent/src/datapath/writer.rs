//! The one writer of a node's maps: plans against what the maps hold and carries the plan out.
//!
//! Works on two traits, [`Store`] for maps and [`Attachments`] for programs on interfaces, so that all
//! of it runs in tests without a kernel.

use std::collections::{BTreeMap, BTreeSet};

use super::encode::{EncodeError, Encoded, Limits, encode};
use super::plan::plan;
use super::state::{MapOp, MapState};
use super::{ApplyReport, PodError};
use crate::desired::{DesiredState, PodUid};

/// The maps that the agent writes.
pub(crate) trait Store {
    /// Why a map cannot be read or written.
    type Error;

    /// Reads everything.
    fn dump(&self) -> Result<MapState, Self::Error>;

    /// Makes one change.
    fn execute(&mut self, op: &MapOp) -> Result<(), Self::Error>;
}

/// Programs on interfaces of pods.
pub(crate) trait Attachments {
    /// Why a program cannot be attached or detached.
    type Error;

    /// Interfaces with programs of ours, whether they still exist or not.
    fn list(&self) -> Result<BTreeSet<u32>, Self::Error>;

    /// Sees to it that the interface has the programs of this process; true if it had none of ours.
    fn attach(&mut self, ifindex: u32) -> Result<bool, Self::Error>;

    /// Takes the programs away; an interface without any is fine.
    fn detach(&mut self, ifindex: u32) -> Result<(), Self::Error>;
}

/// Keeps maps and attachments as desired.
#[derive(Debug)]
pub(crate) struct Writer<S, A> {
    store: S,
    attachments: A,
    limits: Limits,
    next_set: u32,
    /// What the maps hold; `None` if it must be read.
    maps: Option<MapState>,
    /// Interfaces that have the programs of this process, and for whom they got them.
    attached: BTreeMap<u32, PodUid>,
    /// Interfaces that an earlier process has attached to; `None` if that must be read.
    adopted: Option<BTreeSet<u32>>,
}

impl<S: Store, A: Attachments> Writer<S, A> {
    /// A writer that has not looked at the maps yet. `first_set` should grow with time, so that numbers
    /// of policy sets are not those that flows of earlier sets carry.
    pub(crate) fn new(store: S, attachments: A, limits: Limits, first_set: u32) -> Self {
        Self {
            store,
            attachments,
            limits,
            next_set: first_set,
            maps: None,
            attached: BTreeMap::new(),
            adopted: None,
        }
    }

    /// Reads maps and attachments again the next time.
    pub(crate) fn resync(&mut self) {
        self.maps = None;
        self.attached.clear();
        self.adopted = None;
    }

    /// How many entries each map has; `None` before the first change and after a failure.
    pub(crate) fn maps(&self) -> Option<&MapState> {
        self.maps.as_ref()
    }

    /// Reads the maps unless they are known.
    pub(crate) fn load(&mut self) -> Result<&MapState, S::Error> {
        let maps = match self.maps.take() {
            Some(maps) => maps,
            None => self.store.dump()?,
        };
        Ok(self.maps.insert(maps))
    }

    /// Makes maps and attachments as desired. A failure of one pod's interface is reported and leaves
    /// the others alone; a failure of a map ends the attempt, and the next one reads the maps anew.
    pub(crate) fn apply<E>(&mut self, desired: &DesiredState) -> Result<ApplyReport, E>
    where
        E: From<S::Error> + From<A::Error>,
        PodError: From<A::Error>,
    {
        self.load()?;
        // Unknown again until all is done.
        let old = self.maps.take().unwrap_or_default();
        let highest = old.policy_v4.keys().map(|(_, key)| key.set);
        let highest = highest.chain(old.policy_v6.keys().map(|(_, key)| key.set)).max();
        if let Some(set) = highest.map(u32::from_be_bytes)
            && set >= self.next_set
        {
            self.next_set = set.wrapping_add(1);
        }
        let Encoded { state, failed, problems } = encode(desired, &old, &self.limits, &mut self.next_set);
        for (egress, error) in problems {
            tracing::warn!(
                egress.namespace = egress.namespace, egress.name, %error,
                "Egress does not fit into the datapath",
            );
        }
        let new = if desired.complete { state } else { old.clone().fill_from(state) };
        let mut report = ApplyReport {
            failed: failed.into_iter().map(|(uid, error)| (uid, error.into())).collect(),
            ..ApplyReport::default()
        };
        let (removals, additions): (Vec<_>, Vec<_>) =
            plan(&old, &new).into_iter().partition(MapOp::is_removal);
        report.operations = additions.len() + removals.len();
        for op in &additions {
            self.store.execute(op)?;
        }
        // Only now that its policy is in the maps may a packet of a pod meet the programs.
        self.attach(desired, &new, &mut report);
        if desired.complete {
            self.detach(&new, &mut report)?;
        }
        for op in &removals {
            self.store.execute(op)?;
        }
        self.maps = Some(new);
        Ok(report)
    }

    fn attach(&mut self, desired: &DesiredState, new: &MapState, report: &mut ApplyReport)
    where
        PodError: From<A::Error>,
    {
        for (uid, pod) in &desired.pods {
            let served = new.pods.contains_key(&pod.ifindex)
                && !report.failed.iter().any(|(failed, error)| {
                    failed == uid && matches!(error, PodError::Encode(EncodeError::DuplicateInterface { .. }))
                });
            if !served || self.attached.get(&pod.ifindex) == Some(uid) {
                continue;
            }
            match self.attachments.attach(pod.ifindex) {
                Ok(fresh) => {
                    self.attached.insert(pod.ifindex, uid.clone());
                    if fresh {
                        report.attached.push(uid.clone());
                    }
                }
                Err(error) => report.failed.push((uid.clone(), error.into())),
            }
        }
    }

    fn detach(&mut self, new: &MapState, report: &mut ApplyReport) -> Result<(), A::Error> {
        let adopted = match self.adopted.take() {
            Some(adopted) => adopted,
            None => self.attachments.list()?,
        };
        let known: BTreeSet<u32> = adopted.into_iter().chain(self.attached.keys().copied()).collect();
        let gone: Vec<u32> = known.into_iter().filter(|ifindex| !new.pods.contains_key(ifindex)).collect();
        for ifindex in gone {
            // Failed half-way: listed again the next time, as `adopted` is still unknown.
            self.attachments.detach(ifindex)?;
            self.attached.remove(&ifindex);
            report.detached.push(ifindex);
        }
        self.adopted = Some(BTreeSet::new());
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod fake {
    //! Maps and interfaces in memory.

    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    /// What happened, in order.
    #[derive(Clone, Debug, PartialEq, Eq)]
    #[expect(clippy::large_enum_variant, reason = "tests")]
    pub(crate) enum Event {
        Op(MapOp),
        Attach(u32),
        Detach(u32),
    }

    /// Shared contents of the fake kernel.
    #[derive(Debug, Default)]
    pub(crate) struct Kernel {
        pub(crate) maps: MapState,
        pub(crate) links: BTreeSet<u32>,
        pub(crate) missing: BTreeSet<u32>,
        pub(crate) events: Vec<Event>,
        /// Map operations that succeed before one fails.
        pub(crate) fail_after: Option<usize>,
        pub(crate) dumps: usize,
    }

    /// Why the fake refused.
    #[derive(Debug, PartialEq, Eq)]
    pub(crate) struct Refused;

    impl From<Refused> for PodError {
        fn from(_: Refused) -> Self {
            PodError::InterfaceGone { ifindex: 0 }
        }
    }

    /// Both traits over one kernel.
    #[derive(Clone, Debug, Default)]
    pub(crate) struct Fake(pub(crate) Rc<RefCell<Kernel>>);

    impl Store for Fake {
        type Error = Refused;

        fn dump(&self) -> Result<MapState, Refused> {
            let mut kernel = self.0.borrow_mut();
            kernel.dumps += 1;
            Ok(kernel.maps.clone())
        }

        fn execute(&mut self, op: &MapOp) -> Result<(), Refused> {
            let mut kernel = self.0.borrow_mut();
            if let Some(left) = &mut kernel.fail_after {
                if *left == 0 {
                    return Err(Refused);
                }
                *left -= 1;
            }
            let maps = &mut kernel.maps;
            match *op {
                MapOp::SetGateway(k, v) | MapOp::ClearGateway(k, v) => {
                    maps.gateways.insert(k, v);
                }
                MapOp::SetPeer4(k, v) => drop(maps.peers_v4.insert(k, v)),
                MapOp::SetPeer6(k, v) => drop(maps.peers_v6.insert(k, v)),
                MapOp::ResetEgressStats(_) => {}
                MapOp::SetEgressName(k, v) => drop(maps.egress_names.insert(k, v)),
                MapOp::SetEgress(k, v) => drop(maps.egresses.insert(k, v)),
                MapOp::SetPolicy4(k, v) => drop(maps.policy_v4.insert(k, v)),
                MapOp::SetPolicy6(k, v) => drop(maps.policy_v6.insert(k, v)),
                MapOp::SetPod(k, v) => drop(maps.pods.insert(k, v)),
                MapOp::RemovePod(k) => drop(maps.pods.remove(&k)),
                MapOp::RemovePolicy4(k) => drop(maps.policy_v4.remove(&k)),
                MapOp::RemovePolicy6(k) => drop(maps.policy_v6.remove(&k)),
                MapOp::RemovePeer4(k) => drop(maps.peers_v4.remove(&k)),
                MapOp::RemovePeer6(k) => drop(maps.peers_v6.remove(&k)),
                MapOp::ClearEgress(k) => drop(maps.egresses.remove(&k)),
                MapOp::ClearEgressName(k) => drop(maps.egress_names.remove(&k)),
            }
            kernel.events.push(Event::Op(*op));
            Ok(())
        }
    }

    impl Attachments for Fake {
        type Error = Refused;

        fn list(&self) -> Result<BTreeSet<u32>, Refused> {
            Ok(self.0.borrow().links.clone())
        }

        fn attach(&mut self, ifindex: u32) -> Result<bool, Refused> {
            let mut kernel = self.0.borrow_mut();
            if kernel.missing.contains(&ifindex) {
                return Err(Refused);
            }
            kernel.events.push(Event::Attach(ifindex));
            Ok(kernel.links.insert(ifindex))
        }

        fn detach(&mut self, ifindex: u32) -> Result<(), Refused> {
            let mut kernel = self.0.borrow_mut();
            kernel.events.push(Event::Detach(ifindex));
            kernel.links.remove(&ifindex);
            Ok(())
        }
    }
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
