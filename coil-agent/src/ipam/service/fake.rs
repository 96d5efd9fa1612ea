//! A cluster in memory: pools, blocks, requests, a controller that can be stopped, an API server that can
//! be away or lose its answers.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use ipnet::IpNet;
use tokio::sync::mpsc;

use super::super::api::BlockApi;
use super::super::core::{PoolChange, Released};
use super::super::demand::{Answer, RequestView};
use super::super::ledger::BlockView;
use super::super::testing::block;
use super::super::watch::News;
use crate::netlink::NetlinkError;
use crate::routes::Export;

#[derive(Debug, thiserror::Error)]
#[error("the API server is away")]
pub(super) struct Away;

#[derive(Default)]
pub(super) struct State {
    /// Networks of the blocks of each pool, by index, and whether it is being deleted.
    pub(super) pools: BTreeMap<String, (Vec<(Option<String>, Option<String>)>, bool)>,
    pub(super) blocks: Vec<(String, BlockView)>,
    pub(super) requests: Vec<(String, RequestView)>,
    pub(super) no_controller: bool,
    pub(super) away: bool,
    /// Deletions of blocks are carried out, but their answers are lost.
    pub(super) lose_answers: bool,
    /// Deletions of blocks are neither carried out nor answered well.
    pub(super) fail_releases: bool,
    pub(super) node_is_gone: bool,
    pub(super) calls: Vec<String>,
    count: u64,
    watchers: Vec<(String, mpsc::UnboundedSender<News>)>,
}

#[derive(Clone, Default)]
pub(super) struct Cluster(Arc<Mutex<State>>);

impl Cluster {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Makes a pool of the given blocks.
    pub(super) fn pool(&self, name: &str, blocks: &[(Option<&str>, Option<&str>)]) {
        let own = |text: &Option<&str>| text.map(str::to_owned);
        let blocks = blocks.iter().map(|(ipv4, ipv6)| (own(ipv4), own(ipv6))).collect();
        self.state().pools.insert(name.into(), (blocks, false));
        self.state().tell(&News::Pools(PoolChange::Apply(name.into(), false)));
    }

    pub(super) fn delete_pool(&self, name: &str) {
        self.state().pools.get_mut(name).unwrap().1 = true;
        self.state().tell(&News::Pools(PoolChange::Apply(name.into(), true)));
    }

    /// Lets the controller answer what it has left undone.
    pub(super) fn start_controller(&self) {
        let mut state = self.state();
        state.no_controller = false;
        state.answer_all();
    }

    /// The API for a node, and its news.
    pub(super) fn node(&self, node: &str) -> (FakeApi, BoxStream<'static, News>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut state = self.state();
        let pools = state.pools.iter().map(|(name, (_, deleted))| (name.clone(), *deleted)).collect();
        sender.send(News::Pools(PoolChange::Reset(pools))).unwrap();
        for (owner, request) in &state.requests {
            if owner == node {
                sender.send(News::Request(request.clone())).unwrap();
            }
        }
        state.watchers.push((node.into(), sender));
        let news = stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.map(|news| (news, receiver))
        });
        (FakeApi { cluster: self.clone(), node: node.into() }, news.boxed())
    }

    /// Names of the blocks of a node.
    pub(super) fn blocks(&self, node: &str) -> Vec<String> {
        let state = self.state();
        let mut names: Vec<_> = state
            .blocks
            .iter()
            .filter(|(owner, _)| owner == node)
            .map(|(_, view)| view.name.clone())
            .collect();
        names.sort();
        names
    }

    pub(super) fn calls(&self, what: &str) -> usize {
        self.state().calls.iter().filter(|call| *call == what).count()
    }
}

impl State {
    fn tell(&mut self, news: &News) {
        self.watchers.retain(|(node, sender)| {
            let concerned = match news {
                News::Pools(_) => true,
                News::Request(view) | News::RequestGone(view) => view.name.ends_with(&format!("-{node}")),
            };
            !concerned || sender.send(news.clone()).is_ok()
        });
    }

