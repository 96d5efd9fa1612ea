//! A program of somebody else, made by hand: it counts what it sees, notes some of it, and returns what it is told to.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use bytemuck::{Pod, Zeroable};
use coil_agent::datapath::AttachMode;

use super::foreign::{act, bpf, pair};
use super::net::NetNs;

const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP: libc::c_int = 1;
const MAP_UPDATE: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const OBJ_PIN: libc::c_int = 6;
const LINK_CREATE: libc::c_int = 28;
const TYPE_ARRAY: u32 = 2;
const SCHED_CLS: u32 = 3;
/// `BPF_F_BEFORE` and `BPF_F_AFTER`: without another program, first and last of all.
const BEFORE: u32 = 1 << 3;
const AFTER: u32 = 1 << 4;
/// Port of tunnels.
const FOU: u16 = 5555;

/// Others go on: `TC_ACT_UNSPEC` and `TCX_NEXT`.
pub(crate) const NEXT: i32 = -1;
/// The packet is accepted, and nobody else is asked: `TC_ACT_OK` and `TCX_PASS`.
pub(crate) const PASS: i32 = 0;
/// The packet is dropped: `TC_ACT_SHOT` and `TCX_DROP`.
pub(crate) const DROP: i32 = 2;

/// What the program shares with the test.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Seen {
    /// Packets.
    pub(crate) packets: u64,
    /// Those of IPv4 to the port of tunnels.
    pub(crate) tunnelled: u64,
    /// Mark of the last one.
    pub(crate) mark: u32,
    /// How many bytes of it were in one piece, from the start.
    pub(crate) linear: u32,
    /// What to return.
    action: i32,
    /// Mark to set, if not 0.
    set_mark: u32,
}

/// Where a program stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    First,
    Last,
}

/// The program and its map.
pub(crate) struct Other {
    program: OwnedFd,
    map: OwnedFd,
    pin: PathBuf,
}

/// An instruction.
const fn insn(code: u8, dst: u8, src: u8, offset: i16, value: i32) -> u64 {
    code as u64
        | (dst as u64) << 8
        | (src as u64) << 12
        | (offset.cast_unsigned() as u64) << 16
        | (value.cast_unsigned() as u64) << 32
}

/// The program, for a map.
fn program(map: i32) -> Vec<u64> {
    let port = i32::from(FOU.to_be());
    vec![
        insn(0xbf, 6, 1, 0, 0),    // r6 = context
        insn(0x62, 10, 0, -4, 0),  // key = 0
        insn(0x18, 1, 1, 0, map),  // r1 = map
        0,                         //
        insn(0xbf, 2, 10, 0, 0),   // r2 = &key
        insn(0x07, 2, 0, 0, -4),   //
        insn(0x85, 0, 0, 0, 1),    // r0 = bpf_map_lookup_elem(r1, r2)
        insn(0x55, 0, 0, 2, 0),    // if r0 == 0
        insn(0xb7, 0, 0, 0, NEXT), //   return NEXT
        insn(0x95, 0, 0, 0, 0),    //
        insn(0xbf, 7, 0, 0, 0),    // r7 = r0
        insn(0xb7, 1, 0, 0, 1),    // r7.packets += 1
        insn(0xdb, 7, 1, 0, 0),    //
        insn(0x61, 1, 6, 8, 0),    // r7.mark = context.mark
        insn(0x63, 7, 1, 16, 0),   //
        insn(0x61, 2, 6, 80, 0),   // r7.linear = context.data_end - context.data
        insn(0x61, 3, 6, 76, 0),   //
        insn(0x1f, 2, 3, 0, 0),    //
        insn(0x63, 7, 2, 20, 0),   //
        insn(0xbf, 1, 6, 0, 0),    // r0 = bpf_skb_load_bytes(context, 36, &port, 2)
        insn(0xb7, 2, 0, 0, 36),   //
        insn(0xbf, 3, 10, 0, 0),   //
        insn(0x07, 3, 0, 0, -8),   //
        insn(0xb7, 4, 0, 0, 2),    //
        insn(0x85, 0, 0, 0, 26),   //
        insn(0x55, 0, 0, 4, 0),    // if r0 == 0 && port == FOU
        insn(0x69, 1, 10, -8, 0),  //
        insn(0x55, 1, 0, 2, port), //
        insn(0xb7, 1, 0, 0, 1),    //   r7.tunnelled += 1
        insn(0xdb, 7, 1, 8, 0),    //
        insn(0x61, 1, 7, 28, 0),   // if r7.set_mark != 0
        insn(0x15, 1, 0, 1, 0),    //
        insn(0x63, 6, 1, 8, 0),    //   context.mark = r7.set_mark
        insn(0x61, 0, 7, 24, 0),   // return r7.action
        insn(0x95, 0, 0, 0, 0),    //
    ]
}

