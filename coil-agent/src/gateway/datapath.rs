//! The gateway's program and maps in the kernel.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

use aya::maps::{HashMap, MapData};
use aya::programs::{ProgramFd, ProgramInfo};
use coil_common::config::{
    CONFIG_ADDRESS_ONLY, CONFIG_PICK_UP, CONFIG_REDIRECT_PEER, CONFIG_SOURCE_PORT_AUTO, Config,
};
use coil_common::keys::{ClientKey4, ClientKey6};
use coil_common::names;
use coil_common::values::ClientValue;

use super::args::PodAddresses;
use super::clients::difference;
use super::collect::NatCollector;
use super::ports::{NatPorts, PortKeeper};
use crate::datapath::internal::{
    Attachable, Hook, IfUnmounted, Loaded, PinFolder, absent_is_fine, boot_seed, cut, cut_datagrams, load,
};
use crate::datapath::timeouts::Timeouts;
use crate::datapath::{DatapathError, IcmpLimit, LoadError, MapAccessError, Role};

/// How a gateway's datapath is opened.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// Folder for pins, on a BPF file system; one is mounted there if need be.
    pub bpffs_root: PathBuf,
    /// Name of the folder of pins.
    pub pin_name: String,
    /// Addresses of the pod, which translation uses.
    pub addresses: PodAddresses,
    /// UDP port of FOU.
    pub fou_port: u16,
    /// The outer source port of replies follows the flow.
    pub source_port_auto: bool,
    /// Ports for translation.
    pub ports: NatPorts,
    /// Index of the interface.
    pub ifindex: u32,
    /// Its MTU.
    pub mtu: u32,
    /// Translations of one family that fit.
    pub max_nat: u32,
    /// Packets go to the other end of the interface at once; it must be a veth with its other end in
    /// another name space.
    pub redirect_peer: bool,
    /// Bounds of ICMP errors.
    pub icmp: IcmpLimit,
    /// What clients may have.
    pub quotas: Quotas,
    /// Protocols without ports are translated by address alone.
    pub address_only: bool,
    /// TCP from the middle of an unknown connection makes a translation.
    pub pick_up: bool,
    /// How long idle translations are kept.
    pub timeouts: Timeouts,
}

/// What clients of a gateway may have; 0 for no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quotas {
    /// Translations of one family of one client.
    pub client_flows: u32,
    /// Translations of one client to one address and port.
    pub client_ports: u32,
}

/// Of so many parts of the table one is kept free of new translations: it fills to 90 %.
const RESERVE: u32 = 10;

/// Translations beyond which a table for `max` of them admits no new ones.
pub(crate) const fn admitted(max: u32) -> u32 {
    max - max / RESERVE
}

/// Bits if they are wanted.
const fn flag(wanted: bool, bits: u32) -> u32 {
    if wanted { bits } else { 0 }
}

/// The gateway's datapath.
pub struct GatewayDatapath {
    /// The allow-list.
    pub clients: ClientMaps,
    /// The collector of expired translations.
    pub collector: NatCollector,
    /// The list of ports that translation does not use.
    pub ports: PortKeeper,
    /// Where the maps are pinned.
    pub(crate) folder: PathBuf,
    /// Keeps the program loaded.
    pub(crate) loaded: Loaded,
}

