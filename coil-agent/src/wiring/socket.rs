//! A netlink socket of one network name space, used by one thread at a time: several requests in one system call,
//! and dumps that are repeated when they were interrupted.
//!
//! The kernel carries requests out while they are being sent, so that a socket that blocks costs less than a task
//! that waits for it: the wiring of a pod is a handful of system calls.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;

/// The kernel answers at once; this bounds what would otherwise be forever.
const TIMEOUT: libc::timeval = libc::timeval { tv_sec: 20, tv_usec: 0 };
/// More than the kernel puts into one datagram of a dump.
const BUFFER: usize = 64 * 1024;
/// Attempts at a dump that changes keep interrupting, as in the original.
pub(super) const DUMP_ATTEMPTS: u32 = 6;
/// Wait before the second attempt; doubled each time. A node on which many pods start and end changes for longer than
/// a dump takes: together the waits are an eighth of a second.
const DUMP_PAUSE: Duration = Duration::from_millis(4);

/// One request of a batch.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) message: RouteNetlinkMessage,
    /// Beside those that every request has.
    pub(super) flags: u16,
}

impl Request {
    pub(super) fn new(message: RouteNetlinkMessage, flags: u16) -> Self {
        Self { message, flags }
    }
}

/// What the kernel said to a request: for questions the object, for changes nothing.
pub(super) type Answer = Result<Option<RouteNetlinkMessage>, io::Error>;

/// Why a dump is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum DumpError {
    /// The kernel refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Changes have interrupted all attempts.
    #[error("interrupted by changes {DUMP_ATTEMPTS} times")]
    Interrupted,
}

/// The socket.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the name space of this thread. It stays with it wherever it is used.
    pub(super) fn open() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointer is passed.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just opened and belongs to nobody else.
        let socket = Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, sequence: 0, buffer: vec![0; BUFFER] };
        socket.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &TIMEOUT)?;
        // Errors need not repeat the request, and filters of dumps are applied by the kernel.
        socket.set::<libc::c_int>(libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, &1)?;
        socket.set::<libc::c_int>(libc::SOL_NETLINK, libc::NETLINK_GET_STRICT_CHK, &1)?;
        Ok(socket)
    }

    fn set<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
        let length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
        // SAFETY: the kernel reads `length` bytes of a value that outlives the call.
        let result = unsafe {
            libc::setsockopt(self.fd.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), length)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Sends all requests at once; the kernel carries them out in order, each whether or not the one before
    /// succeeded. Gives one answer for each.
    pub(super) fn batch(&mut self, requests: Vec<Request>) -> io::Result<Vec<Answer>> {
        let first = self.sequence.wrapping_add(1);
        let count = requests.len();
        let mut bytes = Vec::with_capacity(2048);
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            let flags = NLM_F_REQUEST | NLM_F_ACK | request.flags;
            append(&mut bytes, request.message, flags, self.sequence);
        }
        self.send(&bytes)?;
        let mut objects: Vec<Option<RouteNetlinkMessage>> = vec![None; count];
        let mut answers: Vec<Option<Answer>> = (0..count).map(|_| None).collect();
        let mut missing = count;
        while missing > 0 {
            for message in self.receive()? {
                // What is left of an earlier batch is not ours.
                let Ok(place) = usize::try_from(message.header.sequence_number.wrapping_sub(first)) else {
                    continue;
                };
                let (Some(object), Some(answer)) = (objects.get_mut(place), answers.get_mut(place)) else {
                    continue;
                };
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => *object = Some(message),
                    NetlinkPayload::Error(error) if answer.is_none() => {
                        *answer = Some(match error.code {
                            None => Ok(object.take()),
                            Some(_) => Err(error.to_io()),
                        });
                        missing -= 1;
                    }
                    _ => {}
                }
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    /// Sends one request.
    pub(super) fn one(&mut self, message: RouteNetlinkMessage, flags: u16) -> Answer {
        let answers = self.batch(vec![Request::new(message, flags)])?;
        answers.into_iter().next().unwrap_or(Ok(None))
    }

    /// Asks for all objects of a kind. A dump during which something changed may miss what has existed all the
    /// time; it is repeated a few times.
    pub(super) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, DumpError> {
        repeated(DUMP_ATTEMPTS, DUMP_PAUSE, || self.dump_once(message.clone()))
    }

    /// One dump, and whether it was interrupted.
    fn dump_once(&mut self, message: RouteNetlinkMessage) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        append(&mut bytes, message, NLM_F_REQUEST | NLM_F_DUMP, self.sequence);
        self.send(&bytes)?;
        let (mut found, mut interrupted) = (Vec::new(), false);
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok((found, interrupted)),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            // SAFETY: the kernel reads `bytes.len()` bytes of a slice that outlives the call.
            let sent = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
            if sent >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// The messages of the next datagram. One that cannot be read is left out, unless it answers a request.
    fn receive(&mut self) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
        let length = loop {
            let buffer = &mut self.buffer;
            // SAFETY: the kernel writes at most `buffer.len()` bytes into a buffer that outlives the call.
            let length =
                unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            match usize::try_from(length) {
                Ok(length) => break length,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    match error.kind() {
                        io::ErrorKind::Interrupted => {}
                        io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
                        _ => return Err(error),
                    }
                }
            }
        };
        parse(self.buffer.get(..length).unwrap_or_default())
    }
}

