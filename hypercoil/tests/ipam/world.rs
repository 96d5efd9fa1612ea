//! A cluster in memory around the real decisions: the controller's book of pools and blocks, and the core of
//! each node's agent. The API server, the kernels and the time between a question and its answer are here;
//! what happens when is chosen by whoever drives it.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use coil_agent::ipam::block::Range;
use coil_agent::ipam::core::{Core, Done, Effect, Pace, PoolChange, Released, Step};
use coil_agent::ipam::demand::{Answer, RequestView};
use coil_agent::ipam::ledger::BlockView;
use coil_agent::ipam::watch::News;
use coil_agent::ipam::{Assigned, Cause, Found, Owner};
use coil_controller::plan::ipam::{Book, Choice, Refusal};
use ipnet::IpNet;
use serde_json::{Value, json};
use tokio::time::Instant;

/// How an effect goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Luck {
    /// It is carried out and answered.
    Good,
    /// It is carried out, and the answer is lost.
    Unheard,
    /// It is not carried out.
    Refused,
    /// Of several steps, only the first is carried out.
    Half,
}

#[derive(Clone)]
struct Pool {
    uid: String,
    bits: u32,
    subnets: Vec<(&'static str, Option<&'static str>)>,
    deleted: bool,
}

#[derive(Clone)]
struct Block {
    node: String,
    request: String,
    view: BlockView,
}

struct Request {
    node: String,
    view: RequestView,
}

/// What the controller's watches have not told yet.
enum Event {
    Pool(Value),
    PoolGone(String),
    Block(Value),
    BlockGone(String, String),
}

/// A node.
pub(crate) struct Node {
    pub(crate) name: String,
    /// Whether its object exists.
    pub(crate) exists: bool,
    core: Option<Core>,
    /// Interfaces with their addresses.
    pub(crate) kernel: BTreeMap<Owner, Assigned>,
    exported: BTreeSet<IpNet>,
    flying: Vec<Effect>,
    answers: Vec<Done>,
    news: VecDeque<News>,
    waits: Vec<(String, Owner, u64)>,
    /// Pools of which the agent was told that they are being deleted.
    told_deleted: BTreeSet<String>,
}

pub(crate) struct World {
    now: Instant,
    count: u64,
    pools: BTreeMap<String, Pool>,
    blocks: BTreeMap<String, Block>,
    requests: BTreeMap<String, Request>,
    pub(crate) nodes: Vec<Node>,
    book: Book,
    events: VecDeque<Event>,
    /// Deletions that were sent by agents that have died since: name, UID and version.
    late: Vec<(String, String, String)>,
}

pub(crate) const POOLS: [&str; 2] = ["default", "v4"];

#[derive(Debug)]
struct Away;
impl std::fmt::Display for Away {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("away")
    }
}
impl std::error::Error for Away {}

fn addresses(assigned: &Assigned) -> impl Iterator<Item = IpAddr> + use<> {
    assigned.ipv4.map(IpAddr::V4).into_iter().chain(assigned.ipv6.map(IpAddr::V6))
}

impl World {
    pub(crate) fn new(nodes: usize) -> Self {
        let nodes = (0..nodes).map(|number| Node {
            name: format!("n{number}"),
            exists: true,
            core: None,
            kernel: BTreeMap::new(),
            exported: BTreeSet::new(),
            flying: Vec::new(),
            answers: Vec::new(),
            news: VecDeque::new(),
            waits: Vec::new(),
            told_deleted: BTreeSet::new(),
        });
        let mut world = Self {
            now: Instant::now(),
            count: 0,
            pools: BTreeMap::new(),
            blocks: BTreeMap::new(),
            requests: BTreeMap::new(),
            nodes: nodes.collect(),
            book: Book::default(),
            events: VecDeque::new(),
            late: Vec::new(),
        };
        for pool in POOLS {
            world.make_pool(pool);
        }
        for node in 0..world.nodes.len() {
            world.restart(node);
        }
        world
    }

    fn next(&mut self) -> String {
        self.count += 1;
        self.count.to_string()
    }

    // --- Pools.

    pub(crate) fn make_pool(&mut self, name: &str) {
        if self.pools.contains_key(name) {
            return;
        }
        let (bits, subnets) = match name {
            "default" => (1, vec![("10.2.0.0/29", Some("fd02::200/125"))]),
            _ => (0, vec![("10.4.0.0/30", None)]),
        };
        let pool = Pool { uid: self.next(), bits, subnets, deleted: false };
        self.pools.insert(name.to_owned(), pool);
        self.pool_changed(name);
    }