impl GatewayDatapath {
    /// Loads and attaches the program, over the maps of an earlier run if there are any.
    pub fn open(options: &GatewayOptions) -> Result<Self, DatapathError> {
        let GatewayOptions {
            bpffs_root,
            pin_name,
            addresses,
            fou_port,
            source_port_auto,
            ports,
            ifindex,
            mtu,
            max_nat,
            redirect_peer,
            icmp,
            quotas,
            address_only,
            pick_up,
            timeouts,
        } = options;
        let folder = PinFolder::open(bpffs_root, IfUnmounted::Mount)?.gateway(pin_name)?;
        let mut config = Config {
            ipv4: addresses.v4.map_or([0; 4], |address| address.octets()),
            ipv6: addresses.v6.map_or([0; 16], |address| address.octets()),
            fou_port: fou_port.to_be_bytes(),
            nat_port_first: *ports.range.start(),
            nat_port_last: *ports.range.end(),
            nat_id_first: *ports.identifiers.start(),
            nat_id_last: *ports.identifiers.end(),
            mtu: *mtu,
            flags: flag(*source_port_auto, CONFIG_SOURCE_PORT_AUTO)
                | flag(*redirect_peer, CONFIG_REDIRECT_PEER)
                | flag(*address_only, CONFIG_ADDRESS_ONLY)
                | flag(*pick_up, CONFIG_PICK_UP)
                | cut(),
            seed: boot_seed()?,
            nat_admit: admitted(*max_nat),
            nat_client_flows: quotas.client_flows,
            nat_client_ports: quotas.client_ports,
            timeouts: timeouts.seconds(),
            ..Config::default()
        };
        icmp.apply(&mut config);
        let sizes = [
            names::MAP_NAT_FORWARD_V4,
            names::MAP_NAT_REVERSE_V4,
            names::MAP_NAT_FORWARD_V6,
            names::MAP_NAT_REVERSE_V6,
        ]
        .map(|map| (map, *max_nat));
        let mut loaded = load(Role::Gateway, &folder, &config, &sizes)?;
        let mut port_keeper = PortKeeper::new(&mut loaded, ports.excluded.clone())?;
        port_keeper.refresh()?;
        let program = Attachable {
            name: names::PROGRAM_GATEWAY,
            hook: Hook::Ingress,
            program: loaded.program(names::PROGRAM_GATEWAY)?,
        };
        let path = folder.join(names::PROGRAM_GATEWAY);
        let fresh = program.attach(*ifindex, &path, program.mode())?;
        loaded.finish_migration()?;
        if let Err(error) = cut_datagrams(*ifindex) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "the interface goes on taking UDP datagrams in one piece");
        }
        tracing::info!(pins = %folder.display(), adopted = !fresh, "gateway program attached");
        Ok(Self {
            clients: ClientMaps::new(&mut loaded)?,
            collector: NatCollector::new(&mut loaded, *timeouts, config.seed)?,
            ports: port_keeper,
            folder,
            loaded,
        })
    }

    /// What the kernel says about the program.
    pub fn program_info(&self) -> Result<ProgramInfo, LoadError> {
        self.loaded.program_info(names::PROGRAM_GATEWAY)
    }

    /// The program, for test runs.
    pub fn program(&self) -> Result<ProgramFd, LoadError> {
        self.loaded.program(names::PROGRAM_GATEWAY)
    }
}

/// The allow-list of clients.
pub struct ClientMaps {
    v4: HashMap<MapData, ClientKey4, ClientValue>,
    v6: HashMap<MapData, ClientKey6, ClientValue>,
    /// What the maps hold; `None` if it must be read.
    current: Option<BTreeSet<IpAddr>>,
}

impl ClientMaps {
    fn new(loaded: &mut Loaded) -> Result<Self, LoadError> {
        Ok(Self {
            v4: loaded.map(names::MAP_CLIENTS_V4)?,
            v6: loaded.map(names::MAP_CLIENTS_V6)?,
            current: None,
        })
    }

    /// Reads the maps again the next time.
    pub(crate) fn forget(&mut self) {
        self.current = None;
    }

    fn dump(&self) -> Result<BTreeSet<IpAddr>, MapAccessError> {
        let read = |map| move |source| MapAccessError { operation: "read", map, source };
        let mut addresses = BTreeSet::new();
        for key in self.v4.keys() {
            let key = key.map_err(read(names::MAP_CLIENTS_V4))?;
            addresses.insert(IpAddr::from(key.addr));
        }
        for key in self.v6.keys() {
            let key = key.map_err(read(names::MAP_CLIENTS_V6))?;
            addresses.insert(IpAddr::from(key.addr));
        }
        Ok(addresses)
    }

    /// Makes the maps hold `wanted`; more than that until the picture is complete. Returns how many
    /// addresses came and went.
    pub fn sync(
        &mut self,
        wanted: &BTreeSet<IpAddr>,
        complete: bool,
    ) -> Result<(usize, usize), MapAccessError> {
        let mut current = match self.current.take() {
            Some(current) => current,
            None => self.dump()?,
        };
        let (add, remove) = difference(&current, wanted, complete);
        for address in &add {
            self.insert(*address)?;
            current.insert(*address);
        }
        for address in &remove {
            self.remove(*address)?;
            current.remove(address);
        }
        self.current = Some(current);
        Ok((add.len(), remove.len()))
    }

    fn insert(&mut self, address: IpAddr) -> Result<(), MapAccessError> {
        let value = ClientValue::default();
        let (map, result) = match address {
            IpAddr::V4(address) => {
                let key = ClientKey4 { addr: address.octets() };
                (names::MAP_CLIENTS_V4, self.v4.insert(key, value, 0))
            }
            IpAddr::V6(address) => {
                let key = ClientKey6 { addr: address.octets() };
                (names::MAP_CLIENTS_V6, self.v6.insert(key, value, 0))
            }
        };
        result.map_err(|source| MapAccessError { operation: "write", map, source })
    }

    fn remove(&mut self, address: IpAddr) -> Result<(), MapAccessError> {
        let (map, result) = match address {
            IpAddr::V4(address) => {
                let key = ClientKey4 { addr: address.octets() };
                (names::MAP_CLIENTS_V4, self.v4.remove(&key))
            }
            IpAddr::V6(address) => {
                let key = ClientKey6 { addr: address.octets() };
                (names::MAP_CLIENTS_V6, self.v6.remove(&key))
            }
        };
        absent_is_fine(result).map_err(|source| MapAccessError {
            operation: "remove an entry of",
            map,
            source,
        })
    }
}
