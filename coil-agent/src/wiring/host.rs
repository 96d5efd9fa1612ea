//! What the node needs around its pods: forwarding, the rule that looks up the table of pods, and the largest
//! packet. Kept that way: other software removes rules that it does not know.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rtnetlink::MulticastGroup;

use super::messages::{self, FoundRoute, Interface, OUTSIDE};
use super::plan::{HostRule, choose_mtu, plan_rules};
use super::socket::Socket;
use super::veth::{by_index, write_sysctl};
use super::{Inner, Wiring, WiringError, links, open};
use crate::cni::error::causes;
use crate::netlink::Changes;

/// The node is looked at again after this time, in case that a message of the kernel was lost.
const PERIOD: Duration = Duration::from_secs(60);
/// Changes come in bursts, and whoever removes rules may not be done.
const SETTLE: Duration = Duration::from_millis(500);

/// Kernel parameters that make the node a router.
const FORWARDING: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];

/// Rules of others that have been told of, so that each is told once.
#[derive(Debug, Default)]
pub struct Told(BTreeSet<(bool, String)>);

impl Wiring {
    /// Prepares the node. What cannot be had is a warning: pods may work nevertheless, and it is tried again.
    pub async fn prepare_host(&self, told: &mut Told) {
        let mut before = std::mem::take(told);
        let after = self.on_thread(move |inner| {
            for (v6, name) in [false, true].into_iter().zip(FORWARDING) {
                if !inner.wants(v6) {
                    continue;
                }
                if let Err(error) = write_sysctl(name, "1") {
                    tracing::warn!(name, error = error.to_string(), "cannot make the node forward packets");
                }
                if let Err(error) = inner.ensure_rule(v6, &mut before) {
                    tracing::warn!(v6, error = causes(&error), "cannot set the rule for the table of pods");
                }
            }
            match inner.detect_mtu() {
                Ok(mtu) => {
                    let mtu = mtu.unwrap_or(0);
                    if inner.mtu.swap(mtu, Ordering::Relaxed) != mtu {
                        tracing::info!(mtu, "largest packet of pods that are wired from now on");
                    }
                }
                Err(error) => tracing::warn!(error = causes(&error), "cannot find the MTU of the way out"),
            }
            Ok(before)
        });
        match after.await {
            Ok(after) => *told = after,
            Err(error) => tracing::warn!(error = causes(&error), "cannot prepare the node"),
        }
    }

    /// Keeps the node prepared until the future is dropped.
    pub async fn keep_host(&self, mut told: Told) -> Result<std::convert::Infallible, WiringError> {
        let groups = [MulticastGroup::Ipv4Rule, MulticastGroup::Ipv6Rule, MulticastGroup::Link];
        let mut changes = Changes::subscribe("rules and interfaces", &groups)
            .map_err(WiringError::kernel("subscribe to changes of rules"))?;
        loop {
            self.prepare_host(&mut told).await;
            changes.next(SETTLE, PERIOD).await;
        }
    }
}

impl Inner {
    /// Whether pods of this node can have addresses of a family, as far as that is known.
    fn wants(&self, v6: bool) -> bool {
        self.node().is_none_or(|node| if v6 { node.ipv6.is_some() } else { node.ipv4.is_some() })
    }

    /// Adds the rule if it is missing; rules of others stay as they are.
    fn ensure_rule(&self, v6: bool, told: &mut Told) -> Result<(), WiringError> {
        let (priority, table) = (self.config.rule_priority, self.config.pod_table);
        let mut socket = open()?;
        let messages = socket.dump(&messages::all_rules(v6)).map_err(WiringError::dump("rules"))?;
        let rules: Vec<HostRule> = messages.iter().filter_map(messages::rule).collect();
        let plan = plan_rules(&rules, priority, table);
        told.tell(v6, &plan.foreign);
        if !plan.add {
            return Ok(());
        }
        let request = messages::add_rule(v6, priority, table, self.config.protocol);
        match socket.one(request.message, request.flags) {
            Ok(_) => {
                tracing::info!(v6, priority, table, "set the rule for the table of pods");
                Ok(())
            }
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            Err(error) => Err(WiringError::kernel(format!("add rule {priority} for table {table}"))(error)),
        }
    }

    /// The largest packet that all ways out let through.
    fn detect_mtu(&self) -> Result<Option<u32>, WiringError> {
        let mut socket = open()?;
        for address in OUTSIDE {
            let ways = ways_out(&mut socket, address)?;
            if let Some(mtu) = choose_mtu(&ways, &[]) {
                return Ok(Some(mtu));
            }
        }
        let links: Vec<_> = links(&mut socket)?.iter().map(Interface::uplink).collect();
        Ok(choose_mtu(&[], &links))
    }
}

impl Told {
    fn tell(&mut self, v6: bool, foreign: &[HostRule]) {
        let texts: BTreeSet<(bool, String)> = foreign.iter().map(|rule| (v6, format!("{rule:?}"))).collect();
        for (_, rule) in texts.difference(&self.0) {
            tracing::warn!(
                v6,
                rule,
                "another rule has the priority of ours; packets to pods that it takes do not arrive"
            );
        }
        self.0.retain(|(family, _)| *family != v6);
        self.0.extend(texts);
    }
}

/// Largest packets of the interfaces, and of the route, by which packets to an address leave.
fn ways_out(socket: &mut Socket, address: std::net::IpAddr) -> Result<Vec<u32>, WiringError> {
    let request = messages::get_route(address);
    let route = match socket.one(request.message, request.flags) {
        Ok(message) => message.as_ref().and_then(FoundRoute::of),
        // There is none, or it is one that rejects.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ESRCH | libc::EINVAL | libc::EACCES)
            ) =>
        {
            None
        }
        Err(error) => return Err(WiringError::kernel(format!("read the route to {address}"))(error)),
    };
    let Some(route) = route else {
        return Ok(Vec::new());
    };
    let mut found: Vec<u32> = route.mtu.into_iter().collect();
    for index in route.outputs {
        found.extend(by_index(socket, index)?.map(|link| link.mtu));
    }
    Ok(found)
}