impl Other {
    /// Loads it; `pin` is in a BPF file system.
    pub(crate) fn load(pin: PathBuf) -> Self {
        let size = u32::try_from(size_of::<Seen>()).unwrap();
        let map = bpf(MAP_CREATE, &[pair(TYPE_ARRAY, 4), pair(size, 1), 0]).unwrap();
        let code = program(map.as_raw_fd());
        let name = u64::from_le_bytes(*b"other\0\0\0");
        let attribute = [
            pair(SCHED_CLS, u32::try_from(code.len()).unwrap()),
            code.as_ptr().addr() as u64,
            c"GPL".as_ptr().addr() as u64,
            0,
            0,
            0,
            name,
            0,
        ];
        let program = bpf(PROG_LOAD, &attribute).unwrap();
        let path = CString::new(pin.as_os_str().as_bytes()).unwrap();
        act(OBJ_PIN, &[path.as_ptr().addr() as u64, pair(program.as_raw_fd().cast_unsigned(), 0)]).unwrap();
        let other = Self { program, map, pin };
        other.tell(NEXT, 0);
        other
    }

    fn call(&self, command: libc::c_int, seen: &mut Seen) {
        let key = 0u32;
        let key = std::ptr::from_ref(&key).addr() as u64;
        let value = std::ptr::from_mut(seen).addr() as u64;
        act(command, &[pair(self.map.as_raw_fd().cast_unsigned(), 0), key, value, 0]).unwrap();
    }

    /// What it has seen.
    pub(crate) fn seen(&self) -> Seen {
        let mut seen = Seen::default();
        self.call(MAP_LOOKUP, &mut seen);
        seen
    }

    /// What it is to return from now on, and the mark to set; it has seen nothing then.
    pub(crate) fn tell(&self, action: i32, set_mark: u32) {
        self.call(MAP_UPDATE, &mut Seen { action, set_mark, ..Seen::default() });
    }

    /// Attaches it to an interface.
    pub(crate) fn attach(
        &self,
        net: &NetNs,
        interface: &str,
        ingress: bool,
        place: Place,
        mode: AttachMode,
    ) -> Attached {
        match mode {
            AttachMode::Tcx => {
                let index = net.ifindex(interface);
                let kind = if ingress { 46 } else { 47 };
                let flags = if place == Place::First { BEFORE } else { AFTER };
                let program = self.program.as_raw_fd().cast_unsigned();
                let attribute = [pair(program, index), pair(kind, flags), 0, 0];
                Attached::Link(net.run(move || bpf(LINK_CREATE, &attribute).unwrap()))
            }
            AttachMode::Clsact => {
                let hook = if ingress { "ingress" } else { "egress" };
                let priority = if place == Place::First { 1 } else { 60_000 };
                let filter = format!("dev {interface} {hook} protocol all prio {priority}");
                let pin = self.pin.display();
                net.exec(&format!("tc filter add {filter} handle 1 bpf direct-action object-pinned {pin}"));
                Attached::Filter(filter)
            }
        }
    }
}

/// The program at an interface.
pub(crate) enum Attached {
    /// There as long as this is open.
    Link(OwnedFd),
    /// What `tc` calls it.
    Filter(String),
}

impl Attached {
    /// Takes it away.
    pub(crate) fn detach(self, net: &NetNs) {
        match self {
            Self::Link(link) => drop(link),
            Self::Filter(filter) => drop(net.exec(&format!("tc filter del {filter}"))),
        }
    }
}
