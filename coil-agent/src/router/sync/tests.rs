#![allow(clippy::unwrap_used, reason = "tests")]

use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use coil_runtime::metrics::registry;
use ipnet::IpNet;
use tokio::task::JoinHandle;

use super::*;
use crate::netlink::NetlinkError;
use crate::router::cluster::{BlockView, Change, Cluster, Input, NodeView};
use crate::router::plan::{Route, default_metric};

/// A table in memory that can be made to fail.
#[derive(Clone, Default)]
struct Fake {
    routes: Arc<Mutex<Vec<Route>>>,
    blind: Arc<AtomicBool>,
    /// No route by way of this router can be made.
    unreachable: Arc<Mutex<Option<IpAddr>>>,
}

impl Fake {
    fn error(errno: i32) -> NetlinkError {
        NetlinkError::Request {
            operation: "use",
            subject: "the fake".into(),
            source: io::Error::from_raw_os_error(errno),
        }
    }

    fn ours(&self) -> Wanted {
        let routes = self.routes.lock().unwrap();
        routes.iter().filter(|r| r.ours).map(|r| (r.net, r.via.unwrap())).collect()
    }
}

impl RouteTable for Fake {
    async fn list(&self) -> Result<Vec<Route>, NetlinkError> {
        if self.blind.load(Ordering::Relaxed) {
            return Err(Self::error(libc::ENOBUFS));
        }
        Ok(self.routes.lock().unwrap().clone())
    }

    async fn apply(&self, op: &Op) -> Result<(), NetlinkError> {
        let mut routes = self.routes.lock().unwrap();
        match op {
            Op::Add { net, via } | Op::Move { net, via } => {
                if *self.unreachable.lock().unwrap() == Some(*via) {
                    return Err(Self::error(libc::ENETUNREACH));
                }
                routes.retain(|route| !route.ours || route.net != *net);
                let metric = default_metric(net);
                routes.push(Route { net: *net, via: Some(*via), metric, ours: true });
            }
            Op::Delete(gone) => routes.retain(|route| route != gone),
        }
        Ok(())
    }
}

/// A router but for its watches.
struct Router {
    cluster: Cluster,
    wanted: watch::Sender<Option<Wanted>>,
    table: Fake,
    metrics: RouterMetrics,
    ready: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Router {
    fn start() -> Self {
        Self::with_interval(Duration::from_secs(600))
    }

    fn with_interval(interval: Duration) -> Self {
        let metrics = RouterMetrics::register(&registry("test").unwrap(), "own").unwrap();
        let table = Fake::default();
        let (wanted, receiver) = watch::channel(None);
        let ready = Arc::new(AtomicBool::new(false));
        let mut syncer = Syncer::new(table.clone(), metrics.clone(), interval);
        syncer.retry = (Duration::from_millis(1), Duration::from_millis(5));
        let is_ready = Arc::clone(&ready);
        let task = tokio::spawn(syncer.run(receiver, move || is_ready.store(true, Ordering::Relaxed)));
        Self { cluster: Cluster::new("own"), wanted, table, metrics, ready, task }
    }

    fn take(&mut self, input: Input) {
        self.cluster.take(input);
        self.wanted.send_replace(self.cluster.wanted());
    }

    /// Waits until something holds.
    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let wait = async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(30), wait).await;
        assert!(waited.is_ok(), "gave up waiting for {what}: {:?}", self.table.ours());
    }

    async fn until_ours(&self, want: &Wanted) {
        self.until("routes", |router| router.table.ours() == *want).await;
    }

    fn syncs(&self) -> u64 {
        self.metrics.syncs.get()
    }
}

fn block(name: &str, node: &str, nets: &[&str]) -> BlockView {
    let nets = nets.iter().map(|net| net.parse().unwrap()).collect();
    BlockView { name: name.into(), node: node.into(), nets }
}

fn node(name: &str, ipv4: Option<&str>, ipv6: Option<&str>) -> NodeView {
    let (ipv4, ipv6) = (ipv4.map(|text| text.parse().unwrap()), ipv6.map(|text| text.parse().unwrap()));
    NodeView { name: name.into(), ipv4, ipv6 }
}

fn routes(routes: &[(&str, &str)]) -> Wanted {
    routes.iter().map(|(net, via)| (net.parse().unwrap(), via.parse().unwrap())).collect()
}

fn all<T>(objects: Vec<T>) -> Change<T> {
    Change::Reset { objects, unreadable: Vec::new() }
}

fn nodes() -> Input {
    Input::Nodes(all(vec![
        node("own", Some("10.0.0.1"), Some("fd00::1")),
        node("dual", Some("10.0.0.2"), Some("fd00::2")),
        node("v4", Some("10.0.0.3"), None),
        node("v6", None, Some("fd00::4")),
    ]))
}

