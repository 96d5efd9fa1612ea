//! From one layout of a map's keys or values to another, field by field.

pub(crate) mod btf;
#[cfg(test)]
mod builder;

use btf::{Field, Layout};

/// How bytes of one layout become bytes of another. What the new one has and the old one lacks is zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Conversion {
    size: usize,
    moves: Vec<(Field, Field)>,
}

impl Conversion {
    /// The conversion between two layouts: scalars by path; numbers that do not fit become the largest
    /// that does, arrays are cut or filled with zeroes.
    pub(crate) fn between(from: &Layout, to: &Layout) -> Self {
        let moves = to.fields.iter().filter_map(|(path, to)| {
            let from = from.fields.get(path)?;
            let fits =
                from.count.is_some() == to.count.is_some() && (to.count.is_none() || from.size == to.size);
            fits.then_some((*from, *to))
        });
        Self { size: to.size, moves: moves.collect() }
    }

    /// Bytes stay what they are.
    pub(crate) fn same(size: usize) -> Self {
        let all = Field { offset: 0, size: 1, count: Some(size) };
        Self { size, moves: vec![(all, all)] }
    }

    /// Converts.
    pub(crate) fn apply(&self, bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![0; self.size];
        for (from, to) in &self.moves {
            let length = |field: &Field| field.size * field.count.unwrap_or(1);
            let source = bytes.get(from.offset..).and_then(|rest| rest.get(..length(from)));
            let target = out.get_mut(to.offset..).and_then(|rest| rest.get_mut(..length(to)));
            let (Some(source), Some(target)) = (source, target) else { continue };
            let common = source.len().min(target.len());
            // All machines that this runs on have the low byte first.
            target[..common].copy_from_slice(&source[..common]);
            if from.count.is_none() && source[common..].iter().any(|&byte| byte != 0) {
                target.fill(u8::MAX);
            }
        }
        out
    }
}

/// What is newer in `other` than in `value`, two values of one layout: counters and times that have
/// grown. `None` if nothing has.
pub(crate) fn newer(layout: &Layout, value: &[u8], other: &[u8]) -> Option<Vec<u8>> {
    let mut merged = value.to_vec();
    let mut grown = false;
    for (path, field) in &layout.fields {
        let name = path.rsplit('.').next().unwrap_or(path);
        let grows = ["packets", "bytes", "last_seen"].iter().any(|suffix| name.ends_with(suffix));
        if !grows || field.count.is_some() {
            continue;
        }
        let range = field.offset..field.offset + field.size;
        if let (Some(old), Some(new)) = (value.get(range.clone()), other.get(range.clone()))
            && new.iter().rev().gt(old.iter().rev())
        {
            merged[range].copy_from_slice(new);
            grown = true;
        }
    }
    grown.then_some(merged)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn layout(size: usize, fields: &[(&str, usize, usize, Option<usize>)]) -> Layout {
        let field = |&(path, offset, size, count): &(&str, usize, usize, Option<usize>)| {
            (path.to_owned(), Field { offset, size, count })
        };
        Layout { size, fields: fields.iter().map(field).collect() }
    }

    #[test]
    fn fields_move_grow_and_shrink_by_name() {
        let old = layout(
            20,
            &[("addr", 0, 1, Some(4)), ("state", 4, 4, None), ("packets", 8, 8, None), ("gone", 16, 4, None)],
        );
        let new = layout(
            28,
            &[
                ("packets", 0, 4, None),
                ("state", 8, 8, None),
                ("addr", 16, 1, Some(8)),
                ("fresh", 24, 4, None),
            ],
        );
        let mut bytes = vec![10, 1, 2, 3];
        bytes.extend(7u32.to_le_bytes());
        bytes.extend((1u64 << 40).to_le_bytes());
        bytes.extend(9u32.to_le_bytes());
        let out = Conversion::between(&old, &new).apply(&bytes);
        assert_eq!(out[..4], [255; 4], "too large a number is not cut");
        assert_eq!(out[8..16], 7u64.to_le_bytes());
        assert_eq!(out[16..24], [10, 1, 2, 3, 0, 0, 0, 0]);
        assert_eq!(out[24..], [0; 4]);
    }

    #[test]
    fn a_scalar_and_an_array_of_one_name_have_nothing_in_common() {
        let conversion =
            Conversion::between(&layout(4, &[("a", 0, 4, None)]), &layout(4, &[("a", 0, 1, Some(4))]));
        assert_eq!(conversion.apply(&[1, 2, 3, 4]), [0; 4]);
    }

    #[test]
    fn counters_and_times_only_grow() {
        let layout =
            layout(16, &[("tx_packets", 0, 8, None), ("last_seen", 8, 4, None), ("set", 12, 4, None)]);
        let value = |packets: u64, seen: u32, set: u32| {
            [&packets.to_le_bytes()[..], &seen.to_le_bytes(), &set.to_le_bytes()].concat()
        };
        assert_eq!(newer(&layout, &value(5, 9, 1), &value(5, 8, 2)), None);
        assert_eq!(newer(&layout, &value(255, 9, 1), &value(256, 8, 2)), Some(value(256, 9, 1)));
    }

    proptest! {
        #[test]
        fn there_and_back_is_the_same(bytes in prop::collection::vec(any::<u8>(), 16)) {
            let one = layout(16, &[("a", 0, 4, None), ("b", 4, 4, None), ("c", 8, 1, Some(8))]);
            let two = layout(32, &[("c", 0, 1, Some(12)), ("b", 12, 4, None), ("a", 16, 8, None)]);
            let there = Conversion::between(&one, &two).apply(&bytes);
            prop_assert_eq!(Conversion::between(&two, &one).apply(&there), bytes.clone());
            prop_assert_eq!(Conversion::same(16).apply(&bytes), bytes);
        }
    }
}
