//! Makes the pair of interfaces of a pod, or nothing: runs on a thread of its own, which visits the name space of
//! the pod.
//!
//! The pair is made from the host's side with its other end in the pod, so that neither end is ever moved. All
//! else is two batches of requests, one for each end.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use netlink_packet_route::RouteNetlinkMessage;
use nix::sched::{CloneFlags, setns};

use super::error::WiringError;
use super::messages::{self, FoundRoute, Interface};
use super::plan::{self, NAMES, Plan};
use super::socket::{Answer, Request, Socket};
use super::{Config, Request as Wish, Wired};
use crate::ipam::NodeAddresses;

/// The main table of a pod.
const MAIN_TABLE: u32 = 254;
/// What the kernel notes of routes that an administrator sets.
const PROTOCOL_BOOT: u8 = 3;

/// Wires a pod. Whatever goes wrong, nothing is left behind.
pub(super) fn wire(
    config: &Config,
    node: Option<NodeAddresses>,
    mtu: Option<u32>,
    wish: &Wish,
) -> Result<Wired, WiringError> {
    let node = node.ok_or(WiringError::NodeUnknown)?;
    plan::check(&wish.assigned, node)?;
    let netns = PodNamespace::open(&wish.netns)?;
    let mut host = Socket::open().map_err(WiringError::kernel("open a netlink socket"))?;
    let mut pod =
        netns.visit(|| Socket::open().map_err(WiringError::kernel("open a netlink socket in the pod")))?;
    let link = create(config, mtu, wish, &netns, &mut host, &mut pod)?;
    let made = furnish(config, wish, node, &netns, &link, &mut host, &mut pod)
        .and_then(|wired| netns.still_there().map(|()| wired));
    if made.is_err() {
        undo(&mut host, &link);
    }
    made
}

/// Removes what was made.
fn undo(host: &mut Socket, link: &Interface) {
    match delete(host, link.index) {
        Ok(_) => {}
        // DEL, or the end of the name space, will remove it.
        Err(error) => {
            tracing::warn!(link = link.name, error = error.to_string(), "cannot undo the wiring of a pod")
        }
    }
}

/// Deletes an interface; false if there is none.
pub(super) fn delete(host: &mut Socket, index: u32) -> io::Result<bool> {
    let request = messages::delete_link(index);
    match host.one(request.message, request.flags) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The name space of a pod.
struct PodNamespace<'a> {
    path: &'a Path,
    file: File,
    identity: (u64, u64),
    /// The one of the node.
    own: File,
}