    pub(crate) fn grow_pool(&mut self, name: &str) {
        let Some(pool) = self.pools.get_mut(name).filter(|pool| pool.subnets.len() == 1) else { return };
        pool.subnets.push(match name {
            "default" => ("10.3.0.0/30", Some("fd02::300/126")),
            _ => ("10.5.0.0/31", None),
        });
        self.pool_changed(name);
    }

    pub(crate) fn delete_pool(&mut self, name: &str) {
        let Some(pool) = self.pools.get_mut(name) else { return };
        pool.deleted = true;
        self.pool_changed(name);
        self.finish_pools();
    }

    fn pool_changed(&mut self, name: &str) {
        self.events.push_back(Event::Pool(self.pool_object(name)));
        let deleted = self.pools[name].deleted;
        for node in &mut self.nodes {
            node.news.push_back(News::Pools(PoolChange::Apply(name.to_owned(), deleted)));
        }
    }

    /// The controller removes the finalizer of pools without blocks, which it lists.
    fn finish_pools(&mut self) {
        let names: Vec<String> = self.pools.keys().cloned().collect();
        for name in names {
            let used = self.blocks.values().any(|block| block.view.pool == name);
            if self.pools[&name].deleted && !used {
                self.pools.remove(&name);
                self.events.push_back(Event::PoolGone(name.clone()));
                for node in &mut self.nodes {
                    node.news.push_back(News::Pools(PoolChange::Delete(name.clone())));
                }
            }
        }
    }

    fn pool_object(&self, name: &str) -> Value {
        let pool = &self.pools[name];
        let subnets: Vec<Value> = pool
            .subnets
            .iter()
            .map(|(ipv4, ipv6)| match ipv6 {
                Some(ipv6) => json!({ "ipv4": ipv4, "ipv6": ipv6 }),
                None => json!({ "ipv4": ipv4 }),
            })
            .collect();
        let deleted = pool.deleted.then_some("2026-01-01T00:00:00Z");
        json!({
            "metadata": { "name": name, "uid": pool.uid, "deletionTimestamp": deleted },
            "spec": { "blockSizeBits": pool.bits, "subnets": subnets },
        })
    }

    // --- Blocks.

    fn block_object(block: &Block) -> Value {
        let mut nets = block.view.range.nets();
        let (ipv4, ipv6) = (nets.next().map(|net| net.to_string()), nets.next().map(|net| net.to_string()));
        json!({
            "metadata": { "name": block.view.name, "uid": block.view.uid, "labels": {
                "coil.cybozu.com/pool": block.view.pool, "coil.cybozu.com/node": block.node,
                "coil.cybozu.com/request": block.request,
            } },
            "index": block.view.index, "ipv4": ipv4, "ipv6": ipv6,
        })
    }

    fn remove_block(&mut self, name: &str) {
        if let Some(block) = self.blocks.remove(name) {
            self.events.push_back(Event::BlockGone(name.to_owned(), block.view.uid));
            self.finish_pools();
        }
    }

    /// Somebody reserves the n-th block, or does not need it any more.
    pub(crate) fn toggle_reserved(&mut self, n: usize) {
        let version = self.next();
        let count = self.blocks.len().max(1);
        if let Some(block) = self.blocks.values_mut().nth(n % count) {
            block.view.reserved = !block.view.reserved;
            block.view.version = version;
        }
    }

    // --- The controller.

    /// Its watches tell one thing.
    pub(crate) fn tell_controller(&mut self) -> bool {
        match self.events.pop_front() {
            Some(Event::Pool(object)) => drop(self.book.apply_pool(serde_json::from_value(object).unwrap())),
            Some(Event::PoolGone(name)) => drop(self.book.remove_pool(&name)),
            Some(Event::Block(object)) => self.book.apply_block(&serde_json::from_value(object).unwrap()),
            Some(Event::BlockGone(name, uid)) => drop(self.book.remove_block(&name, &uid)),
            None => return false,
        }
        true
    }