    fn answer_all(&mut self) {
        if self.no_controller {
            return;
        }
        for place in 0..self.requests.len() {
            let (node, mut request) = self.requests[place].clone();
            if request.answer != Answer::Pending {
                continue;
            }
            let Some((layout, deleted)) = self.pools.get(&request.pool) else {
                continue;
            };
            let free = (0_i32..).zip(layout).find(|(index, _)| {
                let name = format!("{}-{index}", request.pool);
                !deleted && !self.blocks.iter().any(|(_, view)| view.name == name)
            });
            request.answer = match free {
                Some((index, (ipv4, ipv6))) => {
                    let mut view = block(&request.pool, index, ipv4.as_deref(), ipv6.as_deref());
                    self.count += 1;
                    view.uid = format!("block-{}", self.count);
                    let answer = Answer::Block(view.name.clone());
                    self.blocks.push((node.clone(), view));
                    answer
                }
                None => Answer::Exhausted,
            };
            self.requests[place].1 = request.clone();
            self.tell(&News::Request(request));
        }
    }
}

pub(super) struct FakeApi {
    cluster: Cluster,
    node: String,
}

impl FakeApi {
    async fn call(&self, what: &str) -> Result<MutexGuard<'_, State>, Away> {
        // Others have their turn, as with a real server.
        tokio::task::yield_now().await;
        let mut state = self.cluster.state();
        state.calls.push(what.to_owned());
        if state.away { Err(Away) } else { Ok(state) }
    }
}

impl BlockApi for FakeApi {
    type Error = Away;

    async fn blocks(&self) -> Result<Vec<BlockView>, Away> {
        let state = self.call("list").await?;
        Ok(state.blocks.iter().filter(|(node, _)| *node == self.node).map(|(_, view)| view.clone()).collect())
    }

    async fn block(&self, name: &str) -> Result<Option<BlockView>, Away> {
        let state = self.call("block").await?;
        let ours = |(node, view): &&(String, BlockView)| *node == self.node && view.name == name;
        Ok(state.blocks.iter().find(ours).map(|(_, view)| view.clone()))
    }

    async fn pool(&self, name: &str) -> Result<Option<bool>, Away> {
        Ok(self.call("pool").await?.pools.get(name).map(|(_, deleted)| *deleted))
    }

    async fn request(&self, pool: &str) -> Result<(RequestView, bool), Away> {
        let mut state = self.call("request").await?;
        let name = format!("req-{pool}-{}", self.node);
        if let Some((_, request)) = state.requests.iter().find(|(_, request)| request.name == name) {
            return Ok((request.clone(), false));
        }
        state.count += 1;
        let uid = format!("request-{}", state.count);
        let request = RequestView { name, uid, pool: pool.into(), answer: Answer::Pending };
        state.requests.push((self.node.clone(), request.clone()));
        // The watch may well be faster than the answer.
        state.tell(&News::Request(request.clone()));
        state.answer_all();
        Ok((request, true))
    }

    async fn poll(&self, name: &str) -> Result<Option<RequestView>, Away> {
        let state = self.call("poll").await?;
        Ok(state
            .requests
            .iter()
            .find(|(_, request)| request.name == name)
            .map(|(_, request)| request.clone()))
    }

    async fn forget(&self, _: &str, uid: &str) -> Result<(), Away> {
        let mut state = self.call("forget").await?;
        let gone: Vec<_> = state.requests.extract_if(.., |(_, request)| request.uid == uid).collect();
        for (_, request) in gone {
            state.tell(&News::RequestGone(request));
        }
        Ok(())
    }

    async fn release(&self, block: &BlockView) -> Result<Released, Away> {
        let mut state = self.call("release").await?;
        if state.fail_releases {
            return Err(Away);
        }
        if let Some((_, view)) = state.blocks.iter().find(|(_, view)| view.uid == block.uid)
            && view.reserved
        {
            return Ok(Released::Kept(view.clone()));
        }
        state.blocks.retain(|(_, view)| view.uid != block.uid);
        if state.lose_answers { Err(Away) } else { Ok(Released::Gone) }
    }

    async fn node_exists(&self) -> Result<bool, Away> {
        Ok(!self.call("node").await?.node_is_gone)
    }
}

/// Exported routes in memory.
#[derive(Clone, Default)]
pub(super) struct FakeRoutes(Arc<Mutex<(BTreeSet<IpNet>, usize)>>);

impl FakeRoutes {
    pub(super) fn routes(&self) -> Vec<String> {
        self.0.lock().unwrap().0.iter().map(ToString::to_string).collect()
    }

    pub(super) fn exports(&self) -> usize {
        self.0.lock().unwrap().1
    }
}

impl Export for FakeRoutes {
    async fn export(&self, wanted: &BTreeSet<IpNet>) -> Result<(), NetlinkError> {
        let mut routes = self.0.lock().unwrap();
        routes.0 = wanted.clone();
        routes.1 += 1;
        Ok(())
    }
}
