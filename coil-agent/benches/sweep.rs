//! What a walk of a gateway's collector through a million translations costs, of one core.
//!
//! `cargo xtask bench sweep` runs this, as root, in name spaces of its own. Prints one JSON object a line: name,
//! value, unit, goal, ok.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use coil_agent::datapath::timeouts::Timeouts;
use coil_agent::datapath::{IcmpLimit, seconds_since_boot};
use coil_agent::gateway::args::PodAddresses;
use coil_agent::gateway::datapath::{GatewayDatapath, GatewayOptions, Quotas};
use coil_agent::gateway::ports::{NatPorts, PortSet};
use coil_common::keys::FlowKey4;
use coil_common::names::{MAP_NAT_FORWARD_V4, MAP_NAT_REVERSE_V4};
use coil_common::values::{NatValue4, STATE_CONFIRMED, STATE_REPLY, STATE_SYN};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::time::{ClockId, clock_gettime};

const FLOWS: u32 = 1_000_000;
/// Ports that each client has, towards a port of the world of its own.
const PORTS: u32 = 62_500;
/// Walks whose median is told.
const WALKS: usize = 5;
/// Entries looked at in one go, as `coil-egress` does.
const SLICE: usize = 262_144;
/// Seconds of one core.
const GOAL: f64 = 1.0;
/// The loopback interface, which every name space has.
const LOOPBACK: u32 = 1;

fn main() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .context("making name spaces: are you root?")?;
    let nothing: Option<&str> = None;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?;
    let root = Path::new("/sys/fs/bpf");
    mount(Some("bpf"), root, Some("bpf"), MsFlags::empty(), nothing).context("mounting a BPF file system")?;
    let own = Ipv4Addr::new(192, 0, 2, 1);
    let mut datapath = GatewayDatapath::open(&GatewayOptions {
        bpffs_root: root.to_owned(),
        pin_name: "sweep".into(),
        addresses: PodAddresses { v4: Some(own), v6: None },
        fou_port: 5555,
        icmp: IcmpLimit::default(),
        source_port_auto: false,
        ports: NatPorts {
            range: 1024..=64_511,
            identifiers: 0..=u16::MAX,
            excluded: PortSet::of([5555, 8080, 8081]),
        },
        ifindex: LOOPBACK,
        mtu: 1500,
        max_nat: 1 << 20,
        redirect_peer: false,
        quotas: Quotas::default(),
        address_only: false,
        pick_up: false,
        timeouts: Timeouts::default(),
    })?;
    let folder = root.join("v1/egress/sweep");
    for (what, idle) in [("in use", 0), ("idle for a minute", 60)] {
        fill(&folder, own, idle).with_context(|| format!("filling the tables under {}", folder.display()))?;
        let mut walks = (0..WALKS).map(|_| walk(&mut datapath)).collect::<Result<Vec<_>>>()?;
        walks.sort();
        let seconds = walks[WALKS / 2].as_secs_f64();
        println!(
            "{}",
            serde_json::json!({
                "name": format!("walk through {FLOWS} translations, {what}"),
                "value": seconds,
                "unit": "s of one core",
                "goal": format!("<= {GOAL}"),
                "ok": seconds <= GOAL,
            })
        );
    }
    Ok(())
}

/// Puts established connections in both tables of which nothing was seen for so many seconds.
fn fill(folder: &Path, own: Ipv4Addr, idle: u32) -> Result<()> {
    let table = |name: &str| -> Result<HashMap<MapData, FlowKey4, NatValue4>> {
        Ok(Map::HashMap(MapData::from_pin(folder.join(name))?).try_into()?)
    };
    let (mut forward, mut reverse) = (table(MAP_NAT_FORWARD_V4)?, table(MAP_NAT_REVERSE_V4)?);
    let last_seen = seconds_since_boot()?.saturating_sub(idle);
    let world = [203, 0, 113, 1];
    for number in 0..FLOWS {
        let port = u16::try_from(1024 + number % PORTS)?.to_be_bytes();
        let client = [10, 1, 0, u8::try_from(number / PORTS)?];
        let remote = u16::try_from(1 + number / PORTS)?.to_be_bytes();
        let key = FlowKey4 {
            src: client,
            dst: world,
            src_port: port,
            dst_port: remote,
            protocol: 6,
            ..FlowKey4::default()
        };
        let back = FlowKey4 { src: world, dst: own.octets(), src_port: remote, dst_port: port, ..key };
        let value = |addr, state| NatValue4 {
            addr,
            port,
            state,
            last_seen,
            created: last_seen,
            packets: 1,
            ..NatValue4::default()
        };
        forward.insert(key, value(own.octets(), STATE_SYN | STATE_CONFIRMED), 0)?;
        reverse.insert(back, value(client, STATE_REPLY), 0)?;
    }
    Ok(())
}

/// Time of this thread for a walk.
fn walk(datapath: &mut GatewayDatapath) -> Result<Duration> {
    let cpu = || Ok::<_, nix::Error>(Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?));
    let now = seconds_since_boot()?;
    let before = cpu()?;
    while !datapath.collector.sweep(now, SLICE)? {}
    let taken = cpu()?.saturating_sub(before);
    let left = datapath.collector.entries();
    ensure!(left == u64::from(FLOWS), "{left} translations are left");
    Ok(taken)
}