    /// Another replica leads.
    pub(crate) fn new_leader(&mut self) {
        self.book = Book::default();
        self.events.clear();
        for name in self.pools.keys().cloned().collect::<Vec<_>>() {
            self.book.apply_pool(serde_json::from_value(self.pool_object(&name)).unwrap());
        }
        for block in self.blocks.values() {
            self.book.apply_block(&serde_json::from_value(Self::block_object(block)).unwrap());
        }
    }

    /// It answers one request, or dies before it has written the answer.
    pub(crate) fn answer(&mut self, n: usize, dies: bool) -> bool {
        let pending: Vec<String> = self
            .requests
            .iter()
            .filter(|(_, request)| request.view.answer == Answer::Pending)
            .map(|(name, _)| name.clone())
            .collect();
        let Some(name) = pending.get(n % pending.len().max(1)) else { return false };
        let (node, view) = (self.requests[name].node.clone(), self.requests[name].view.clone());
        let answer = self.choose(&node, &view);
        if dies {
            self.new_leader();
            return true;
        }
        let request = self.requests.get_mut(name).unwrap();
        request.view.answer = answer;
        let told = News::Request(request.view.clone());
        if let Some(node) = self.nodes.iter_mut().find(|other| other.name == node) {
            node.news.push_back(told);
        }
        true
    }

    fn choose(&mut self, node: &str, request: &RequestView) -> Answer {
        let pool = &request.pool;
        loop {
            // As it does, each time.
            if self.pools.contains_key(pool) {
                self.book.apply_pool(serde_json::from_value(self.pool_object(pool)).unwrap());
            } else {
                self.book.remove_pool(pool);
            }
            match self.book.choose(pool, &request.uid) {
                Choice::Existing(block) => return Answer::Block(block),
                Choice::Refuse(Refusal::OutOfBlocks(_) | Refusal::BeingDeleted(_)) => {
                    return Answer::Exhausted;
                }
                Choice::Refuse(refusal) => return Answer::Refused(refusal.to_string()),
                Choice::Create { index, nets, .. } => {
                    let name = format!("{pool}-{index}");
                    let made = !self.blocks.contains_key(&name);
                    if made {
                        let view = BlockView {
                            name: name.clone(),
                            uid: self.next(),
                            version: self.next(),
                            index: i32::try_from(index).unwrap(),
                            pool: pool.clone(),
                            range: Range::of(nets).unwrap(),
                            reserved: false,
                            deleted: false,
                        };
                        let block = Block { node: node.to_owned(), request: request.uid.clone(), view };
                        self.events.push_back(Event::Block(Self::block_object(&block)));
                        self.blocks.insert(name.clone(), block);
                    }
                    let object = Self::block_object(&self.blocks[&name]);
                    self.book.apply_block(&serde_json::from_value(object).unwrap());
                    self.book.settle(pool, index);
                    if made {
                        return Answer::Block(name);
                    }
                }
            }
        }
    }

    /// It collects what nodes that are gone have left, long after.
    pub(crate) fn collect(&mut self) {
        let gone: Vec<String> =
            self.nodes.iter().filter(|node| !node.exists).map(|node| node.name.clone()).collect();
        let names: Vec<String> =
            self.blocks.values().filter(|b| gone.contains(&b.node)).map(|b| b.view.name.clone()).collect();
        names.iter().for_each(|name| self.remove_block(name));
    }

    // --- Nodes.

    /// The agent starts, from what the kernel holds.
    fn restart(&mut self, n: usize) {
        let pools: BTreeMap<String, bool> =
            self.pools.iter().map(|(name, pool)| (name.clone(), pool.deleted)).collect();
        let name = self.nodes[n].name.clone();
        let requests: Vec<News> = self
            .requests
            .values()
            .filter(|request| request.node == name)
            .map(|request| News::Request(request.view.clone()))
            .collect();
        let node = &mut self.nodes[n];
        let found = node
            .kernel
            .iter()
            .map(|(owner, assigned)| Found { owner: owner.clone(), assigned: assigned.clone() });
        node.core = Some(Core::new(found, Pace::default()));
        node.flying.clear();
        node.answers.clear();
        node.waits.clear();
        node.told_deleted.clear();
        node.news = [News::Pools(PoolChange::Reset(pools))].into_iter().chain(requests).collect();
    }

