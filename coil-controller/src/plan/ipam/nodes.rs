//! Nodes whose blocks must be collected: those that do not exist and have been missing for a while. A node
//! that reboots may be removed and registered again by whoever manages it; its blocks should be there then.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// Which nodes there are, and since when others are missing that have blocks.
#[derive(Clone, Debug, Default)]
pub struct Nodes {
    present: HashSet<String>,
    missing: HashMap<String, Instant>,
}

impl Nodes {
    /// These nodes are there, and no others.
    pub fn replace(&mut self, present: HashSet<String>) {
        self.missing.retain(|node, _| !present.contains(node));
        self.present = present;
    }

    /// A node is there.
    pub fn appeared(&mut self, node: &str) {
        self.missing.remove(node);
        if !self.present.contains(node) {
            self.present.insert(node.to_owned());
        }
    }

    /// A node was deleted.
    pub fn disappeared(&mut self, node: &str) {
        self.present.remove(node);
    }

    /// A node has blocks. If it is missing: since when; the same answer until it appears or is forgotten.
    pub fn has_blocks(&mut self, node: &str, now: Instant) -> Option<Instant> {
        if self.present.contains(node) {
            return None;
        }
        Some(*self.missing.entry(node.to_owned()).or_insert(now))
    }

    /// Only these nodes have blocks.
    pub fn retain(&mut self, has_blocks: impl Fn(&str) -> bool) {
        self.missing.retain(|node, _| has_blocks(node));
    }

    /// A node has no blocks any more.
    pub fn has_none(&mut self, node: &str) {
        self.missing.remove(node);
    }

    /// Time until the blocks of a node must go; nothing if it is there.
    #[must_use]
    pub fn left(&self, node: &str, now: Instant, grace: Duration) -> Option<Duration> {
        let since = self.missing.get(node)?;
        Some(grace.saturating_sub(now.saturating_duration_since(*since)))
    }

    /// How many nodes are missing.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.missing.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(300);

    #[test]
    fn a_node_that_comes_back_in_time_keeps_its_blocks() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut nodes = Nodes::default();
        nodes.replace(["a", "b"].map(str::to_owned).into());
        assert_eq!(nodes.has_blocks("a", start), None);
        assert_eq!(nodes.left("a", start, GRACE), None);
        nodes.disappeared("a");
        assert_eq!(nodes.has_blocks("a", at(10)), Some(at(10)));
        assert_eq!(nodes.left("a", at(100), GRACE), Some(Duration::from_secs(210)));
        nodes.appeared("a");
        assert_eq!(nodes.left("a", at(400), GRACE), None);
        // Gone again: the time starts anew.
        nodes.disappeared("a");
        assert_eq!(nodes.has_blocks("a", at(500)), Some(at(500)));
        // Looked at again and again, it does not.
        assert_eq!(nodes.has_blocks("a", at(700)), Some(at(500)));
        assert_eq!(nodes.left("a", at(800), GRACE), Some(Duration::ZERO));
        assert_eq!(nodes.left("a", at(10_000), GRACE), Some(Duration::ZERO));
        assert_eq!(nodes.missing(), 1);
        nodes.has_none("a");
        assert_eq!(nodes.missing(), 0);
    }

    #[test]
    fn a_new_list_says_who_is_there() {
        let start = Instant::now();
        let mut nodes = Nodes::default();
        assert_eq!(nodes.has_blocks("a", start), Some(start));
        assert_eq!(nodes.has_blocks("b", start), Some(start));
        nodes.replace(["b"].map(str::to_owned).into());
        assert_eq!(nodes.left("b", start, GRACE), None);
        assert_eq!(nodes.left("a", start, GRACE), Some(GRACE));
        nodes.retain(|node| node != "a");
        assert_eq!(nodes.left("a", start, GRACE), None);
        nodes.replace(HashSet::new());
        assert_eq!(nodes.has_blocks("b", start + GRACE), Some(start + GRACE));
    }
}
