//! `monitor`: drops and new flows as they happen.
//!
//! The one command that writes: it says in `listeners` until when it listens, and renews that. The ring of
//! each datapath has one reader, so one monitor runs on a node at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use aya::maps::{Array, Map, MapData, MapError, RingBuf};
use coil_common::events::{
    EVENT_DROP, EVENT_FLOW, Event, EventBudget, HOOK_FROM_POD, HOOK_GATEWAY, HOOK_TO_POD, Listener,
};
use coil_common::keys::{FlowKey4, FlowKey6};
use coil_common::names::{MAP_EVENT_BUDGETS, MAP_EVENTS, MAP_LISTENERS, PIN_LISTENER};
use serde::Serialize;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::args::{Format, Monitor};
use super::conntrack::Tuple;
use super::drops::{description, name};
use super::node::{Node, open};
use super::state::protocol;
use super::{InspectError, Outcome, output, packet};
use crate::datapath::internal::{ReadMap, current};
use crate::datapath::seconds_since_boot;

/// The datapath is told so often that somebody listens, and believes it for so long.
const RENEW: Duration = Duration::from_secs(1);
const PATIENCE: u32 = 5;

/// An event as it is printed.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Item {
    /// RFC 3339, to the second.
    time: String,
    /// `drop` or `flow`.
    event: &'static str,
    /// `node`, or the name of an egress pod.
    r#where: String,
    /// The program.
    program: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pod: Option<String>,
    protocol: String,
    source: String,
    destination: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u32>,
    /// Ends of the tunnel that the packet was in.
    #[serde(skip_serializing_if = "Option::is_none")]
    tunnel: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    egress: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<IpAddr>,
    /// What the world sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    seen_as: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Lost<'a> {
    event: &'static str,
    r#where: &'a str,
    /// `drop` or `flow`.
    kind: &'static str,
    count: u64,
}

