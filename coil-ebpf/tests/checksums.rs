//! Checksums inside and around the quote of an ICMP error: the ways in which they follow a translation, each
//! against one that sums all bytes up.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::IpAddr;

use coil_common::config::Config;
use coil_ebpf::{
    csum,
    encap::Encap,
    family::{V4, V6, addr4, addr6},
    parse::quote::{self, QuoteEdit, Quoted, QuotedEnd},
    tables::Translation,
    testing::{
        build::{self, Ip},
        memory::Memory,
    },
};
use proptest::{collection::vec, prelude::*};

/// A change of bytes, as the sum that a checksum over them moves by.
fn moved(before: &[u8], after: &[u8]) -> u32 {
    let sum = |bytes: &[u8]| u32::from(build::sum(bytes));
    (sum(after) + 0xffff - sum(before) % 0xffff) % 0xffff
}

/// A sum of words in the order of memory, as one of network order.
fn network(sum: u32) -> u32 {
    u32::from(u16::from_be_bytes(csum::fold(sum).to_ne_bytes())) % 0xffff
}

/// What is quoted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Tcp,
    Udp,
    Unchecked,
    Echo,
}

/// A quoted packet, and how much of it is there: addresses and port before and after.
#[derive(Clone, Debug)]
struct Case {
    v6: bool,
    sort: Sort,
    ports: (u16, u16),
    to: ([u8; 16], u16),
    payload: Vec<u8>,
    /// Bytes that are quoted of the transport part, at least eight.
    there: usize,
    source: bool,
}

fn cases() -> impl Strategy<Value = Case> {
    // Zero and all ones are where one's complement has two forms.
    let port = || prop_oneof![Just(0u16), Just(0xffff), any::<u16>()];
    let sort = prop_oneof![Just(Sort::Tcp), Just(Sort::Udp), Just(Sort::Unchecked), Just(Sort::Echo)];
    let addr = prop_oneof![Just([0; 16]), Just([0xff; 16]), any::<[u8; 16]>()];
    let payload = prop_oneof![vec(any::<u8>(), 0..40), vec(Just(0u8), 0..9), vec(Just(0xffu8), 0..9)];
    (any::<bool>(), sort, (port(), port()), (addr, port()), payload, 8..80usize, any::<bool>()).prop_map(
        |(v6, sort, ports, to, payload, there, source)| Case { v6, sort, ports, to, payload, there, source },
    )
}

impl Case {
    fn hosts(&self) -> [IpAddr; 2] {
        if self.v6 {
            ["2001:db8::2".parse().unwrap(), "fd01::2".parse().unwrap()]
        } else {
            ["192.0.2.2".parse().unwrap(), "10.1.0.2".parse().unwrap()]
        }
    }

    /// The packet with these ends; UDP that has no checksum keeps none.
    fn packet(&self, hosts: [IpAddr; 2], ports: (u16, u16)) -> Vec<u8> {
        let ip = Ip::new(hosts[0], hosts[1]);
        match self.sort {
            Sort::Tcp => ip.tcp(ports, 16, &[], &self.payload),
            Sort::Udp => ip.udp(ports, &self.payload),
            Sort::Unchecked => ip.udp_unchecked(ports, &self.payload),
            // One identifier, which belongs to the sender of a request and to the receiver of a reply.
            Sort::Echo => ip.echo(self.source, if self.source { ports.0 } else { ports.1 }, &self.payload),
        }
    }

    fn new_addr(&self) -> IpAddr {
        if self.v6 { self.to.0.into() } else { <[u8; 4]>::try_from(&self.to.0[..4]).unwrap().into() }
    }

    /// The packet before and after the translation of one end, both whole.
    fn both(&self) -> [Vec<u8>; 2] {
        let (mut hosts, mut ports) = (self.hosts(), self.ports);
        let before = self.packet(hosts, ports);
        if self.source {
            (hosts[0], ports.0) = (self.new_addr(), self.to.1);
        } else {
            (hosts[1], ports.1) = (self.new_addr(), self.to.1);
        }
        [before, self.packet(hosts, ports)]
    }
}

