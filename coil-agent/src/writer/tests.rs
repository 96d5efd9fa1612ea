#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use super::*;
use crate::datapath::{ApplyReport, DatapathError, PodError, SweepReport};
use crate::desired::build::Outcome;
use crate::desired::{DesiredPod, DesiredState};

/// What the writer did, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Done {
    Applied(Vec<PodUid>),
    Resynced,
    Swept,
    Forgot(Vec<String>),
}

#[derive(Clone, Default)]
struct FakeDatapath {
    done: Arc<Mutex<Vec<Done>>>,
    /// Attempts that fail as a whole.
    failures: Arc<Mutex<usize>>,
    /// Pods that cannot be served.
    bad_pods: Arc<Mutex<BTreeSet<PodUid>>>,
}

impl FakeDatapath {
    fn note(&self, done: Done) {
        self.done.lock().unwrap().push(done);
    }

    fn count(&self, wanted: impl Fn(&Done) -> bool) -> usize {
        self.done.lock().unwrap().iter().filter(|done| wanted(done)).count()
    }
}

impl Datapath for FakeDatapath {
    fn apply(&mut self, state: &DesiredState) -> Result<ApplyReport, DatapathError> {
        self.note(Done::Applied(state.pods.keys().cloned().collect()));
        let mut failures = self.failures.lock().unwrap();
        if *failures > 0 {
            *failures -= 1;
            return Err(DatapathError::System { what: "anything", source: std::io::ErrorKind::Other.into() });
        }
        let bad_pods = self.bad_pods.lock().unwrap();
        let failed = bad_pods.iter().map(|uid| (uid.clone(), PodError::InterfaceGone { ifindex: 1 }));
        Ok(ApplyReport { failed: failed.collect(), ..ApplyReport::default() })
    }

    fn resync(&mut self) {
        self.note(Done::Resynced);
    }

    fn sweep(&mut self, _now: u32, _budget: usize) -> Result<SweepReport, DatapathError> {
        self.note(Done::Swept);
        Ok(SweepReport { finished: true, ..SweepReport::default() })
    }

    fn gc_gateways(&mut self, live: &BTreeSet<String>) -> Result<(), DatapathError> {
        self.note(Done::Forgot(live.iter().cloned().collect()));
        Ok(())
    }
}

const PACE: Pace = Pace {
    retry_min: Duration::from_millis(1),
    retry_max: Duration::from_millis(4),
    resync: Duration::from_millis(50),
    sweep: Duration::from_millis(1),
    sweep_rest: Duration::from_millis(2),
};

struct World {
    datapath: FakeDatapath,
    snapshots: watch::Sender<Snapshot>,
    applied: watch::Receiver<Applied>,
    drain: Drain,
    ready: Arc<Mutex<bool>>,
}

impl World {
    fn new() -> Self {
        Self::at(PACE).0
    }

    fn at(pace: Pace) -> (Self, Arc<Notify>) {
        let datapath = FakeDatapath::default();
        let (snapshots, receiver) = watch::channel(Snapshot::default());
        let metrics = StateMetrics::register(&prometheus::Registry::new()).unwrap();
        let (mut writer, applied) = Writer::new(datapath.clone(), receiver, metrics);
        writer.pace = pace;
        let alarm = writer.alarm();
        let (drain, ready) = (Drain::new(), Arc::new(Mutex::new(false)));
        let flag = Arc::clone(&ready);
        tokio::spawn(writer.run(drain.clone(), move || *flag.lock().unwrap() = true));
        (Self { datapath, snapshots, applied, drain, ready }, alarm)
    }

    fn publish(&self, revision: u64, pods: &[&str]) {
        let pod = DesiredPod {
            namespace: "demo".into(),
            name: "a".into(),
            ifindex: 1,
            ipv4: None,
            ipv6: None,
            gateway: false,
            mtu: 1500,
            policy: None,
        };
        let pods: Vec<PodUid> = pods.iter().map(|uid| (*uid).to_owned()).collect();
        let desired = DesiredState {
            pods: pods.iter().map(|uid| (uid.clone(), pod.clone())).collect(),
            complete: revision > 0,
            ..DesiredState::default()
        };
        let rest = Outcome { gateway_folders: pods.into_iter().collect(), ..Outcome::default() };
        self.snapshots.send_replace(Snapshot { revision, desired: Arc::new(desired), rest: Arc::new(rest) });
    }

