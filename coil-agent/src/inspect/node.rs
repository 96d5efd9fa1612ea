//! What the pinned maps say about this node: pods, Egresses, gateways, under names that people use.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use bytemuck::AnyBitPattern;
use coil_common::config::Config;
use coil_common::names;
use coil_common::values::{
    ConfigValue, EGRESS_DELETED, EgressNameValue, EgressValue, GATEWAY_DRAINING, GATEWAY_READY, GatewayValue,
    PodNameValue, PodValue,
};

use super::InspectError;
use super::args::PodRef;
use crate::datapath::internal::{ReadMap, boot_seed, current, decode_egress_name, text};
use crate::datapath::timeouts::Timeouts;
use crate::desired::EgressName;
use crate::local::{ALIAS_PREFIX, parse_alias};
use crate::netlink::{Netlink, RtNetlink};

/// A pod of this node.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    /// Index of its host-side interface.
    pub(crate) ifindex: u32,
    /// What the datapath knows.
    pub(crate) value: PodValue,
    /// Its UID, if anybody has told.
    pub(crate) uid: Option<String>,
    /// Its namespace and name, if anybody has told.
    pub(crate) name: Option<(String, String)>,
}

impl Pod {
    /// What to call it.
    pub(crate) fn label(&self) -> String {
        match (&self.name, &self.uid) {
            (Some((namespace, name)), _) => format!("{namespace}/{name}"),
            (None, Some(uid)) => uid.clone(),
            (None, None) => format!("interface {}", self.ifindex),
        }
    }

    /// Its addresses.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        let v4 = (self.value.ipv4 != [0; 4]).then(|| IpAddr::from(self.value.ipv4));
        let v6 = (self.value.ipv6 != [0; 16]).then(|| IpAddr::from(self.value.ipv6));
        [v4, v6].into_iter().flatten()
    }

    fn is(&self, wanted: &PodRef) -> bool {
        match wanted {
            PodRef::Name(namespace, name) => {
                self.name.as_ref().is_some_and(|(ns, n)| ns == namespace && n == name)
            }
            PodRef::Address(address) => self.addresses().any(|own| own == *address),
            PodRef::Word(word) => {
                self.uid.as_ref() == Some(word) || self.name.as_ref().is_some_and(|(_, name)| name == word)
            }
        }
    }
}

/// An egress pod on this node.
#[derive(Clone, Debug)]
pub(crate) struct Gateway {
    /// Name of its folder of pins: its UID.
    pub(crate) uid: String,
    /// The folder.
    pub(crate) folder: PathBuf,
    /// How its program was configured.
    pub(crate) config: Option<Config>,
    /// What to call it.
    pub(crate) label: String,
}

impl Gateway {
    /// Its addresses.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        let Some(config) = &self.config else { return Vec::new() };
        let v4 = (config.ipv4 != [0; 4]).then(|| IpAddr::from(config.ipv4));
        let v6 = (config.ipv6 != [0; 16]).then(|| IpAddr::from(config.ipv6));
        [v4, v6].into_iter().flatten().collect()
    }

    fn is(&self, wanted: &str) -> bool {
        self.uid == wanted
            || self.label == wanted
            || wanted.parse().is_ok_and(|address: IpAddr| self.addresses().contains(&address))
    }
}

/// The datapath of this node as its maps show it.
#[derive(Debug)]
pub(crate) struct Node {
    /// Folder of the node's maps.
    pub(crate) folder: PathBuf,
    /// How its programs were configured.
    pub(crate) config: Config,
    /// Pods, by index of their interface.
    pub(crate) pods: BTreeMap<u32, Pod>,
    /// Names of Egresses, by id.
    pub(crate) egress_names: BTreeMap<u32, EgressName>,
    /// Egresses by index, only those in use.
    pub(crate) egresses: BTreeMap<u32, EgressValue>,
    /// Gateways by slot, gone ones included.
    pub(crate) gateways: BTreeMap<u32, GatewayValue>,
    /// Egress pods on this node.
    pub(crate) local_gateways: Vec<Gateway>,
}

/// Folder of the maps that this program reads.
pub(crate) fn folder(root: &Path) -> Result<PathBuf, InspectError> {
    let folder = root.join(format!("v{}", coil_common::ABI_VERSION));
    match folder.try_exists() {
        Ok(true) => return Ok(folder),
        Ok(false) => {}
        Err(error) => return Err(InspectError::pin("look at", &folder)(error)),
    }
    let others = abi_folders(root)?;
    if others.is_empty() {
        Err(InspectError::NothingPinned { root: root.to_path_buf() })
    } else {
        Err(InspectError::OtherAbi { root: root.to_path_buf(), found: others.join(", ") })
    }
}

