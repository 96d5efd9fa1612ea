#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeSet;

use prometheus::Registry;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::super::testing::{assigned, found, owner};
use super::fake::{Cluster, FakeRoutes};
use super::*;
use crate::routes::NoExport;

const PACE: Pace = Pace {
    gc_interval: Duration::from_secs(300),
    release_delay: Duration::from_millis(20),
    wait: Duration::from_secs(10),
    poll: Duration::from_millis(100),
    cool: Duration::from_millis(50),
    retry: (Duration::from_millis(1), Duration::from_millis(20)),
};
/// Callers do not wait long where it is sure that nothing comes, and lists come often.
const QUICK: Pace = Pace { gc_interval: Duration::from_millis(20), wait: Duration::from_millis(200), ..PACE };
const DEADLINE: Duration = Duration::from_secs(60);

/// A node with the service.
struct Node {
    service: IpamService,
    routes: FakeRoutes,
    registry: Registry,
    drain: Drain,
    task: JoinHandle<Result<(), WatchesEnded>>,
}

impl Node {
    fn start(cluster: &Cluster, name: &str, found: Vec<Found>) -> Self {
        Self::start_with(cluster, name, found, PACE, false)
    }

    fn start_with(cluster: &Cluster, name: &str, found: Vec<Found>, pace: Pace, clear: bool) -> Self {
        let registry = Registry::new();
        let options = IpamOptions { node: name.into(), pace, clear_routes_on_shutdown: clear };
        let service = IpamService::new(options, found, IpamMetrics::register(&registry).unwrap());
        let (api, news) = cluster.node(name);
        let (routes, drain) = (FakeRoutes::default(), Drain::new());
        let task = tokio::spawn(service.clone().run(api, routes.clone(), news, drain.clone()));
        Self { service, routes, registry, drain, task }
    }

    async fn add(&self, pool: &str, container: &str) -> Result<Assigned, IpamError> {
        self.service.allocate(pool, &owner(container)).await
    }