fn write(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Translates the quote, and returns it with the change that is said to be the ICMP checksum's.
fn translate<F: Quoted>(case: &Case, quoted: &[u8], addr: F::Addr) -> (Vec<u8>, u32, QuoteEdit<F>) {
    let mut packet = Memory::new(quoted.to_vec());
    let quote = quote::parse::<F, _>(&mut packet, 0, quoted.len(), &Config::default()).unwrap();
    let to = Translation::<F> {
        addr,
        port: case.to.1.to_be_bytes(),
        state: 0,
        last_seen: 0,
        used: false,
        tick: 0,
        encap: Encap::FOU,
    };
    let end = if case.source { QuotedEnd::Source } else { QuotedEnd::Destination };
    let mut edit = QuoteEdit::NONE;
    let change = quote.translate(&packet, end, &to, &mut edit).unwrap();
    let mut bytes = quoted.to_vec();
    if let Some((at, addr)) = edit.addr {
        write(&mut bytes, at, bytemuck::bytes_of(&addr));
    }
    for (at, value) in [edit.ip_check, edit.port, edit.check].into_iter().flatten() {
        write(&mut bytes, at, &value);
    }
    (bytes, change, edit)
}

fn check<F: Quoted>(case: &Case, addr: F::Addr) -> Result<(), TestCaseError> {
    let [before, after] = case.both();
    let there = (F::HEADER + case.there).min(before.len());
    let (found, change, edit) = translate::<F>(case, &before[..there], addr);

    // The quote is that of the packet that was sent, bit for bit; half a checksum is left as it is.
    let mut wanted = after[..there].to_vec();
    if case.sort == Sort::Tcp && there == F::HEADER + 17 {
        wanted[there - 1] = before[there - 1];
    }
    prop_assert_eq!(&found, &wanted);
    // And what is told of its change is what has changed.
    prop_assert_eq!(network(change), moved(&before[..there], &found));

    // The identities: A is the change of the address, P that of the port, X that of all that the ICMP checksum
    // covers.
    let (old_addr, old_port) =
        if case.source { (case.hosts()[0], case.ports.0) } else { (case.hosts()[1], case.ports.1) };
    let [a, b] = [old_addr, case.new_addr()].map(|addr| match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    });
    let address = moved(&a, &b);
    let port = moved(&old_port.to_be_bytes(), &case.to.1.to_be_bytes());
    let rewritten = edit.check.is_some();
    prop_assert_eq!(
        rewritten,
        case.sort != Sort::Unchecked && (case.sort != Sort::Tcp || there >= F::HEADER + 18)
    );
    let negative = |sum: u32| (0xffff - sum) % 0xffff;
    let wanted = match (F::INDEX, rewritten, case.sort) {
        (0, true, Sort::Echo) => 0,
        (0, true, _) => negative(address),
        (0, false, _) => port,
        (_, true, _) => 0,
        (_, false, _) => (address + port) % 0xffff,
    };
    prop_assert_eq!(network(change), wanted);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..ProptestConfig::default() })]

    /// The quoted packet becomes the one that its sender sent, checksums included, and the ICMP checksum moves by
    /// what the identities say: for TCP, UDP with and without a checksum and echoes, of which as much is quoted
    /// as routers like, at even and odd lengths.
    #[test]
    fn quotes_become_what_was_sent(case in cases()) {
        if case.v6 {
            check::<V6>(&case, addr6(case.to.0))?;
        } else {
            let bytes = <[u8; 4]>::try_from(&case.to.0[..4]).unwrap();
            check::<V4>(&case, addr4(bytes))?;
        }
    }

    /// A checksum that is 0 or 0xffff follows a change as RFC 1624 has it: never to 0xffff where any byte is not
    /// zero, and to what is computed anew.
    #[test]
    fn both_zeros_follow(
        mut bytes in vec(prop_oneof![Just(0u8), Just(0xff), any::<u8>()], 4..12),
        new in prop_oneof![Just([0; 2]), Just([0xff; 2]), any::<[u8; 2]>()],
        wish in prop_oneof![Just(0u16), Just(0xfffe), Just(1)],
    ) {
        // The last word is chosen so that the checksum is what is wished for.
        bytes.truncate(bytes.len() & !1);
        let last = bytes.len() - 2;
        write(&mut bytes, last, &[0, 0]);
        let rest = u32::from(build::sum(&bytes));
        let word = (u32::from(!wish) + 0xffff - rest % 0xffff) % 0xffff;
        write(&mut bytes, last, &u16::try_from(word).unwrap().to_be_bytes());
        prop_assume!(bytes.iter().any(|byte| *byte != 0));
        let check = !build::sum(&bytes);
        prop_assert_eq!(check % 0xffff, wish % 0xffff);

        let old = [bytes[0], bytes[1]];
        write(&mut bytes, 0, &new);
        prop_assume!(bytes.iter().any(|byte| *byte != 0));
        let found = csum::update(check.to_be_bytes(), csum::delta2(old, new));
        prop_assert_eq!(u16::from_be_bytes(found), !build::sum(&bytes));
        prop_assert_ne!(u16::from_be_bytes(found), 0xffff);
    }
}