/// Names of the folders of all versions.
pub(crate) fn abi_folders(root: &Path) -> Result<Vec<String>, InspectError> {
    let mut found = subfolders(root)?;
    found.retain(|name| {
        name.strip_prefix('v')
            .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
    });
    Ok(found)
}

/// Names of folders in a folder, which need not exist.
pub(crate) fn subfolders(folder: &Path) -> Result<Vec<String>, InspectError> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(InspectError::pin("list", folder))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(InspectError::pin("list", folder))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir())
            && let Some(name) = entry.file_name().to_str()
        {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Opens a map, if it is there, and checks that its keys and values are those that this program knows.
pub(crate) fn open<K, V>(folder: &Path, map: &str) -> Result<Option<ReadMap>, InspectError> {
    let path = current(folder, map);
    let opened = match ReadMap::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(InspectError::pin("open", &path))?,
    };
    let info = opened.info();
    for (what, found, wanted) in
        [("keys", info.key_size, size_of::<K>()), ("values", info.value_size, size_of::<V>())]
    {
        if usize::try_from(found) != Ok(wanted) {
            return Err(InspectError::Layout { path, what, found, wanted });
        }
    }
    Ok(Some(opened))
}

/// All entries of a map; none if there is no such map.
pub(crate) fn read<K: AnyBitPattern, V: AnyBitPattern>(
    folder: &Path,
    map: &str,
) -> Result<Vec<(K, V)>, InspectError> {
    match open::<K, V>(folder, map)? {
        None => Ok(Vec::new()),
        Some(opened) => opened.typed().map_err(InspectError::pin("read", &folder.join(map))),
    }
}

/// The configuration that programs were loaded with, if it is of this build.
fn config(folder: &Path) -> Result<Option<Config>, InspectError> {
    let entries = read::<u32, ConfigValue>(folder, names::MAP_CONFIG)?;
    let size = size_of::<Config>();
    Ok(entries.first().and_then(|(_, value)| {
        (usize::try_from(value.size) == Ok(size))
            .then(|| bytemuck::try_pod_read_unaligned(value.bytes.get(..size)?).ok())
            .flatten()
    }))
}

impl Node {
    /// Reads everything but flows and policies.
    pub(crate) async fn open(root: &Path) -> Result<Self, InspectError> {
        let folder = folder(root)?;
        let names: BTreeMap<u32, PodNameValue> = read(&folder, names::MAP_POD_NAMES)?.into_iter().collect();
        let mut pods = BTreeMap::new();
        for (ifindex, value) in read::<u32, PodValue>(&folder, names::MAP_PODS)? {
            let name = names.get(&ifindex);
            let uid = name.map(|name| text(&name.uid));
            let name = name.map(|name| (text(&name.namespace), text(&name.name)));
            pods.insert(ifindex, Pod { ifindex, value, uid, name });
        }
        if pods.values().any(|pod| pod.uid.is_none()) {
            let aliases = aliases().await;
            for pod in pods.values_mut().filter(|pod| pod.uid.is_none()) {
                pod.uid = aliases.get(&pod.ifindex).cloned();
            }
        }
        let config = match config(&folder)? {
            Some(config) => config,
            // Pinned by an older coild: its defaults.
            None => Config {
                fou_port: 5555u16.to_be_bytes(),
                seed: boot_seed().map_err(|_| InspectError::System {
                    what: "the boot id",
                    source: io::ErrorKind::NotFound.into(),
                })?,
                timeouts: Timeouts::default().seconds(),
                ..Config::default()
            },
        };
        let egress_names: BTreeMap<u32, EgressName> =
            read::<u32, EgressNameValue>(&folder, names::MAP_EGRESS_NAMES)?
                .into_iter()
                .filter_map(|(id, value)| Some((id, decode_egress_name(&value)?)))
                .collect();
        let egresses = read::<u32, EgressValue>(&folder, names::MAP_EGRESSES)?
            .into_iter()
            .filter(|(index, _)| egress_names.contains_key(&(index / 2)))
            .collect();
        let gateways = read::<u32, GatewayValue>(&folder, names::MAP_GATEWAYS)?
            .into_iter()
            .filter(|(_, value)| *value != GatewayValue::default())
            .collect();
        let mut node =
            Self { folder, config, pods, egress_names, egresses, gateways, local_gateways: Vec::new() };
        node.local_gateways = node.list_gateways()?;
        Ok(node)
    }

