//! Blocks and owners for tests.

#![allow(clippy::unwrap_used, reason = "tests")]

use coil_api::BlockNets;

use super::block::Range;
use super::ledger::BlockView;
use super::{Assigned, Found, Owner};

pub(super) fn owner(container: &str) -> Owner {
    Owner { container_id: container.into(), ifname: "eth0".into() }
}

pub(super) fn assigned(pool: &str, ipv4: Option<&str>, ipv6: Option<&str>) -> Assigned {
    Assigned {
        pool: pool.into(),
        ipv4: ipv4.map(|text| text.parse().unwrap()),
        ipv6: ipv6.map(|text| text.parse().unwrap()),
    }
}

pub(super) fn found(container: &str, pool: &str, ipv4: Option<&str>, ipv6: Option<&str>) -> Found {
    Found { owner: owner(container), assigned: assigned(pool, ipv4, ipv6) }
}

/// The block `<pool>-<index>` with a UID of its own.
pub(super) fn block(pool: &str, index: i32, ipv4: Option<&str>, ipv6: Option<&str>) -> BlockView {
    let nets = BlockNets {
        ipv4: ipv4.map(|text| text.parse().unwrap()),
        ipv6: ipv6.map(|text| text.parse().unwrap()),
    };
    BlockView {
        name: format!("{pool}-{index}"),
        uid: format!("uid-{pool}-{index}"),
        version: "1".into(),
        index,
        pool: pool.into(),
        range: Range::of(nets).unwrap(),
        reserved: false,
        deleted: false,
    }
}