    /// Adds as kubelet does, again and again, and tells the IPv4 address.
    async fn v4(&self, pool: &str, container: &str) -> String {
        let adding = async {
            loop {
                match self.add(pool, container).await {
                    Ok(assigned) => return assigned.ipv4.unwrap().to_string(),
                    Err(IpamError::UnknownPool { .. }) => tokio::time::sleep(PACE.cool).await,
                    Err(IpamError::Timeout { .. } | IpamError::NotReady { .. }) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
        };
        timeout(DEADLINE, adding).await.unwrap()
    }

    async fn del(&self, container: &str) {
        self.service.free(&owner(container)).await.unwrap();
    }

    /// Waits for a condition, which only the service's own doing can bring about.
    async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let waiting = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(DEADLINE, waiting).await.unwrap_or_else(|_| {
            let state = self.service.look(|core, _| format!("{core:?}"));
            panic!("no {what}: {state}; exported: {:?}", self.routes.routes())
        });
    }

    fn metric(&self, name: &str, label: &str) -> i64 {
        let families = self.registry.gather();
        let Some(family) = families.iter().find(|family| family.name() == name) else {
            return 0;
        };
        let labelled =
            |metric: &&prometheus::proto::Metric| metric.get_label().iter().all(|pair| pair.value() == label);
        let metrics = family.get_metric().iter().filter(labelled);
        let values = metrics.map(|metric| metric.get_gauge().get_value() + metric.get_counter().get_value());
        #[expect(clippy::cast_possible_truncation, reason = "small numbers")]
        let sum = values.sum::<f64>() as i64;
        sum
    }

    /// Ends as a crash does: nothing more is done.
    async fn crash(self) {
        self.task.abort();
        drop(self.task.await);
    }

    async fn stop(self) {
        self.drain.cancel();
        self.task.await.unwrap().unwrap();
    }
}

const DUAL: &[(Option<&str>, Option<&str>)] =
    &[(Some("10.2.0.0/31"), Some("fd02::200/127")), (Some("10.2.0.2/31"), Some("fd02::202/127"))];

fn cluster() -> Cluster {
    let cluster = Cluster::default();
    cluster.pool("default", DUAL);
    cluster.pool("v4", &[(Some("10.4.0.0/30"), None), (Some("10.4.0.4/30"), None)]);
    cluster
}

#[tokio::test]
async fn a52_without_a_controller_there_is_no_block_in_time() {
    let cluster = cluster();
    cluster.state().no_controller = true;
    let node = Node::start_with(&cluster, "n1", vec![], QUICK, false);
    // A caller who gives up early leaves nothing.
    let impatient = timeout(Duration::from_millis(100), node.add("default", "a")).await;
    assert!(impatient.is_err());
    assert_eq!(node.metric("coil_ipam_waiting", ""), 0);
    assert_eq!(node.metric("coil_ipam_block_waits_total", "abandoned"), 1);
    let error = node.add("default", "a").await.unwrap_err();
    assert!(matches!(error, IpamError::Timeout { .. }) && error.is_transient(), "{error:?}");
    assert!(error.to_string().starts_with("aborting new block request"), "{error}");
    assert_eq!(node.metric("coil_ipam_block_waits_total", "timeout"), 1);
    // There is one request still, and its block is used when it comes, however late.
    assert_eq!(cluster.calls("request"), 1);
    cluster.start_controller();
    assert_eq!(node.v4("default", "a").await, "10.2.0.0");
    assert_eq!(cluster.calls("request"), 1);
    node.until("request is removed", || cluster.state().requests.is_empty()).await;
}

#[tokio::test]
async fn a53_blocks_on_demand() {
    let cluster = cluster();
    let first = Node::start(&cluster, "n1", vec![]);
    let a = first.add("default", "a").await.unwrap();
    assert_eq!(a, assigned("default", Some("10.2.0.0"), Some("fd02::200")));
    first.until("export", || first.routes.routes() == ["10.2.0.0/31", "fd02::200/127"]).await;
    assert_eq!(first.add("default", "a").await.unwrap(), a, "asked twice");
    for (container, address) in [("b", "10.2.0.1"), ("c", "10.2.0.2"), ("d", "10.2.0.3")] {
        assert_eq!(first.v4("default", container).await, address);
    }
    assert_eq!(cluster.blocks("n1"), ["default-0", "default-1"]);
    let error = first.add("default", "e").await.unwrap_err();
    assert!(matches!(error, IpamError::Exhausted { .. }) && error.is_transient(), "{error:?}");
    first.del("c").await;
    let e = first.add("default", "e").await.unwrap();
    assert_eq!(e, assigned("default", Some("10.2.0.2"), Some("fd02::202")));
    // Another node.
    let second = Node::start(&cluster, "n2", vec![]);
    assert!(matches!(second.add("default", "x").await, Err(IpamError::Exhausted { .. })));
    assert_eq!(second.v4("v4", "x").await, "10.4.0.0");
    assert_eq!(second.v4("v4", "y").await, "10.4.0.1");
    second.del("x").await;
    assert_eq!(second.v4("v4", "z").await, "10.4.0.2");
    assert_eq!(second.metric("coil_ipam_used_addresses", "v4"), 2);
    assert_eq!(second.metric("coil_ipam_free_addresses", "v4"), 2);
    assert_eq!(first.metric("coil_ipam_blocks", "default"), 2);
}

#[tokio::test]
async fn a54_a_restart_keeps_what_the_kernel_holds() {
    let cluster = cluster();
    let node = Node::start(&cluster, "n1", vec![]);
    for container in ["a", "b", "c"] {
        node.add("default", container).await.unwrap();
    }
    node.add("v4", "d").await.unwrap();
    assert_eq!(cluster.blocks("n1").len(), 3);
    node.crash().await;
    let kept = found("a", "default", Some("10.2.0.0"), Some("fd02::200"));
    let node = Node::start(&cluster, "n1", vec![kept.clone()]);
    node.until("release", || cluster.blocks("n1") == ["default-0"]).await;
    node.until("export", || node.routes.routes() == ["10.2.0.0/31", "fd02::200/127"]).await;
    assert_eq!(node.add("default", "a").await.unwrap(), kept.assigned);
    assert_eq!(node.v4("default", "b").await, "10.2.0.1");
}

#[tokio::test]
async fn a55_a_reserved_block_is_kept() {
    let cluster = cluster();
    let node = Node::start(&cluster, "n1", vec![]);
    node.add("default", "a").await.unwrap();
    node.crash().await;
    cluster.state().blocks[0].1.reserved = true;
    let node = Node::start_with(&cluster, "n1", vec![], QUICK, false);
    assert_eq!(node.v4("default", "a").await, "10.2.0.2");
    node.del("a").await;
    node.until("release of the other", || cluster.blocks("n1") == ["default-0"]).await;
    node.until("export of the reserved", || node.routes.routes() == ["10.2.0.0/31", "fd02::200/127"]).await;
    // When nobody wants it any more, the next comparison gives it back.
    cluster.state().blocks[0].1.reserved = false;
    node.until("release", || cluster.blocks("n1").is_empty()).await;
}

#[tokio::test]
async fn a57_nothing_is_exported_when_all_is_free() {
    let cluster = cluster();
    let node = Node::start(&cluster, "n1", vec![]);
    node.add("default", "a").await.unwrap();
    node.until("export", || node.routes.routes().len() == 2).await;
    node.del("a").await;
    // Routes go first, so that nobody sends here what is another node's by then.
    node.until("release", || cluster.blocks("n1").is_empty()).await;
    assert!(node.routes.routes().is_empty());
}

#[tokio::test]
async fn a58_addresses_are_had_without_an_export() {
    let cluster = cluster();
    let service = IpamService::new(
        IpamOptions { node: "n1".into(), pace: PACE, clear_routes_on_shutdown: true },
        vec![],
        IpamMetrics::register(&Registry::new()).unwrap(),
    );
    let (api, news) = cluster.node("n1");
    let drain = Drain::new();
    let task = tokio::spawn(service.clone().run(api, NoExport, news, drain.clone()));
    service.allocate("default", &owner("a")).await.unwrap();
    service.free(&owner("a")).await.unwrap();
    while !cluster.blocks("n1").is_empty() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    cluster.state().node_is_gone = true;
    drain.cancel();
    task.await.unwrap().unwrap();
}

/// A node with one route, stopped; its routes then, and how often they were written meanwhile.
async fn routes_after_shutdown(flag: bool, gone: bool, away: bool) -> (usize, usize) {
    let cluster = cluster();
    let node = Node::start_with(&cluster, "n1", vec![], PACE, flag);
    node.add("v4", "a").await.unwrap();
    node.until("export", || node.routes.routes().len() == 1).await;
    let (routes, before) = (node.routes.clone(), node.routes.exports());
    cluster.state().node_is_gone = gone;
    cluster.state().away = away;
    node.stop().await;
    (routes.routes().len(), routes.exports() - before)
}

#[tokio::test]
async fn a88_the_routes_of_a_deleted_node_are_cleared_once() {
    assert_eq!(routes_after_shutdown(true, true, false).await, (0, 1));
}

#[tokio::test]
async fn a89_the_routes_of_a_node_that_exists_stay() {
    assert_eq!(routes_after_shutdown(true, false, false).await, (1, 0));
    // Nobody knows whether it exists.
    assert_eq!(routes_after_shutdown(true, true, true).await, (1, 0));
}

#[tokio::test]
async fn a90_routes_stay_unless_asked_for() {
    assert_eq!(routes_after_shutdown(false, true, false).await, (1, 0));
}

#[tokio::test]
async fn a_hundred_at_once_share_requests() {
    let cluster = Cluster::default();
    let nets: Vec<String> = (0..8).map(|index| format!("10.5.{index}.0/28")).collect();
    let nets: Vec<_> = nets.iter().map(|net| (Some(net.as_str()), None)).collect();
    cluster.pool("many", &nets);
    let node = Node::start(&cluster, "n1", vec![]);
    let adds = (0..100).map(|number| {
        let service = node.service.clone();
        async move { service.allocate("many", &owner(&number.to_string())).await.unwrap() }
    });
    let all = futures::future::join_all(adds).await;
    let addresses: BTreeSet<_> = all.iter().map(|assigned| assigned.ipv4).collect();
    assert_eq!(addresses.len(), 100);
    assert_eq!((cluster.blocks("n1").len(), cluster.calls("request")), (7, 7));
    assert_eq!(node.metric("coil_ipam_used_addresses", "many"), 100);
    assert_eq!(node.metric("coil_ipam_free_addresses", "many"), 12);
    for number in 0..100 {
        node.del(&number.to_string()).await;
    }
    node.until("release of all", || cluster.blocks("n1").is_empty()).await;
    assert_eq!(node.metric("coil_ipam_blocks", "many"), 0);
}

#[tokio::test]
async fn blocks_at_hand_are_enough_while_the_api_server_is_away() {
    let cluster = cluster();
    let node = Node::start_with(&cluster, "n1", vec![], QUICK, false);
    assert_eq!(node.v4("v4", "a").await, "10.4.0.0");
    cluster.state().away = true;
    // One pod after the other; the block is empty for long enough again and again, but it is not given up.
    for address in ["10.4.0.1", "10.4.0.2", "10.4.0.3", "10.4.0.0"].iter().cycle().take(20) {
        let before = cluster.calls("block");
        node.del("a").await;
        node.until("attempt to give it back", || cluster.calls("block") > before).await;
        assert_eq!(node.v4("v4", "a").await, *address);
    }
    // What needs a new block fails, for now, and says why.
    let error = node.add("default", "b").await.unwrap_err();
    let IpamError::Timeout { source: Some(cause), .. } = &error else { panic!("{error:?}") };
    assert!(error.is_transient() && cause.to_string().contains("away"), "{cause}");
    cluster.state().away = false;
    assert_eq!(node.v4("default", "b").await, "10.2.0.0");
    assert!(node.metric("coil_ipam_errors_total", "block") > 0);
}

#[tokio::test]
async fn a_start_while_the_api_server_is_away() {
    let cluster = cluster();
    cluster.state().away = true;
    let node = Node::start_with(&cluster, "n1", vec![found("a", "v4", Some("10.4.0.0"), None)], QUICK, false);
    let error = node.add("default", "b").await.unwrap_err();
    assert!(matches!(error, IpamError::NotReady { source: Some(_) }) && error.is_transient(), "{error:?}");
    assert!(node.routes.exports() == 0, "what is exported stays");
    // DEL goes on, and one that comes now counts.
    node.del("a").await;
    cluster.state().away = false;
    timeout(DEADLINE, node.service.ready()).await.unwrap();
    assert_eq!(node.metric("coil_ipam_stray_owners", ""), 0);
    assert_eq!(node.v4("default", "b").await, "10.2.0.0");
}

#[tokio::test]
async fn pools_that_are_unknown_or_being_deleted() {
    let cluster = cluster();
    let node = Node::start(&cluster, "n1", vec![]);
    let error = node.add("nothing", "a").await.unwrap_err();
    assert!(matches!(error, IpamError::UnknownPool { .. }) && !error.is_transient(), "{error:?}");
    assert!(matches!(node.add("a/b", "a").await, Err(IpamError::Name { .. })));
    assert!(matches!(node.add(&"x".repeat(64), "a").await, Err(IpamError::Name { .. })));
    assert_eq!(cluster.calls("request"), 0);
    cluster.pool("nothing", &[(Some("10.7.0.0/32"), None)]);
    assert_eq!(node.v4("nothing", "a").await, "10.7.0.0");
    // There are addresses at hand, but nothing is handed out any more; who has one keeps it.
    let a = node.add("v4", "a2").await.unwrap();
    cluster.delete_pool("v4");
    tokio::task::yield_now().await;
    let error = timeout(DEADLINE, async {
        loop {
            match node.add("v4", "b").await {
                Ok(_) => node.del("b").await,
                Err(error) => break error,
            }
            tokio::task::yield_now().await;
        }
    });
    let error = error.await.unwrap();
    assert!(matches!(error, IpamError::PoolDeleted { .. }) && !error.is_transient(), "{error:?}");
    assert_eq!(node.add("v4", "a2").await.unwrap(), a);
    node.del("a2").await;
    node.until("release", || !cluster.blocks("n1").contains(&"v4-0".to_owned())).await;
}

#[tokio::test]
async fn a_deletion_without_an_answer_may_have_been_carried_out() {
    let cluster = cluster();
    let first = Node::start(&cluster, "n1", vec![]);
    first.add("default", "a").await.unwrap();
    first.add("default", "b").await.unwrap();
    first.del("a").await;
    first.del("b").await;
    cluster.state().lose_answers = true;
    first.until("deletion", || cluster.blocks("n1").is_empty()).await;
    // The block is another node's now, whatever the first one believes.
    let second = Node::start(&cluster, "n2", vec![]);
    let theirs: Vec<_> = [second.v4("default", "x").await, second.v4("default", "y").await].into();
    let ours: Vec<_> = [first.v4("default", "c").await, first.v4("default", "d").await].into();
    assert_eq!(
        (theirs, ours),
        (vec!["10.2.0.0".into(), "10.2.0.1".into()], vec!["10.2.0.2".into(), "10.2.0.3".into()])
    );
    cluster.state().lose_answers = false;
    first.until("certainty", || first.metric("coil_ipam_blocks", "default") == 1).await;
    second.del("x").await;
    second.del("y").await;
    second.until("release", || cluster.blocks("n2").is_empty()).await;
}

#[tokio::test]
async fn a_deletion_that_fails_is_tried_again_until_it_holds() {
    let cluster = cluster();
    let node = Node::start(&cluster, "n1", vec![]);
    node.add("v4", "a").await.unwrap();
    cluster.state().fail_releases = true;
    node.del("a").await;
    node.until("attempts", || cluster.calls("release") > 5).await;
    // DEL again, and a later pod: nobody's address is freed.
    node.del("a").await;
    assert_eq!(node.v4("v4", "b").await, "10.4.0.4", "of another block");
    node.del("a").await;
    assert_eq!(node.metric("coil_ipam_used_addresses", "v4"), 1);
    cluster.state().fail_releases = false;
    node.until("release", || cluster.blocks("n1") == ["v4-1"]).await;
}

#[tokio::test]
async fn requests_from_before_a_crash() {
    for answered in [false, true] {
        let cluster = cluster();
        cluster.state().no_controller = !answered;
        let node = Node::start(&cluster, "n1", vec![]);
        // Dies as soon as the request is made.
        let add = {
            let service = node.service.clone();
            tokio::spawn(async move { service.allocate("v4", &owner("a")).await })
        };
        node.until("request", || cluster.calls("request") > 0).await;
        node.crash().await;
        add.abort();
        cluster.start_controller();
        let node = Node::start(&cluster, "n1", vec![]);
        assert!(node.v4("v4", "b").await.starts_with("10.4.0."));
        node.until("one block", || cluster.blocks("n1").len() == 1).await;
        node.until("no request", || cluster.state().requests.is_empty()).await;
        node.del("b").await;
        node.until("no block", || cluster.blocks("n1").is_empty()).await;
    }
}

#[tokio::test]
async fn a_block_that_another_takes_away_is_not_used() {
    let cluster = cluster();
    let node = Node::start_with(&cluster, "n1", vec![], QUICK, false);
    assert_eq!(node.v4("v4", "a").await, "10.4.0.0");
    cluster.state().blocks.clear();
    node.until("notice", || node.metric("coil_ipam_stray_owners", "") == 1).await;
    node.until("withdrawn routes", || node.routes.routes().is_empty()).await;
    // The index is carved again, for us: the address in use is not handed out.
    assert_eq!(node.v4("v4", "b").await, "10.4.0.1");
    assert_eq!(node.metric("coil_ipam_stray_owners", ""), 0);
}

#[tokio::test]
async fn who_waits_is_told_when_the_agent_ends() {
    let cluster = cluster();
    cluster.state().no_controller = true;
    let node = Node::start(&cluster, "n1", vec![]);
    let add = {
        let service = node.service.clone();
        tokio::spawn(async move { service.allocate("v4", &owner("a")).await })
    };
    node.until("request", || !cluster.state().requests.is_empty()).await;
    let before = Instant::now();
    node.stop().await;
    let error = add.await.unwrap().unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    assert!(before.elapsed() < Duration::from_secs(1));
}