#[tokio::test]
async fn a91_routes_to_the_blocks_of_all_other_nodes() {
    let mut router = Router::start();
    router.take(nodes());
    assert_eq!(*router.wanted.borrow(), None, "not all is known");
    router.take(Input::Blocks(all(vec![
        block("default-0", "own", &["10.2.0.0/27", "fd02::/123"]),
        block("default-1", "dual", &["10.2.0.32/27", "fd02::20/123"]),
        block("default-2", "v4", &["10.2.0.64/27", "fd02::40/123"]),
        block("default-3", "v6", &["10.2.0.96/27", "fd02::60/123"]),
        block("default-4", "dual", &["10.2.0.128/27", "fd02::80/123"]),
        block("default-5", "unknown", &["10.2.0.160/27"]),
        block("default-6", "", &["10.2.0.192/27"]),
    ])));
    let want = routes(&[
        ("10.2.0.32/27", "10.0.0.2"),
        ("fd02::20/123", "fd00::2"),
        ("10.2.0.64/27", "10.0.0.3"),
        ("fd02::60/123", "fd00::4"),
        ("10.2.0.128/27", "10.0.0.2"),
        ("fd02::80/123", "fd00::2"),
    ]);
    router.until_ours(&want).await;
    router.until("the first sync", |router| router.ready.load(Ordering::Relaxed)).await;
    assert_eq!((router.syncs(), router.metrics.routes.get()), (1, 6));

    // A node that is gone, and one that has moved.
    router.take(Input::Nodes(Change::Delete("dual".into())));
    router.take(Input::Nodes(Change::Apply(node("v4", Some("10.0.0.33"), None))));
    router.until_ours(&routes(&[("10.2.0.64/27", "10.0.0.33"), ("fd02::60/123", "fd00::4")])).await;
    router.until("the second sync", |router| router.syncs() >= 2).await;
    assert_eq!(router.metrics.routes.get(), 2);
    drop(router.wanted);
    router.task.await.unwrap();
}

/// Long before the next forced sync.
#[tokio::test]
async fn a43_a_new_block_has_its_route_at_once() {
    let mut router = Router::with_interval(Duration::from_secs(86_400));
    router.take(nodes());
    router.take(Input::Blocks(all(Vec::new())));
    router.until("the first sync", |router| router.syncs() == 1).await;
    router.take(Input::Blocks(Change::Apply(block("default-0", "v4", &["10.2.0.64/27"]))));
    router.until_ours(&routes(&[("10.2.0.64/27", "10.0.0.3")])).await;
    router.take(Input::Blocks(Change::Delete("default-0".into())));
    router.until_ours(&Wanted::new()).await;
}

#[tokio::test]
async fn routes_that_others_remove_are_back_after_an_interval() {
    let mut router = Router::with_interval(Duration::from_millis(20));
    router.take(nodes());
    router.take(Input::Blocks(all(vec![block("b", "v4", &["10.2.0.64/27"])])));
    let want = routes(&[("10.2.0.64/27", "10.0.0.3")]);
    router.until_ours(&want).await;
    router.table.routes.lock().unwrap().clear();
    router.until_ours(&want).await;
    router.until("another sync", |router| router.syncs() >= 2).await;
}

#[tokio::test]
async fn what_fails_is_tried_again_and_ends_nothing() {
    let mut router = Router::start();
    router.table.blind.store(true, Ordering::Relaxed);
    router.take(nodes());
    router.take(Input::Blocks(all(vec![
        block("a", "v4", &["10.2.0.64/27"]),
        block("b", "dual", &["10.2.0.32/27"]),
    ])));
    router.until("failures", |router| router.metrics.failures.get() >= 2).await;
    assert_eq!((router.syncs(), router.ready.load(Ordering::Relaxed)), (0, false));
    assert_eq!(router.metrics.routes.get(), 2, "what is wanted is known");

    // One router cannot be reached: the other route is made all the same.
    *router.table.unreachable.lock().unwrap() = Some("10.0.0.3".parse().unwrap());
    router.table.blind.store(false, Ordering::Relaxed);
    router.until_ours(&routes(&[("10.2.0.32/27", "10.0.0.2")])).await;
    router.until("a count", |router| router.metrics.missing.get() == 1).await;
    assert_eq!(router.syncs(), 0);

    *router.table.unreachable.lock().unwrap() = None;
    router.until("a sync", |router| router.syncs() == 1).await;
    assert_eq!((router.table.ours().len(), router.metrics.missing.get()), (2, 0));
    assert!(!router.task.is_finished());
}

#[tokio::test]
async fn somebody_elses_route_is_reported_and_stays() {
    let mut router = Router::start();
    let net: IpNet = "10.2.0.64/27".parse().unwrap();
    let foreign = Route { net, via: "10.0.0.99".parse().ok(), metric: 0, ours: false };
    router.table.routes.lock().unwrap().push(foreign.clone());
    router.take(nodes());
    router.take(Input::Blocks(all(vec![block("a", "v4", &["10.2.0.64/27"])])));
    router.until("a count", |router| router.metrics.missing.get() == 1).await;
    assert_eq!(*router.table.routes.lock().unwrap(), [foreign]);
    assert_eq!(router.syncs(), 0);
    router.table.routes.lock().unwrap().clear();
    router.until_ours(&routes(&[("10.2.0.64/27", "10.0.0.3")])).await;
}