/// The only listener of a node, as long as it lives.
struct Lock(#[expect(dead_code, reason = "held")] File);

fn lock(folder: &Path) -> Result<Lock, InspectError> {
    let path = folder.join(PIN_LISTENER);
    std::fs::create_dir_all(&path).map_err(InspectError::pin("create", &path))?;
    let file = File::open(&path).map_err(InspectError::pin("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(TryLockError::WouldBlock) => Err(InspectError::Busy),
        Err(TryLockError::Error(error)) => Err(InspectError::pin("lock", &path)(error)),
    }
}

/// The ring of one datapath.
struct Ring {
    label: String,
    ring: AsyncFd<RingFd>,
    listeners: Array<MapData, Listener>,
    budgets: Option<ReadMap>,
    lost: [u64; 2],
    folder: PathBuf,
}

/// A ring that can be waited for.
struct RingFd(RingBuf<MapData>);

impl AsRawFd for RingFd {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

fn map_error(operation: &'static str, path: &Path) -> impl FnOnce(MapError) -> InspectError {
    let path = path.to_path_buf();
    move |error| {
        let source = match error {
            MapError::SyscallError(error) => error.io_error,
            MapError::IoError(error) => error,
            other => std::io::Error::other(other),
        };
        InspectError::pin(operation, &path)(source)
    }
}

impl Ring {
    /// Opens the ring of a folder of maps; `None` if its datapath has none.
    fn open(folder: &Path, label: &str) -> Result<Option<Self>, InspectError> {
        let (events, listeners) = (current(folder, MAP_EVENTS), current(folder, MAP_LISTENERS));
        // Checks the layout too.
        if open::<u32, Listener>(folder, MAP_LISTENERS)?.is_none() || !events.exists() {
            return Ok(None);
        }
        let ring = MapData::from_pin(&events)
            .and_then(Map::from_map_data)
            .and_then(RingBuf::try_from)
            .map_err(map_error("open", &events))?;
        let listeners = MapData::from_pin(&listeners)
            .and_then(Map::from_map_data)
            .and_then(Array::try_from)
            .map_err(map_error("open", &listeners))?;
        let budgets = open::<u32, EventBudget>(folder, MAP_EVENT_BUDGETS)?;
        let mut ring = RingFd(ring);
        // What an earlier listener has left.
        while ring.0.next().is_some() {}
        // SAFETY: the ring owns its map's descriptor, which stays the same one as long as the ring lives.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }
            .map_err(|error| InspectError::pin("wait for", &events)(error.into_parts().1))?;
        let mut ring = Self {
            label: label.to_owned(),
            ring,
            listeners,
            budgets,
            lost: [0; 2],
            folder: folder.to_path_buf(),
        };
        ring.lost = ring.read_lost();
        Ok(Some(ring))
    }

    fn listen(&mut self, kinds: u32, until: u32) -> Result<(), InspectError> {
        let path = self.folder.join(MAP_LISTENERS);
        self.listeners.set(0, Listener { kinds, until }, 0).map_err(map_error("write", &path))
    }

    fn read_lost(&self) -> [u64; 2] {
        [0, 1].map(|index| {
            let budgets = self.budgets.as_ref().and_then(|map| map.per_cpu::<EventBudget>(index).ok());
            budgets.unwrap_or_default().iter().map(|budget| budget.lost).sum()
        })
    }

    /// Everything that is in the ring.
    fn drain(
        &mut self,
        mut show: impl FnMut(&str, &Event) -> Result<(), InspectError>,
    ) -> Result<(), InspectError> {
        while let Some(item) = self.ring.get_mut().0.next() {
            if let Ok(event) = bytemuck::try_pod_read_unaligned::<Event>(&item) {
                show(&self.label, &event)?;
            }
        }
        Ok(())
    }

    async fn readable(&self) -> std::io::Result<()> {
        let mut guard = self.ring.readable().await?;
        guard.clear_ready();
        Ok(())
    }
}

/// Runs the command.
pub(crate) async fn run(
    root: &Path,
    node: Node,
    format: Format,
    options: &Monitor,
) -> Result<Outcome, InspectError> {
    let Monitor { drops, flows, pod, count, duration } = options;
    let kinds = match (drops, flows) {
        (true, _) => EVENT_DROP,
        (_, true) => EVENT_FLOW,
        _ => EVENT_DROP | EVENT_FLOW,
    };
    let only: Option<Vec<IpAddr>> = match pod {
        None => None,
        Some(super::args::PodRef::Address(address)) => Some(vec![*address]),
        Some(wanted) => Some(node.pod(wanted)?.addresses().collect()),
    };
    let _lock = lock(&node.folder)?;
    let mut listening =
        Listening { rings: BTreeMap::new(), names: Names { node }, format, only, left: *count };
    listening.open_rings()?;
    if listening.rings.is_empty() {
        return Err(InspectError::NoEvents);
    }
    let end = duration.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let result = listening.listen(root, kinds, end).await;
    for ring in listening.rings.values_mut() {
        // If that fails nobody listens in a few seconds anyway.
        if let Err(error) = ring.listen(0, 0) {
            tracing::debug!(%error, "cannot say that nobody listens any more");
        }
    }
    result.map(|()| Outcome::Done)
}

struct Listening {
    /// By folder.
    rings: BTreeMap<PathBuf, Ring>,
    names: Names,
    format: Format,
    only: Option<Vec<IpAddr>>,
    /// Events still to show.
    left: Option<u64>,
}

impl Listening {
    /// Opens rings that have come, and forgets those that have gone; true if any came.
    fn open_rings(&mut self) -> Result<bool, InspectError> {
        let node = &self.names.node;
        let mut there = BTreeSet::from([node.folder.clone()]);
        let mut wanted = vec![(node.folder.clone(), "node".to_owned())];
        for gateway in node.list_gateways()? {
            there.insert(gateway.folder.clone());
            wanted.push((gateway.folder, gateway.label));
        }
        self.rings.retain(|folder, _| there.contains(folder));
        let mut came = false;
        for (folder, label) in wanted {
            if self.rings.contains_key(&folder) {
                continue;
            }
            match Ring::open(&folder, &label) {
                Ok(Some(ring)) => {
                    came = true;
                    self.rings.insert(folder, ring);
                }
                Ok(None) => {}
                // An egress pod that ends, or of another build.
                Err(error) if label != "node" => tracing::debug!(%error, label, "cannot listen"),
                Err(error) => return Err(error),
            }
        }
        Ok(came)
    }

    fn renew(&mut self, kinds: u32) -> Result<(), InspectError> {
        let now = seconds_since_boot().map_err(|_| InspectError::System {
            what: "the clock",
            source: std::io::ErrorKind::Other.into(),
        })?;
        for ring in self.rings.values_mut() {
            ring.listen(kinds, now.saturating_add(PATIENCE))?;
        }
        Ok(())
    }

    async fn listen(&mut self, root: &Path, kinds: u32, end: Option<Instant>) -> Result<(), InspectError> {
        self.renew(kinds)?;
        let labels: Vec<&str> = self.rings.values().map(|ring| ring.label.as_str()).collect();
        // Not part of the stream.
        eprintln!("listening: {}", labels.join(", "));
        let mut tick = tokio::time::interval(RENEW);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tick.tick().await;
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
            .map_err(|source| InspectError::System { what: "signals", source })?;
        while self.left != Some(0) && end.is_none_or(|end| Instant::now() < end) {
            let ready = {
                let waits = self.rings.values().map(|ring| Box::pin(ring.readable()));
                let any = futures::future::select_all(waits);
                tokio::select! {
                    (result, ..) = any => {
                        result.map_err(|source| InspectError::System { what: "events", source })?;
                        Some(true)
                    }
                    _ = tick.tick() => Some(false),
                    _ = tokio::signal::ctrl_c() => None,
                    _ = terminate.recv() => None,
                }
            };
            match ready {
                None => break,
                Some(true) => {}
                Some(false) => {
                    self.names.refresh(root).await;
                    self.open_rings()?;
                    self.renew(kinds)?;
                    self.show_lost()?;
                }
            }
            self.drain()?;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), InspectError> {
        let Self { rings, names, format, only, left } = self;
        for ring in rings.values_mut() {
            ring.drain(|label, event| {
                if *left == Some(0) {
                    return Ok(());
                }
                let Some((item, about)) = names.item(label, event) else { return Ok(()) };
                if only.as_ref().is_some_and(|only| !only.contains(&about.src) && !only.contains(&about.dst))
                {
                    return Ok(());
                }
                if let Some(left) = left {
                    *left -= 1;
                }
                print(&item, *format)
            })?;
        }
        Ok(())
    }

    fn show_lost(&mut self) -> Result<(), InspectError> {
        for ring in self.rings.values_mut() {
            let lost = ring.read_lost();
            for (kind, (new, old)) in ["drop", "flow"].into_iter().zip(lost.into_iter().zip(ring.lost)) {
                let count = new.saturating_sub(old);
                if count == 0 {
                    continue;
                }
                let label = ring.label.as_str();
                if self.format == Format::Json {
                    output::json_line(&Lost { event: "lost", r#where: label, kind, count })?;
                } else {
                    output::line(&format!(
                        "          lost  {label}: {count} more events ({kind}) than can be shown"
                    ))?;
                }
            }
            ring.lost = lost;
        }
        Ok(())
    }
}

/// Names of what events are about.
struct Names {
    node: Node,
}

impl Names {
    /// Looks again for pods and gateways that have come.
    async fn refresh(&mut self, root: &Path) {
        match Node::open(root).await {
            Ok(node) => self.node = node,
            Err(error) => tracing::debug!(%error, "cannot read names again"),
        }
    }

    fn item(&self, label: &str, event: &Event) -> Option<(Item, Tuple)> {
        let captured = event.head.get(..usize::from(event.captured))?;
        let program = match event.hook {
            HOOK_FROM_POD => "from_pod",
            HOOK_TO_POD => "to_pod",
            HOOK_GATEWAY => "gateway",
            _ => "unknown",
        };
        let mut item = Item {
            time: time(event.time),
            event: if event.kind == EVENT_DROP { "drop" } else { "flow" },
            r#where: label.to_owned(),
            program,
            pod: None,
            protocol: String::new(),
            source: String::new(),
            destination: String::new(),
            reason: None,
            description: None,
            bytes: None,
            tunnel: None,
            egress: None,
            gateway: None,
            seen_as: None,
        };
        let about = if event.kind == EVENT_DROP {
            let seen = packet::read(captured, u16::from_be_bytes(self.node.config.fou_port))?;
            item.reason = Some(name(event.reason));
            item.description = Some(description(event.reason));
            item.bytes = Some(event.length);
            item.tunnel =
                seen.inner.map(|_| format!("{} -> {}", seen.outer.source(), seen.outer.destination()));
            *seen.about()
        } else {
            let tuple = if event.family == 4 {
                Tuple::v4(&bytemuck::try_pod_read_unaligned::<FlowKey4>(captured).ok()?)
            } else {
                Tuple::v6(&bytemuck::try_pod_read_unaligned::<FlowKey6>(captured).ok()?)
            };
            if event.hook == HOOK_GATEWAY {
                let [a, b, c, d, ..] = event.addr;
                let address = if event.family == 4 { IpAddr::from([a, b, c, d]) } else { event.addr.into() };
                item.seen_as = Some(tuple.end(address, u16::from_be_bytes(event.port)));
            } else {
                item.egress = Some(self.node.egress_label(event.egress));
                item.gateway = self.node.gateway_address(event.gateway, event.family == 6);
            }
            tuple
        };
        let pod = self.node.pod_with(about.src).or_else(|| self.node.pod_with(about.dst));
        item.pod = pod.map(super::node::Pod::label);
        item.protocol = protocol(about.protocol);
        item.source = about.source();
        item.destination = about.destination();
        Some((item, about))
    }
}

/// Wall clock of a time since boot.
fn time(since_boot: u32) -> String {
    let ago = seconds_since_boot().map_or(0, |now| now.saturating_sub(since_boot));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    rfc3339(now.saturating_sub(u64::from(ago)))
}

/// Seconds since 1970 as text.
fn rfc3339(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March, in eras of 400 of them.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + era * 400 + carry;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest % 3600 / 60, rest % 60)
}

fn print(item: &Item, format: Format) -> Result<(), InspectError> {
    if format == Format::Json {
        return output::json_line(item);
    }
    let clock = item.time.get(11..19).unwrap_or_default();
    let pod = item.pod.as_deref().unwrap_or("-");
    let flow = format!("{} {} -> {}", item.protocol, item.source, item.destination);
    let text = match (&item.reason, &item.seen_as) {
        (Some(reason), _) => {
            let bytes = item.bytes.unwrap_or(0);
            let mut text = format!(
                "{clock}  drop  {}/{} {pod}  {flow}  {bytes} bytes  {reason}",
                item.r#where, item.program
            );
            if let Some(tunnel) = &item.tunnel {
                text.push_str(&format!("  in tunnel {tunnel}"));
            }
            if format == Format::Wide {
                text.push_str(&format!("  ({})", item.description.as_deref().unwrap_or_default()));
            }
            text
        }
        (None, Some(seen)) => {
            format!("{clock}  flow  {}/{} {pod}  {flow}  seen as {seen}", item.r#where, item.program)
        }
        (None, None) => {
            let gateway = item.gateway.map_or_else(|| "?".to_owned(), |address| address.to_string());
            format!(
                "{clock}  flow  {}/{} {pod}  {flow}  through {} at {gateway}",
                item.r#where,
                item.program,
                item.egress.as_deref().unwrap_or("?")
            )
        }
    };
    output::line(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_795_253_645, "2026-11-21T09:34:05Z"),
        ] {
            assert_eq!(rfc3339(seconds), text);
        }
    }
}