    /// The agent dies, and starts again; what it had asked for is carried out, or not, or later.
    pub(crate) fn crash(&mut self, n: usize, mut luck: u32) {
        if self.nodes[n].core.is_none() {
            return;
        }
        for effect in std::mem::take(&mut self.nodes[n].flying) {
            match (luck % 4, effect) {
                (0, effect) => drop(self.perform(n, effect, Luck::Good)),
                (1, effect) => drop(self.perform(n, effect, Luck::Half)),
                (2, Effect::Release(view)) => {
                    if let Some(block) = self.blocks.get(&view.name) {
                        self.late.push((view.name, view.uid, block.view.version.clone()));
                    }
                }
                _ => {}
            }
            luck = luck.rotate_right(2);
        }
        self.restart(n);
    }

    /// The node starts anew.
    pub(crate) fn reboot(&mut self, n: usize, luck: u32) {
        self.crash(n, luck);
        if self.nodes[n].exists {
            self.nodes[n].kernel.clear();
            self.nodes[n].exported.clear();
            self.restart(n);
        }
    }

    /// The machine is gone for good, with its object.
    pub(crate) fn lose(&mut self, n: usize, luck: u32) {
        self.reboot(n, luck);
        let node = &mut self.nodes[n];
        (node.exists, node.core) = (false, None);
        let name = node.name.clone();
        self.requests.retain(|_, request| request.node != name);
    }

    /// A new machine of the same name.
    pub(crate) fn join(&mut self, n: usize) {
        if !self.nodes[n].exists {
            self.nodes[n].exists = true;
            self.restart(n);
        }
    }

    /// A deletion arrives whose sender has died.
    pub(crate) fn arrive_late(&mut self) {
        let Some((name, uid, version)) = self.late.pop() else { return };
        let next = self.next();
        if let Some(block) = self.blocks.get_mut(&name)
            && block.view.uid == uid
            && block.view.version == version
        {
            block.view.deleted = true;
            block.view.version = next;
        }
    }

    pub(crate) fn add(&mut self, n: usize, pool: &str, container: &str, dies: bool) {
        let owner =
            Owner { container_id: format!("{}-{container}", self.nodes[n].name), ifname: "eth0".into() };
        let now = self.now;
        let Some(core) = &mut self.nodes[n].core else { return };
        match core.allocate(pool, &owner, None, now) {
            Step::Given(assigned) if dies => {
                drop(assigned);
                self.crash(n, 0);
            }
            Step::Given(assigned) => self.wire(n, owner, assigned),
            Step::Refused(_) => {}
            Step::Wait => {
                let node = &mut self.nodes[n];
                if !node.waits.iter().any(|(_, other, _)| *other == owner) {
                    let mark = node.core.as_mut().unwrap().wait(pool);
                    node.waits.push((pool.to_owned(), owner, mark));
                }
            }
        }
    }

    fn wire(&mut self, n: usize, owner: Owner, assigned: Assigned) {
        if let Some(had) = self.nodes[n].kernel.get(&owner) {
            assert_eq!(*had, assigned, "asked twice, answered differently");
            return;
        }
        assert!(
            !self.nodes[n].told_deleted.contains(&assigned.pool),
            "an address of a pool that is being deleted"
        );
        self.nodes[n].kernel.insert(owner, assigned);
    }

    pub(crate) fn del(&mut self, n: usize, which: usize, dies: bool) {
        let count = self.nodes[n].kernel.len().max(1);
        let Some(owner) = self.nodes[n].kernel.keys().nth(which % count).cloned() else { return };
        self.nodes[n].kernel.remove(&owner);
        if dies {
            self.crash(n, 0);
        } else if let Some(core) = &mut self.nodes[n].core {
            core.free(&owner, self.now);
        }
    }

    /// Callers give up.
    pub(crate) fn give_up(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        for (pool, ..) in std::mem::take(&mut node.waits) {
            if let Some(core) = &mut node.core {
                core.wait_no_more(&pool);
            }
        }
    }

    /// Everybody looks at what has changed.
    pub(crate) fn settle(&mut self) {
        for n in 0..self.nodes.len() {
            for (pool, owner, mark) in std::mem::take(&mut self.nodes[n].waits) {
                let Some(core) = &mut self.nodes[n].core else { break };
                match core.allocate(&pool, &owner, Some(mark), self.now) {
                    Step::Wait => {
                        self.nodes[n].waits.push((pool, owner, mark));
                        continue;
                    }
                    Step::Given(assigned) => {
                        core.wait_no_more(&pool);
                        self.wire(n, owner, assigned);
                    }
                    Step::Refused(_) => core.wait_no_more(&pool),
                }
            }
            let now = self.now;
            let node = &mut self.nodes[n];
            if let Some(core) = &mut node.core {
                node.flying.extend(core.due(now));
            }
        }
    }

