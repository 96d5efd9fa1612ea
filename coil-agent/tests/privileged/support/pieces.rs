//! Packets of which only the first bytes are in one piece, and the rest in pages, as network cards hand them over; and
//! sockets that see what arrives.
//!
//! They are sent from a ring in memory that is shared with the kernel: it copies as many bytes as the packet's virtual
//! header says, and takes the rest by reference to the pages of the ring.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::DEADLINE;

/// Bytes of the ring, which has room for one packet.
const SIZE: u32 = 1 << 14;
/// Where a packet begins: after the `tpacket2_hdr`, aligned.
const AT: usize = 32;
/// Bytes of a `virtio_net_hdr`, and where it says how many bytes the headers have.
const VIRTUAL: usize = 10;
const VIRTUAL_LENGTH_AT: usize = 2;
/// `PACKET_VNET_HDR`
const PACKET_VNET_HDR: libc::c_int = 15;
const ALL: u16 = libc::ETH_P_ALL as u16;

fn socket(ifindex: u32, protocol: u16) -> OwnedFd {
    // SAFETY: a plain call.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the kernel has just made it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all zeros are an address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = i32::try_from(ifindex).unwrap();
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    // SAFETY: the address is alive and as long as said.
    let bound = unsafe { libc::bind(fd, std::ptr::from_ref(&address).cast(), length) };
    assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    socket
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) {
    let length = libc::socklen_t::try_from(size_of::<T>()).unwrap();
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: the value is alive and as long as said.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value, length) };
    assert_eq!(result, 0, "option {option}: {}", io::Error::last_os_error());
}

/// Sends packets out of an interface of the name space of the thread that makes it.
pub(crate) struct Pieces {
    socket: OwnedFd,
    ring: *mut u8,
}

// SAFETY: the ring is this value's alone.
unsafe impl Send for Pieces {}

impl Pieces {
    pub(crate) fn new(ifindex: u32) -> Self {
        // Without a protocol: it receives nothing.
        let socket = socket(ifindex, 0);
        set(&socket, libc::SOL_PACKET, libc::PACKET_VERSION, &1i32);
        set(&socket, libc::SOL_PACKET, PACKET_VNET_HDR, &1i32);
        let request =
            libc::tpacket_req { tp_block_size: SIZE, tp_block_nr: 1, tp_frame_size: SIZE, tp_frame_nr: 1 };
        set(&socket, libc::SOL_PACKET, libc::PACKET_TX_RING, &request);
        let (access, fd) = (libc::PROT_READ | libc::PROT_WRITE, socket.as_raw_fd());
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let ring =
            unsafe { libc::mmap(std::ptr::null_mut(), SIZE as usize, access, libc::MAP_SHARED, fd, 0) };
        assert_ne!(ring, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self { socket, ring: ring.cast() }
    }

    fn status(&self) -> u32 {
        // SAFETY: the ring begins with a `tpacket2_hdr`, and that with its status, which the kernel changes.
        unsafe { self.ring.cast::<u32>().read_volatile() }
    }

    /// Sends a packet of which `linear` bytes, but an Ethernet header at least, are in one piece.
    pub(crate) fn send(&mut self, packet: &[u8], linear: usize) {
        super::wait_for("the packet before to be done with", || {
            (self.status() == libc::TP_STATUS_AVAILABLE).then_some(())
        });
        let mut header = [0; VIRTUAL];
        let linear = u16::try_from(linear).unwrap().to_le_bytes();
        header[VIRTUAL_LENGTH_AT..VIRTUAL_LENGTH_AT + 2].copy_from_slice(&linear);
        let length = VIRTUAL + packet.len();
        assert!(AT + length <= SIZE as usize);
        // SAFETY: it fits, and the kernel does not look at it before the status says so. The second word is the
        // length.
        unsafe {
            std::ptr::copy_nonoverlapping(header.as_ptr(), self.ring.add(AT), VIRTUAL);
            std::ptr::copy_nonoverlapping(packet.as_ptr(), self.ring.add(AT + VIRTUAL), packet.len());
            self.ring.cast::<u32>().add(1).write_volatile(u32::try_from(length).unwrap());
            std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
            self.ring.cast::<u32>().write_volatile(libc::TP_STATUS_SEND_REQUEST);
        }
        // SAFETY: there is nothing to read but the ring.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), std::ptr::null(), 0, 0) };
        assert!(sent > 0, "{}", io::Error::last_os_error());
        assert_ne!(self.status(), libc::TP_STATUS_WRONG_FORMAT);
    }
}

impl Drop for Pieces {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and nobody uses it any more.
        let result = unsafe { libc::munmap(self.ring.cast(), SIZE as usize) };
        if result != 0 {
            eprintln!("munmap: {}", io::Error::last_os_error());
        }
    }
}

/// Sees what an interface of the name space of the thread that makes it receives.
pub(crate) struct Arrivals(OwnedFd);

impl Arrivals {
    pub(crate) fn new(ifindex: u32) -> Self {
        let socket = socket(ifindex, ALL);
        // They would fill its queue.
        set(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1i32);
        let patience = libc::timeval { tv_sec: i64::try_from(DEADLINE.as_secs()).unwrap(), tv_usec: 0 };
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience);
        Self(socket)
    }

    /// The next packet with these bytes; `None` if none comes.
    pub(crate) fn next(&self, marker: &[u8]) -> Option<Vec<u8>> {
        loop {
            let mut buffer = vec![0u8; 1 << 16];
            // SAFETY: the buffer is alive and as long as said.
            let count =
                unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            let count = usize::try_from(count).ok()?;
            let packet = &buffer[..count];
            if packet.windows(marker.len()).any(|bytes| bytes == marker) {
                return Some(packet.to_vec());
            }
        }
    }
}