impl<'a> PodNamespace<'a> {
    fn open(path: &'a Path) -> Result<Self, WiringError> {
        let error = |source| WiringError::Namespace { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(error)?;
        let meta = file.metadata().map_err(error)?;
        let identity = (meta.dev(), meta.ino());
        let own = File::open("/proc/thread-self/ns/net").map_err(error)?;
        let here = own.metadata().map_err(error)?;
        if identity == (here.dev(), here.ino()) {
            return Err(WiringError::NodeNamespace(path.to_path_buf()));
        }
        Ok(Self { path, file, identity, own })
    }

    /// Does something inside. The thread must be one that nobody else uses: if the way back should fail, it ends.
    fn visit<T>(&self, work: impl FnOnce() -> Result<T, WiringError>) -> Result<T, WiringError> {
        let error = |errno: nix::Error| WiringError::Namespace {
            path: self.path.to_path_buf(),
            source: errno.into(),
        };
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(error)?;
        let result = work();
        setns(&self.own, CloneFlags::CLONE_NEWNET).map_err(error)?;
        result
    }

    /// The open file keeps the name space alive, also when the runtime has removed it by now.
    fn still_there(&self) -> Result<(), WiringError> {
        match fs::metadata(self.path) {
            Ok(meta) if (meta.dev(), meta.ino()) == self.identity => Ok(()),
            _ => Err(WiringError::Vanished(self.path.to_path_buf())),
        }
    }
}

/// Makes the pair; what an earlier attempt for the same owner has left is replaced.
fn create(
    config: &Config,
    mtu: Option<u32>,
    wish: &Wish,
    netns: &PodNamespace<'_>,
    host: &mut Socket,
    pod: &mut Socket,
) -> Result<Interface, WiringError> {
    let calico = config.compat_calico;
    let mut name =
        if calico { plan::calico_name(&wish.namespace, &wish.pod) } else { plan::host_name(&wish.owner, 0) };
    let mut names = 1;
    // Each round either succeeds, fails, removes something of ours or takes the next name.
    for _ in 0..2 * NAMES {
        let pair = messages::create_pair(&name, mtu, &wish.owner.ifname, netns.file.as_fd());
        let answers = host.batch(vec![pair, messages::get_by_name(&name)]);
        let [created, there] = take(answers, || format!("create interface {name}"))?;
        let there = there.ok().flatten().as_ref().and_then(Interface::of);
        match (created, there) {
            (Ok(_), Some(link)) => return Ok(link),
            // Another process has deleted it at once.
            (Ok(_), None) => {
                return Err(WiringError::kernel(format!("find interface {name}"))(
                    io::ErrorKind::NotFound.into(),
                ));
            }
            (Err(error), there) if error.raw_os_error() == Some(libc::EEXIST) => match there {
                Some(link) if is_left_over(&link, wish, calico) => {
                    tracing::info!(
                        link = link.name,
                        alias = link.alias,
                        "replacing an interface of an earlier attempt"
                    );
                    delete(host, link.index)
                        .map_err(WiringError::kernel(format!("delete interface {name}")))?;
                }
                Some(_) if calico => return Err(WiringError::NameTaken { name }),
                Some(_) if names < NAMES => {
                    name = plan::host_name(&wish.owner, names);
                    names += 1;
                }
                Some(_) => return Err(WiringError::NameTaken { name }),
                None => remove_inside(wish, host, pod)?,
            },
            (Err(error), _) => return Err(WiringError::kernel(format!("create interface {name}"))(error)),
        }
    }
    Err(WiringError::NameTaken { name })
}

/// Whether an interface with our name is what an earlier attempt has left.
fn is_left_over(link: &Interface, wish: &Wish, calico: bool) -> bool {
    match link.alias.as_deref() {
        // Killed between the two requests that make and label it.
        None => link.veth,
        Some(alias) => match plan::parse_alias(alias) {
            // Calico's names are of pods: an earlier sandbox of the pod has it.
            Some((_, owner)) => owner == wish.owner || calico,
            None => false,
        },
    }
}

/// The pod has the interface already: removes it if it is ours.
fn remove_inside(wish: &Wish, host: &mut Socket, pod: &mut Socket) -> Result<(), WiringError> {
    let ifname = &wish.owner.ifname;
    let occupied = |detail: &str| WiringError::Occupied { ifname: ifname.clone(), detail: detail.to_owned() };
    let request = messages::get_by_name(ifname);
    let inside = match pod.one(request.message, request.flags) {
        Ok(message) => message.as_ref().and_then(Interface::of),
        // Gone in the meantime: the next attempt will tell.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
        Err(error) => return Err(WiringError::kernel(format!("read interface {ifname} of the pod"))(error)),
    };
    let Some(inside) = inside.filter(|link| link.veth) else {
        return Err(occupied("it is not a veth"));
    };
    let Some(peer) = inside.peer else {
        return Err(occupied("its other end is in the pod, too"));
    };
    let request = messages::get_by_index(peer);
    let outside = match host.one(request.message, request.flags) {
        Ok(message) => message.as_ref().and_then(Interface::of),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => None,
        Err(error) => return Err(WiringError::kernel(format!("read interface {peer}"))(error)),
    };
    // The index may be that of another interface here if the other end is elsewhere.
    let Some(outside) = outside.filter(|link| link.veth && link.peer == Some(inside.index)) else {
        return Err(occupied("its other end is not on this node"));
    };
    let ours = match outside.alias.as_deref() {
        None => (0..NAMES).any(|attempt| plan::host_name(&wish.owner, attempt) == outside.name),
        Some(alias) => plan::parse_alias(alias).is_some_and(|(_, owner)| owner == wish.owner),
    };
    if !ours {
        let alias = outside.alias.as_deref().unwrap_or("none");
        return Err(occupied(&format!("its other end is {}, alias {alias}", outside.name)));
    }
    tracing::info!(
        link = outside.name,
        alias = outside.alias,
        "replacing an interface of an earlier attempt"
    );
    delete(host, outside.index).map_err(WiringError::kernel(format!("delete interface {}", outside.name)))?;
    Ok(())
}

/// Labels both ends, gives them addresses and routes, and sets them up.
fn furnish(
    config: &Config,
    wish: &Wish,
    node: NodeAddresses,
    netns: &PodNamespace<'_>,
    link: &Interface,
    host: &mut Socket,
    pod: &mut Socket,
) -> Result<Wired, WiringError> {
    let name = &link.name;
    let ipv6 = wish.assigned.ipv6.is_some();
    let broken =
        |what: &str| WiringError::kernel(format!("read {what} of {name}"))(io::ErrorKind::InvalidData.into());
    let mac = link.mac.ok_or_else(|| broken("the hardware address"))?;
    let inside = link.peer.ok_or_else(|| broken("the other end"))?;
    let plan = plan::plan(&wish.assigned, node, plan::link_local(mac));

    // First of all the label: from now on DEL finds it by its alias too.
    let alias = plan::alias(&wish.assigned.pool, &wish.owner);
    let mut label = vec![messages::label(link.index, &alias, ipv6)];
    let alt_name = plan::alt_name(&wish.uid, name);
    label.extend(alt_name.map(|alt| messages::add_alt_name(link.index, alt)));
    let mut answers = all(host.batch(label), || format!("label interface {name}"))?.into_iter();
    expect(answers.next(), || format!("label interface {name}"))?;
    if let Some(Err(error)) = answers.next() {
        // Older kernels; the pod is then found by the routes to it.
        tracing::debug!(link = name, error = error.to_string(), "cannot add an alternative name");
    }

    if ipv6 {
        write_sysctl(&format!("net/ipv6/conf/{name}/accept_ra"), "0").map_err(WiringError::kernel(
            format!("stop interface {name} from taking router advertisements"),
        ))?;
        netns.visit(|| enable_ipv6(&wish.owner.ifname))?;
    }
    pod_end(&plan, inside, pod).and_then(|mac_inside| {
        host_end(config, &plan, link, host)?;
        Ok(Wired { index: link.index, name: name.clone(), mtu: link.mtu, mac, mac_inside })
    })
}

/// Sets the pod's end up. It comes before the host's, whose coming up makes both ready.
fn pod_end(plan: &Plan, inside: u32, pod: &mut Socket) -> Result<[u8; 6], WiringError> {
    let what = |place: usize| match place {
        0 => "set the pod's interface up".to_owned(),
        n if n <= plan.pod_addresses.len() => format!("give the pod {}", plan.pod_addresses[n - 1].ip),
        n => match plan.pod_routes.get(n - 1 - plan.pod_addresses.len()) {
            Some(route) => format!("route {}/{} in the pod", route.destination, route.prefix),
            None => "read the pod's interface".to_owned(),
        },
    };
    let mut requests = vec![messages::set_up(inside)];
    requests.extend(plan.pod_addresses.iter().map(|address| messages::add_address(inside, address)));
    requests.extend(
        plan.pod_routes.iter().map(|route| messages::add_route(inside, route, MAIN_TABLE, PROTOCOL_BOOT)),
    );
    requests.push(messages::get_by_index(inside));
    let answers = all(pod.batch(requests), || what(0))?;
    let mut last = None;
    for (place, answer) in answers.into_iter().enumerate() {
        last = expect(Some(answer), || what(place))?;
    }
    last.as_ref()
        .and_then(Interface::of)
        .and_then(|link| link.mac)
        .ok_or_else(|| WiringError::kernel("read the pod's interface")(io::ErrorKind::InvalidData.into()))
}

/// Sets the host's end up, with the routes to the pod.
fn host_end(config: &Config, plan: &Plan, link: &Interface, host: &mut Socket) -> Result<(), WiringError> {
    let mut requests = vec![messages::set_up(link.index)];
    requests.extend(plan.host_addresses.iter().map(|address| messages::add_address(link.index, address)));
    let routes = requests.len();
    requests.extend(
        plan.host_routes
            .iter()
            .map(|route| messages::add_route(link.index, route, config.pod_table, config.protocol)),
    );
    // Newer kernels wait with the answer until the carrier has settled.
    requests.push(messages::get_by_index(link.index));
    let what = |place: usize| match place {
        0 => format!("set interface {} up", link.name),
        n if n < routes => format!("give {} to interface {}", plan.host_addresses[n - 1].ip, link.name),
        n => match plan.host_routes.get(n - routes) {
            Some(route) => format!("route {} in table {}", route.destination, config.pod_table),
            None => format!("read interface {}", link.name),
        },
    };
    let answers = all(host.batch(requests), || what(0))?;
    for (place, answer) in answers.into_iter().enumerate() {
        match (answer, place.checked_sub(routes).and_then(|n| plan.host_routes.get(n))) {
            (Err(error), Some(route)) if error.raw_os_error() == Some(libc::EEXIST) => {
                return Err(foreign_route(config, route.destination, host));
            }
            (answer, _) => drop(expect(Some(answer), || what(place))?),
        }
    }
    Ok(())
}

/// Describes the route that is where ours should be.
fn foreign_route(config: &Config, destination: IpAddr, host: &mut Socket) -> WiringError {
    let mut error = (0, "unknown".to_owned());
    let routes =
        host.dump(&messages::all_routes(destination.is_ipv6(), config.pod_table)).unwrap_or_default();
    let full = if destination.is_ipv4() { 32 } else { 128 };
    let found = routes.iter().filter_map(FoundRoute::of).find(|route| {
        route.destination == Some(destination) && route.prefix == full && route.table == config.pod_table
    });
    if let Some(route) = found {
        error.0 = route.protocol;
        if let Some(index) = route.outputs.first() {
            let request = messages::get_by_index(*index);
            let link =
                host.one(request.message, request.flags).ok().flatten().as_ref().and_then(Interface::of);
            error.1 = link.map_or_else(
                || format!("number {index}"),
                |link| match link.alias {
                    Some(alias) => format!("{} of {alias}", link.name),
                    None => link.name,
                },
            );
        }
    }
    let (protocol, output) = error;
    WiringError::ForeignRoute { destination, table: config.pod_table, protocol, output }
}

/// Some runtimes make name spaces without IPv6. This thread is in the pod's.
fn enable_ipv6(ifname: &str) -> Result<(), WiringError> {
    write_sysctl(&format!("net/ipv6/conf/{ifname}/disable_ipv6"), "0")
        .map_err(WiringError::kernel(format!("enable IPv6 at {ifname} of the pod")))
}

/// Sets a kernel parameter of the name space of this thread unless it has the value already.
pub(super) fn write_sysctl(name: &str, value: &str) -> io::Result<()> {
    let path = Path::new("/proc/sys").join(name);
    if fs::read_to_string(&path)?.trim() == value {
        return Ok(());
    }
    fs::write(path, value)
}

fn all(answers: io::Result<Vec<Answer>>, what: impl FnOnce() -> String) -> Result<Vec<Answer>, WiringError> {
    answers.map_err(|error| WiringError::kernel(what())(error))
}

fn take<const N: usize>(
    answers: io::Result<Vec<Answer>>,
    what: impl Fn() -> String,
) -> Result<[Answer; N], WiringError> {
    all(answers, &what)?
        .try_into()
        .map_err(|_| WiringError::kernel(what())(io::ErrorKind::InvalidData.into()))
}

fn expect(
    answer: Option<Answer>,
    what: impl FnOnce() -> String,
) -> Result<Option<RouteNetlinkMessage>, WiringError> {
    match answer {
        Some(Ok(message)) => Ok(message),
        Some(Err(error)) => Err(WiringError::kernel(what())(error)),
        None => Err(WiringError::kernel(what())(io::ErrorKind::InvalidData.into())),
    }
}

/// Reads an interface by its index; none if there is none.
pub(super) fn by_index(host: &mut Socket, index: u32) -> Result<Option<Interface>, WiringError> {
    read(host, messages::get_by_index(index), || format!("read interface {index}"))
}

/// The same by its name.
pub(super) fn by_name(host: &mut Socket, name: &str) -> Result<Option<Interface>, WiringError> {
    read(host, messages::get_by_name(name), || format!("read interface {name}"))
}

fn read(
    host: &mut Socket,
    request: Request,
    what: impl FnOnce() -> String,
) -> Result<Option<Interface>, WiringError> {
    match host.one(request.message, request.flags) {
        Ok(message) => Ok(message.as_ref().and_then(Interface::of)),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(WiringError::kernel(what())(error)),
    }
}