    /// One effect of a node is carried out.
    pub(crate) fn fly(&mut self, n: usize, which: usize, luck: Luck) -> bool {
        let count = self.nodes[n].flying.len();
        if count == 0 {
            return false;
        }
        let effect = self.nodes[n].flying.swap_remove(which % count);
        let done = self.perform(n, effect, luck);
        self.nodes[n].answers.push(done);
        true
    }

    /// One answer arrives.
    pub(crate) fn hear(&mut self, n: usize, which: usize) -> bool {
        let count = self.nodes[n].answers.len();
        if count == 0 {
            return false;
        }
        let done = self.nodes[n].answers.swap_remove(which % count);
        let now = self.now;
        self.nodes[n].core.as_mut().unwrap().done(done, now);
        true
    }

    /// One piece of news arrives.
    pub(crate) fn learn(&mut self, n: usize) -> bool {
        let now = self.now;
        let node = &mut self.nodes[n];
        let (Some(core), Some(news)) = (&mut node.core, node.news.pop_front()) else { return false };
        match news {
            News::Pools(change) => {
                match &change {
                    PoolChange::Reset(pools) => {
                        node.told_deleted = pools
                            .iter()
                            .filter(|(_, deleted)| **deleted)
                            .map(|(name, _)| name.clone())
                            .collect();
                    }
                    PoolChange::Apply(name, true) => drop(node.told_deleted.insert(name.clone())),
                    PoolChange::Apply(name, false) => drop(node.told_deleted.remove(name)),
                    PoolChange::Delete(_) => {}
                }
                core.pools(change, now);
            }
            News::Request(view) => core.request_seen(view, now),
            News::RequestGone(view) => core.request_gone(&view.pool, &view.uid),
        }
        true
    }

