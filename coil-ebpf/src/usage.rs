//! Hashes that choose the cells in which flows are counted, the same in kernel and user space.

use crate::{
    family::{Family, mix},
    flow::Flow,
};

/// Of a client of a gateway.
#[inline(always)]
#[must_use]
pub fn client<F: Family>(seed: u32, addr: &F::Addr) -> u64 {
    mix(F::mix(u64::from(!seed), addr), 1)
}

/// Of a destination of a gateway's clients: protocol, address, port.
#[inline(always)]
#[must_use]
pub fn remote<F: Family>(seed: u32, addr: &F::Addr, port: [u8; 2], protocol: u8) -> u64 {
    let [a, b] = port;
    mix(F::mix(u64::from(seed), addr), u32::from_ne_bytes([a, b, protocol, 2]))
}

/// Of a client with a destination, by their hashes.
#[inline(always)]
#[must_use]
pub const fn pair(client: u64, remote: u64) -> u64 {
    mix(client ^ remote.rotate_left(17), 3)
}

/// Of a pod of a node, by the low half of the index of its interface, as its flows have it.
#[inline(always)]
#[must_use]
pub const fn pod(seed: u32, interface: u16) -> u64 {
    mix(mix(seed as u64, interface as u32), 4)
}

/// Hashes of a flow as the client sends it: of the client, of the destination, of both.
#[inline(always)]
#[must_use]
pub fn of_flow<F: Family>(seed: u32, flow: &Flow<F>, protocol: u8) -> [u64; 3] {
    let client = client::<F>(seed, &flow.src());
    let remote = remote::<F>(seed, &flow.dst(), flow.dst_port(), protocol);
    [client, remote, pair(client, remote)]
}

#[cfg(test)]
mod tests {
    use coil_common::usage::{Share, gateway_cells};

    use super::*;
    use crate::family::V4;

    #[test]
    fn clients_spread_over_both_rows() {
        let mut cells = std::collections::BTreeMap::<_, u32>::new();
        for addr in 0..4096u32 {
            let addr = addr.to_be().wrapping_add(10);
            *cells.entry(gateway_cells(0, Share::Client, client::<V4>(7, &addr))).or_default() += 1;
        }
        // 4096 clients in 2^28 pairs of cells.
        assert!(cells.len() > 4090, "{}", cells.len());
        for row in 0..2 {
            let distinct: std::collections::BTreeSet<_> = cells.keys().map(|cells| cells[row]).collect();
            assert!(distinct.len() > 3400, "{}", distinct.len());
        }
    }

    #[test]
    fn a_pair_is_neither_its_client_nor_its_remote() {
        let flow = Flow::<V4>::new(&1, &2, [3, 4], [5, 6], 6);
        let other = Flow::<V4>::new(&1, &2, [9, 9], [5, 6], 6);
        let [client, remote, pair] = of_flow(7, &flow, 6);
        assert_eq!([client, remote, pair], of_flow(7, &other, 6));
        assert!(client != remote && remote != pair && pair != client);
        assert_ne!(pair, of_flow(7, &flow, 17)[2]);
        assert_ne!(pair, of_flow(8, &flow, 6)[2]);
    }
}