/// Appends a message to a buffer of messages.
fn append(bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16, sequence: u32) {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags;
    message.header.sequence_number = sequence;
    message.finalize();
    let begin = bytes.len();
    bytes.resize(begin + message.buffer_len().next_multiple_of(4), 0);
    if let Some(place) = bytes.get_mut(begin..) {
        message.serialize(place);
    }
}

/// Cuts a datagram into messages.
fn parse(mut bytes: &[u8]) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
    let mut messages = Vec::new();
    while let Some(length) = bytes.first_chunk::<4>() {
        let length = usize::try_from(u32::from_ne_bytes(*length)).map_err(io::Error::other)?;
        let Some(message) = bytes.get(..length).filter(|message| message.len() >= 16) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink message was cut"));
        };
        match NetlinkMessage::deserialize(message) {
            Ok(message) => messages.push(message),
            // An attribute of some other kind of interface that nobody has asked for.
            Err(error) => tracing::debug!(error = error.to_string(), "unreadable netlink message"),
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(messages)
}

/// Repeats a dump until it was not interrupted.
fn repeated<T>(
    attempts: u32,
    mut pause: Duration,
    mut dump: impl FnMut() -> io::Result<(T, bool)>,
) -> Result<T, DumpError> {
    for attempt in 1..=attempts {
        let error = match dump() {
            Ok((found, false)) => return Ok(found),
            Ok((_, true)) => None,
            // Some kernels say it in this way.
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => None,
            Err(error) => Some(error),
        };
        if let Some(error) = error {
            return Err(error.into());
        }
        if attempt < attempts {
            tracing::debug!(attempt, "a netlink dump was interrupted");
            std::thread::sleep(pause);
            pause *= 2;
        }
    }
    Err(DumpError::Interrupted)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use netlink_packet_route::link::LinkMessage;

    use super::*;

    #[test]
    fn an_interrupted_dump_is_repeated_but_not_for_ever() {
        let mut calls = 0;
        let found = repeated(3, Duration::ZERO, || {
            calls += 1;
            Ok((calls, calls < 3))
        });
        assert_eq!(found.unwrap(), 3);
        let never = repeated(3, Duration::ZERO, || Ok(((), true)));
        assert!(matches!(never, Err(DumpError::Interrupted)));
        let busy =
            repeated(2, Duration::ZERO, || Err::<((), bool), _>(io::Error::from_raw_os_error(libc::EINTR)));
        assert!(matches!(busy, Err(DumpError::Interrupted)));
        let refused =
            repeated(2, Duration::ZERO, || Err::<((), bool), _>(io::Error::from_raw_os_error(libc::EPERM)));
        assert!(matches!(refused, Err(DumpError::Io(_))));
    }

    #[test]
    fn messages_are_cut_where_they_end() {
        let mut bytes = Vec::new();
        for sequence in 1..=3 {
            let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
            append(&mut bytes, message, NLM_F_REQUEST, sequence);
        }
        let messages = parse(&bytes).unwrap();
        assert_eq!(messages.iter().map(|m| m.header.sequence_number).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(parse(&bytes[..bytes.len() - 1]).is_err());
        assert!(parse(&[]).unwrap().is_empty());
    }

    /// Needs no privilege: everybody may ask.
    #[test]
    fn the_kernel_answers_each_request_of_a_batch() {
        let mut socket = Socket::open().unwrap();
        let get = |name: &str| {
            let mut message = LinkMessage::default();
            message.attributes.push(netlink_packet_route::link::LinkAttribute::IfName(name.into()));
            Request::new(RouteNetlinkMessage::GetLink(message), 0)
        };
        let answers = socket.batch(vec![get("lo"), get("no-such-link"), get("lo")]).unwrap();
        assert_eq!(answers.len(), 3);
        assert!(matches!(answers[0], Ok(Some(RouteNetlinkMessage::NewLink(_)))));
        assert_eq!(answers[1].as_ref().unwrap_err().raw_os_error(), Some(libc::ENODEV));
        assert!(matches!(answers[2], Ok(Some(_))));
        let all = socket.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default())).unwrap();
        assert!(!all.is_empty());
    }
}