    fn perform(&mut self, n: usize, effect: Effect, luck: Luck) -> Done {
        let told = |luck: Luck| match luck {
            Luck::Good => Ok(()),
            _ => Err(Cause::new(Away)),
        };
        let does = luck != Luck::Refused;
        let node = self.nodes[n].name.clone();
        let ours = |block: &&Block| block.node == node;
        match effect {
            Effect::List { mark } => {
                let views = self.blocks.values().filter(ours).map(|block| block.view.clone()).collect();
                Done::Listed(mark, told(luck).map(|()| views))
            }
            Effect::Pool(name) => {
                let found = self.pools.get(&name).map(|pool| pool.deleted);
                Done::Pool(name, told(luck).map(|()| found))
            }
            Effect::Request(pool) => {
                let name = format!("req-{pool}-{node}");
                let created = !self.requests.contains_key(&name);
                if created && does {
                    let view = RequestView {
                        name: name.clone(),
                        uid: self.next(),
                        pool: pool.clone(),
                        answer: Answer::Pending,
                    };
                    self.nodes[n].news.push_back(News::Request(view.clone()));
                    self.requests.insert(name.clone(), Request { node, view });
                }
                let view = self.requests.get(&name).map(|request| request.view.clone());
                Done::Requested(pool, told(luck).map(|()| (view.unwrap(), created)))
            }
            Effect::Poll { pool, name } => {
                let view = self.requests.get(&name).map(|request| request.view.clone());
                Done::Polled(pool, told(luck).map(|()| view))
            }
            Effect::Fetch { pool, block } => {
                let view = self.blocks.get(&block).filter(ours).map(|block| block.view.clone());
                Done::Fetched(pool, told(luck).map(|()| view))
            }
            Effect::Inspect(view) => {
                let found = self.blocks.get(&view.name).filter(ours).map(|block| block.view.clone());
                Done::Inspected(view.uid, told(luck).map(|()| found))
            }
            Effect::Forget { pool, name, uid } => {
                if does && self.requests.get(&name).is_some_and(|request| request.view.uid == uid) {
                    let request = self.requests.remove(&name).unwrap();
                    self.nodes[n].news.push_back(News::RequestGone(request.view));
                }
                Done::Forgotten(pool, told(luck))
            }
            Effect::Release(view) => {
                let mut outcome = Released::Gone;
                if does {
                    let version = self.next();
                    let found = self.blocks.get_mut(&view.name);
                    if let Some(block) =
                        found.filter(|block| block.view.uid == view.uid && block.node == node)
                    {
                        if block.view.reserved && !block.view.deleted {
                            outcome = Released::Kept(block.view.clone());
                        } else {
                            let first = !block.view.deleted;
                            (block.view.deleted, block.view.version) = (true, version);
                            if luck != Luck::Half || !first {
                                self.remove_block(&view.name);
                            }
                        }
                    }
                }
                Done::Released(view.uid, told(luck).map(|()| outcome))
            }
            Effect::Export(wanted) => {
                match luck {
                    Luck::Refused => {}
                    // Removals come first.
                    Luck::Half => self.nodes[n].exported.retain(|net| wanted.contains(net)),
                    _ => self.nodes[n].exported = wanted.clone(),
                }
                Done::Exported(wanted, told(luck))
            }
        }
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    /// What must hold at any time.
    pub(crate) fn check(&self) {
        let mut owners: BTreeMap<IpAddr, &Owner> = BTreeMap::new();
        for node in &self.nodes {
            for (owner, assigned) in &node.kernel {
                for address in addresses(assigned) {
                    if let Some(other) = owners.insert(address, owner) {
                        panic!("{address} is {owner}'s and {other}'s");
                    }
                    let of_node =
                        |block: &Block| block.node == node.name && block.view.range.offset(address).is_some();
                    assert!(
                        self.blocks.values().any(of_node),
                        "{address} of {owner} is in no block of {}",
                        node.name
                    );
                }
            }
            for net in &node.exported {
                let other = self.blocks.values().find(|block| {
                    block.node != node.name && block.view.range.nets().any(|other| other == *net)
                });
                if let Some(other) = other {
                    panic!("{} exports {net}, which is {}'s", node.name, other.node);
                }
            }
        }
    }

    /// Everything works, and time passes, until nothing happens any more.
    fn quiesce(&mut self) {
        for _ in 0..40 {
            for n in 0..self.nodes.len() {
                self.give_up(n);
            }
            for _ in 0..200 {
                self.settle();
                let mut moved = false;
                for n in 0..self.nodes.len() {
                    while self.learn(n) {
                        moved = true;
                    }
                    while self.fly(n, 0, Luck::Good) {
                        moved = true;
                    }
                    while self.hear(n, 0) {
                        moved = true;
                    }
                }
                while self.answer(0, false) {
                    moved = true;
                }
                while self.tell_controller() {}
                self.check();
                if !moved {
                    break;
                }
            }
            // More than any pause, and now and then a comparison with the API.
            self.pass(Duration::from_secs(20));
        }
    }

    /// Ends the story: nothing is left, and nothing is missing.
    pub(crate) fn end(mut self) {
        while !self.late.is_empty() {
            self.arrive_late();
        }
        self.collect();
        self.quiesce();
        assert!(self.requests.is_empty(), "requests are left: {:?}", self.requests.keys());
        for node in self.nodes.iter().filter(|node| node.exists) {
            let mine: Vec<&Block> = self.blocks.values().filter(|block| block.node == node.name).collect();
            let nets: BTreeSet<IpNet> = mine.iter().flat_map(|block| block.view.range.nets()).collect();
            assert_eq!(node.exported, nets, "routes of {}", node.name);
            for block in mine.iter().filter(|block| !block.view.reserved) {
                let mut used = node.kernel.values().flat_map(addresses);
                let used = used.any(|address| block.view.range.offset(address).is_some());
                assert!(used, "{} is kept for nothing by {}", block.view.name, node.name);
            }
            assert_eq!(node.core.as_ref().unwrap().ledger().owners().count(), node.kernel.len());
        }
        for block in self.blocks.values_mut() {
            block.view.reserved = false;
        }
        for n in 0..self.nodes.len() {
            while !self.nodes[n].kernel.is_empty() {
                self.del(n, 0, false);
            }
        }
        self.quiesce();
        assert!(self.blocks.is_empty(), "blocks are left: {:?}", self.blocks.keys());
        assert!(self.pools.values().all(|pool| !pool.deleted), "a deleted pool is left");
        assert!(self.nodes.iter().all(|node| node.exported.is_empty()));
    }
}