    /// Egress pods on this node as they are now.
    pub(crate) fn list_gateways(&self) -> Result<Vec<Gateway>, InspectError> {
        let root = self.folder.join(names::PIN_EGRESS);
        let mut gateways = Vec::new();
        for uid in subfolders(&root)? {
            let folder = root.join(&uid);
            let config = config(&folder)?;
            let mut gateway = Gateway { label: uid.clone(), uid, folder, config };
            let addresses = gateway.addresses();
            let pod = self.pods.values().find(|pod| {
                pod.uid.as_ref() == Some(&gateway.uid) || pod.addresses().any(|own| addresses.contains(&own))
            });
            if let Some(pod) = pod {
                gateway.label = pod.label();
            }
            gateways.push(gateway);
        }
        Ok(gateways)
    }

    /// The pod that is meant.
    pub(crate) fn pod(&self, wanted: &PodRef) -> Result<&Pod, InspectError> {
        let mut found = self.pods.values().filter(|pod| pod.is(wanted));
        match (found.next(), found.next()) {
            (Some(pod), None) => Ok(pod),
            _ => Err(InspectError::NoPod { wanted: wanted.clone(), known: self.known_pods() }),
        }
    }

    fn known_pods(&self) -> String {
        let labels: Vec<String> = self.pods.values().map(Pod::label).collect();
        if labels.is_empty() { "none".into() } else { labels.join(", ") }
    }

    /// The egress pods that are meant.
    pub(crate) fn gateways_like(&self, wanted: Option<&str>) -> Result<Vec<&Gateway>, InspectError> {
        let Some(wanted) = wanted else {
            return Ok(self.local_gateways.iter().collect());
        };
        let found: Vec<&Gateway> = self.local_gateways.iter().filter(|gateway| gateway.is(wanted)).collect();
        if found.is_empty() {
            let labels: Vec<&str> =
                self.local_gateways.iter().map(|gateway| gateway.label.as_str()).collect();
            let known = if labels.is_empty() { "none".into() } else { labels.join(", ") };
            return Err(InspectError::NoGateway { wanted: wanted.into(), known });
        }
        Ok(found)
    }

    /// The pod with an address.
    pub(crate) fn pod_with(&self, address: IpAddr) -> Option<&Pod> {
        self.pods.values().find(|pod| pod.addresses().any(|own| own == address))
    }

    /// The egress pod on this node with an address.
    pub(crate) fn gateway_with(&self, address: IpAddr) -> Option<&Gateway> {
        self.local_gateways.iter().find(|gateway| gateway.addresses().contains(&address))
    }

    /// Name of the Egress at an index.
    pub(crate) fn egress_name(&self, index: u32) -> Option<&EgressName> {
        self.egress_names.get(&(index / 2))
    }

    /// Name of the Egress at an index, for people.
    pub(crate) fn egress_label(&self, index: u32) -> String {
        match self.egress_name(index) {
            Some(name) => format!("{}/{}", name.namespace, name.name),
            None => format!("#{}", index / 2),
        }
    }

    /// The Egress at an index is deleted, and some pod still names it.
    pub(crate) fn is_deleted(&self, index: u32) -> bool {
        self.egresses.get(&index).is_some_and(|egress| egress.flags & EGRESS_DELETED != 0)
    }

    /// Address of the gateway in a slot.
    pub(crate) fn gateway_address(&self, slot: u32, v6: bool) -> Option<IpAddr> {
        self.gateways.get(&slot).map(|value| gateway_address(value, v6))
    }
}

/// Address of a gateway.
pub(crate) fn gateway_address(value: &GatewayValue, v6: bool) -> IpAddr {
    let [a, b, c, d, ..] = value.addr;
    if v6 { IpAddr::from(value.addr) } else { IpAddr::from([a, b, c, d]) }
}

/// State of a gateway.
pub(crate) fn gateway_state(value: &GatewayValue) -> &'static str {
    match value.state {
        GATEWAY_READY => "ready",
        GATEWAY_DRAINING => "draining",
        _ => "gone",
    }
}

/// UIDs that interfaces of this name space remember; none if it cannot be asked.
async fn aliases() -> BTreeMap<u32, String> {
    let Ok(netlink) = RtNetlink::new() else { return BTreeMap::new() };
    let links = netlink.links_with_alias(ALIAS_PREFIX).await.unwrap_or_default();
    links
        .into_iter()
        .filter_map(|link| {
            let (uid, _) = parse_alias(link.alias.as_deref()?)?;
            Some((link.index, uid.to_owned()))
        })
        .collect()
}