    /// Waits until the writer has done something.
    async fn until(&self, wanted: impl Fn(&[Done]) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !wanted(&self.datapath.done.lock().unwrap()) {
            assert!(Instant::now() < deadline, "{:?}", self.datapath.done.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn applied(&self, wanted: impl Fn(&Applied) -> bool) -> Applied {
        let mut applied = self.applied.clone();
        applied.wait_for(|applied| wanted(applied)).await.unwrap().clone()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.drain.cancel();
    }
}

#[tokio::test]
async fn nothing_is_touched_before_the_picture_is_complete() {
    let world = World::new();
    world.publish(0, &["1"]);
    world.until(|done| done.iter().filter(|d| **d == Done::Resynced).count() >= 2).await;
    assert_eq!(world.datapath.count(|done| matches!(done, Done::Applied(_) | Done::Forgot(_))), 0);
    assert!(!*world.ready.lock().unwrap());
    world.publish(1, &["1"]);
    let applied = world.applied(|applied| applied.revision == 1).await;
    assert_eq!(applied.pods, ["1".to_owned()].into());
    assert!(applied.failed.is_empty() && applied.error.is_none());
    // Gateways are forgotten after the state holds, and the process is ready then.
    world.until(|done| done.contains(&Done::Forgot(vec!["1".into()]))).await;
    assert!(*world.ready.lock().unwrap());
}

#[tokio::test]
async fn a_failure_is_told_and_tried_again_with_fresh_eyes() {
    let world = World::new();
    *world.datapath.failures.lock().unwrap() = 3;
    world.publish(1, &["1"]);
    let failed = world.applied(|applied| applied.error.is_some()).await;
    assert_eq!(failed.revision, 0);
    let applied = world.applied(|applied| applied.revision == 1).await;
    assert!(applied.error.is_none());
    assert!(world.datapath.count(|done| *done == Done::Applied(vec!["1".into()])) >= 4);
    assert!(world.datapath.count(|done| *done == Done::Resynced) >= 3);
}

#[tokio::test]
async fn a_pod_that_cannot_be_served_does_not_hold_up_others() {
    let world = World::new();
    world.datapath.bad_pods.lock().unwrap().insert("2".into());
    world.publish(1, &["1", "2"]);
    let applied = world.applied(|applied| applied.revision == 1).await;
    assert_eq!(applied.pods, ["1".to_owned()].into());
    assert!(applied.failed["2"].contains("does not exist"));
    world.datapath.bad_pods.lock().unwrap().clear();
    let applied = world.applied(|applied| applied.failed.is_empty()).await;
    assert_eq!(applied.pods.len(), 2);
}

#[tokio::test]
async fn maps_are_compared_and_flows_swept_from_time_to_time() {
    let world = World::new();
    world.publish(1, &["1"]);
    world.applied(|applied| applied.revision == 1).await;
    world
        .until(|done| {
            let last_resync = done.iter().rposition(|d| *d == Done::Resynced);
            let last_apply = done.iter().rposition(|d| matches!(d, Done::Applied(_)));
            last_resync.is_some() && last_apply > last_resync
        })
        .await;
    assert!(world.datapath.count(|done| *done == Done::Swept) > 3);
}

#[tokio::test]
async fn an_alarm_makes_it_look_at_once() {
    let never = Duration::from_secs(1000);
    let (world, alarm) = World::at(Pace { resync: never, ..PACE });
    world.publish(1, &["1"]);
    world.applied(|applied| applied.revision == 1).await;
    assert_eq!(world.datapath.count(|done| *done == Done::Resynced), 0);
    alarm.notify_one();
    world
        .until(|done| {
            let resync = done.iter().rposition(|d| *d == Done::Resynced);
            resync.is_some() && done.iter().rposition(|d| matches!(d, Done::Applied(_))) > resync
        })
        .await;
}

#[tokio::test]
async fn at_the_end_it_does_not_matter_who_goes_first() {
    for drained in [true, false] {
        // Which of two things that are there is seen first is left to chance.
        for _ in 0..64 {
            let (publisher, snapshots) = watch::channel(Snapshot::default());
            let metrics = StateMetrics::register(&prometheus::Registry::new()).unwrap();
            let (writer, _applied) = Writer::new(FakeDatapath::default(), snapshots, metrics);
            let drain = Drain::new();
            drop(publisher);
            if drained {
                drain.cancel();
            }
            assert_eq!(writer.run(drain, || {}).await.is_ok(), drained);
        }
    }
}
