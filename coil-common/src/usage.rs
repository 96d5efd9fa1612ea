//! Who uses how much: how counts of flows and excluded ports are laid out in arrays.
//!
//! Counts stand in plain arrays that both sides add to atomically: the datapath when a flow is made,
//! user space (which maps the array into its memory) when it removes one. A user has a *cell* in each
//! of two rows, chosen by a hash; what it uses is the smaller of both, which is right unless others
//! share both cells, and never too low.

/// Cells of a row of a gateway, a power of two.
pub const GATEWAY_CELLS: u32 = 1 << 14;
/// Cells of a row of a node, a power of two.
pub const POD_CELLS: u32 = 1 << 12;
/// Rows in which a user has a cell.
pub const ROWS: u32 = 2;

/// Counts of a gateway for one family: flows of clients, flows of clients to a remote.
const GATEWAY_FAMILY: u32 = 2 * ROWS * GATEWAY_CELLS;
/// Entries of `gateway_usage`: both families, and the number of flows of each.
pub const GATEWAY_USAGE: usize = (2 * GATEWAY_FAMILY + 2) as usize;
/// Entries of `pod_usage`.
pub const POD_USAGE: usize = (2 * ROWS * POD_CELLS) as usize;

/// What is counted of a gateway's flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// Flows of a client.
    Client = 0,
    /// Flows of a client to an address and port.
    Remote = 1,
}

/// Index of the count of all flows of a family (0 is IPv4, 1 is IPv6) in `gateway_usage`.
#[inline(always)]
#[must_use]
pub const fn gateway_total(family: u32) -> u32 {
    2 * GATEWAY_FAMILY + family
}

/// Indices of the cells that belong to a hash in `gateway_usage`.
#[inline(always)]
#[must_use]
pub const fn gateway_cells(family: u32, share: Share, hash: u64) -> [u32; ROWS as usize] {
    let start = family * GATEWAY_FAMILY + share as u32 * ROWS * GATEWAY_CELLS;
    cells(start, GATEWAY_CELLS, hash)
}

/// Indices of the cells that belong to a hash in `pod_usage`.
#[inline(always)]
#[must_use]
pub const fn pod_cells(family: u32, hash: u64) -> [u32; ROWS as usize] {
    cells(family * ROWS * POD_CELLS, POD_CELLS, hash)
}

/// Two halves of a hash choose the cells.
#[inline(always)]
const fn cells(start: u32, size: u32, hash: u64) -> [u32; ROWS as usize] {
    let low = (hash & (size as u64 - 1)) as u32;
    let high = (hash >> 32 & (size as u64 - 1)) as u32;
    [start + low, start + size + high]
}

/// Words of 64 ports that one protocol has in `excluded_ports`.
const PORT_WORDS: u32 = 65_536 / 64;
/// Entries of `excluded_ports`: TCP, then UDP.
pub const EXCLUDED_PORTS: usize = 2 * PORT_WORDS as usize;

/// Where the bit of a port is in `excluded_ports`: the index of its word, and the bit.
#[inline(always)]
#[must_use]
pub const fn excluded_port(udp: bool, port: u16) -> (u32, u64) {
    let first = if udp { PORT_WORDS } else { 0 };
    (first + (port as u32 >> 6), 1 << (port as u64 & 63))
}

/// Entries of `full_remotes` for one family, a power of two.
const FULL_FAMILY: u32 = 1 << 12;
/// Entries of `full_remotes`.
pub const FULL_REMOTES: usize = 2 * FULL_FAMILY as usize;

/// Index in `full_remotes` of the remote with this hash. An entry holds the upper 24 bits of the
/// hash, eight bits for the number of searches in vain, and the second since boot until which they count.
#[inline(always)]
#[must_use]
pub const fn full_remote(family: u32, hash: u64) -> u32 {
    family * FULL_FAMILY + (hash & (FULL_FAMILY as u64 - 1)) as u32
}

/// Ports that are tried for a new flow, its own included.
pub const PROBES: u32 = 32;
/// Entries of `port_probes`: how many flows needed so many tries, the last one for those in vain.
pub const PORT_PROBES: usize = PROBES as usize + 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_stay_in_their_own_rows() {
        let mut seen = [0u32; 4];
        for family in 0..2 {
            for share in [Share::Client, Share::Remote] {
                for hash in [0, u64::MAX, 0x1234_5678_9abc_def0] {
                    let [a, b] = gateway_cells(family, share, hash);
                    let row = |cell: u32| cell / GATEWAY_CELLS;
                    assert_eq!(row(a), (family * 2 + share as u32) * ROWS);
                    assert_eq!(row(b), row(a) + 1);
                    seen[(family * 2 + share as u32) as usize] += 1;
                }
            }
            assert!(pod_cells(family, u64::MAX).iter().all(|cell| (*cell as usize) < POD_USAGE));
        }
        assert_eq!(seen, [3; 4]);
        assert_eq!(gateway_total(1) as usize, GATEWAY_USAGE - 1);
        assert!(gateway_cells(1, Share::Remote, u64::MAX)[1] < gateway_total(0));
    }

    #[test]
    fn each_port_has_a_bit_of_its_own() {
        assert_eq!(excluded_port(false, 0), (0, 1));
        assert_eq!(excluded_port(false, 65_535), (1023, 1 << 63));
        assert_eq!(excluded_port(true, 64), (1025, 1));
        assert_eq!(excluded_port(true, 65_535).0 as usize, EXCLUDED_PORTS - 1);
    }
}
