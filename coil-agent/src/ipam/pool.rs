//! Which block of a pool the next address is from. Pure.

use super::block::Offsets;

/// The block, and the offset in it, whose next address has rested for the longest time; one that nobody has
/// had yet is best. Among equals the first in the order of the list. Nothing if all blocks are full.
pub fn choose<'a, K>(blocks: impl IntoIterator<Item = (K, &'a Offsets)>) -> Option<(K, u64)> {
    blocks
        .into_iter()
        .filter_map(|(key, offsets)| offsets.next().map(|(offset, freed)| (freed, key, offset)))
        .min_by_key(|(freed, ..)| *freed)
        .map(|(_, key, offset)| (key, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(size: u64, taken: u64, freed: Option<(u64, u64)>) -> Offsets {
        let mut offsets = Offsets::new(size);
        for offset in 0..taken {
            assert!(offsets.take(offset));
        }
        if let Some((offset, time)) = freed {
            assert!(offsets.free(offset, time));
        }
        offsets
    }

    #[test]
    fn what_has_rested_for_the_longest_time_is_next() {
        let full = block(2, 2, None);
        let begun = block(2, 1, None);
        let fresh = block(2, 0, None);
        let just_freed = block(2, 2, Some((1, 7)));
        let freed_before = block(2, 2, Some((0, 3)));
        assert_eq!(choose([("full", &full), ("begun", &begun), ("fresh", &fresh)]), Some(("begun", 1)));
        assert_eq!(choose([("just", &just_freed), ("fresh", &fresh)]), Some(("fresh", 0)));
        assert_eq!(choose([("just", &just_freed), ("before", &freed_before)]), Some(("before", 0)));
        assert_eq!(choose([("full", &full), ("just", &just_freed)]), Some(("just", 1)));
        assert_eq!(choose([("full", &full)]), None);
        assert_eq!(choose(Vec::<((), &Offsets)>::new()), None);
    }
}
