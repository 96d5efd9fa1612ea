//! Interfaces that take no UDP datagrams in one piece (UDP GSO), as `ethtool -K … tx-udp-segmentation off` makes them.
//!
//! `bpf_skb_adjust_room` marks a packet as tunnelled, and nothing that a program can call takes the mark off again. While
//! a packet is in its tunnel the kernel cuts it at the right place; datagrams that have left one by FOU in one piece it
//! cuts at the wrong one, and loses. Between virtual devices nobody would cut them in time. So both ends of the interface
//! of an egress pod do: the node's what comes to the pod, and the pod's what it sends, each while the tunnel is still
//! there. Streams stay whole. The same takes apart what a network card has merged of tunnels with checksums.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::attach::interface_name;
use crate::desired::{DesiredState, PodUid};

mod call {
    //! The system call.
    nix::ioctl_readwrite_bad!(ethtool, libc::SIOCETHTOOL, libc::ifreq);
}

/// What `ethtool` calls it.
const DATAGRAMS: &[u8] = b"tx-udp-segmentation";

// Commands, and the set of names, of `linux/ethtool.h`.
const GET_NAMES: u32 = 0x1b;
const COUNT_NAMES: u32 = 0x37;
const GET: u32 = 0x3a;
const SET: u32 = 0x3b;
const FEATURES: u32 = 4;
/// Bytes of a name.
const NAME: usize = 32;

/// An interface whose features are asked for and set.
struct Device {
    socket: OwnedFd,
    request: libc::ifreq,
}

impl Device {
    fn open(ifindex: u32) -> io::Result<Self> {
        let name = interface_name(ifindex).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))?;
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        let mut ifr_name = [0; libc::IFNAMSIZ];
        // The last stays zero.
        for (to, from) in ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        let nobody = libc::__c_anonymous_ifr_ifru { ifru_data: std::ptr::null_mut() };
        Ok(Self { socket, request: libc::ifreq { ifr_name, ifr_ifru: nobody } })
    }

    /// Makes a call with `data`, which the kernel fills as far as the call says there is room.
    fn call(&mut self, data: &mut [u32]) -> io::Result<()> {
        self.request.ifr_ifru.ifru_data = data.as_mut_ptr().cast();
        // SAFETY: the request is whole, and points to `data`, alive and writable during the call; the callers below
        // tell the kernel no more room than `data` has.
        unsafe { call::ethtool(self.socket.as_raw_fd(), &raw mut self.request) }?;
        Ok(())
    }

    /// How many features there are.
    fn features(&mut self) -> io::Result<usize> {
        let [low, high] = bytemuck::cast(1_u64 << FEATURES);
        let mut data = [COUNT_NAMES, 0, low, high, 0];
        self.call(&mut data)?;
        Ok(data[4] as usize)
    }

    /// The number of a feature; `None` if this kernel has none of this name.
    fn number(&mut self, features: usize, feature: &[u8]) -> io::Result<Option<usize>> {
        let mut data = vec![0; 3 + features * NAME / size_of::<u32>()];
        data[0] = GET_NAMES;
        data[1] = FEATURES;
        data[2] = u32::try_from(features).map_err(io::Error::other)?;
        self.call(&mut data)?;
        let mut names = bytemuck::cast_slice::<u32, u8>(&data[3..]).chunks_exact(NAME);
        Ok(names.position(|name| name.split(|byte| *byte == 0).next() == Some(feature)))
    }
}

/// Words that are needed for so many bits.
const fn words(bits: usize) -> usize {
    bits.div_ceil(32)
}

/// Has an interface of this network name space take datagrams one by one.
///
/// # Errors
///
/// The interface is gone (`ENODEV`), or goes on taking them in one piece.
pub(crate) fn cut_datagrams(ifindex: u32) -> io::Result<()> {
    let mut device = Device::open(ifindex)?;
    let features = device.features()?;
    let Some(number) = device.number(features, DATAGRAMS)? else { return Ok(()) };
    let (word, bit) = (number / 32, 1_u32 << (number % 32));
    let size = u32::try_from(words(features)).map_err(io::Error::other)?;
    // Of each word what is to change, and to what.
    let mut set = vec![0; 2 + 2 * words(features)];
    (set[0], set[1]) = (SET, size);
    set[2 + 2 * word] = bit;
    device.call(&mut set)?;
    // Of each word what can be had, what is asked for, what there is, and what never changes.
    let mut get = vec![0; 2 + 4 * words(features)];
    (get[0], get[1]) = (GET, size);
    device.call(&mut get)?;
    if get[2 + 4 * word + 2] & bit == 0 { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

/// The interfaces of egress pods at their node.
#[derive(Debug, Default)]
pub(crate) struct Cutters {
    /// Those that know, and whose they are.
    told: BTreeMap<u32, PodUid>,
}

impl Cutters {
    /// Tells those of new egress pods.
    pub(crate) fn sync(&mut self, state: &DesiredState) {
        let serves = |ifindex: u32, uid: &PodUid| {
            state.pods.get(uid).is_some_and(|pod| pod.gateway && pod.ifindex == ifindex)
        };
        self.told.retain(|ifindex, uid| serves(*ifindex, uid));
        for (uid, pod) in state.pods.iter().filter(|(_, pod)| pod.gateway) {
            if self.told.get(&pod.ifindex) == Some(uid) {
                continue;
            }
            match cut_datagrams(pod.ifindex) {
                Ok(()) => {}
                // Whoever attaches programs to it says so.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => continue,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    let pod = format!("{}/{}", pod.namespace, pod.name);
                    tracing::warn!(error, pod, "its interface goes on taking UDP datagrams in one piece");
                }
            }
            self.told.insert(pod.ifindex, uid.clone());
        }
    }

    /// Tells all of them the next time.
    pub(crate) fn forget(&mut self) {
        self.told.clear();
    }
}
