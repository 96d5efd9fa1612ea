//! Layouts of keys and values from BTF (kernel: `Documentation/bpf/btf.rst`, `include/uapi/linux/btf.h`).
//!
//! Reads as much of the format as map types need: integers, enumerations, arrays, structures and what
//! only qualifies them. Whatever else a type consists of makes it opaque, which callers treat as "not
//! known", never as "the same".

use std::collections::BTreeMap;

const MAGIC: u16 = 0xeb9f;
const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;
/// Deepest nesting of types that is followed; the real ones have four.
const MAX_DEPTH: usize = 16;

/// One scalar, or one array of scalars, of a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    /// Bytes before it.
    pub(crate) offset: usize,
    /// Bytes of one element.
    pub(crate) size: usize,
    /// Elements, if it is an array.
    pub(crate) count: Option<usize>,
}

/// A type as its size and its scalars by path, such as `key.dst`. Two types with equal layouts can
/// stand for each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) size: usize,
    pub(crate) fields: BTreeMap<String, Field>,
}

/// Type information of a map or an object.
#[derive(Debug)]
pub(crate) struct Btf {
    types: Vec<Type>,
    strings: Vec<u8>,
}

#[derive(Debug)]
struct Type {
    kind: u32,
    size_or_type: u32,
    /// Members as name, type and bit offset; of an array its element type and length.
    members: Vec<(u32, u32, u32)>,
}

impl Btf {
    /// Parses a blob in the machine's byte order; `None` if it is damaged.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let magic = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
        };
        let index = |at: usize| word(at).and_then(|value| usize::try_from(value).ok());
        if magic != MAGIC {
            return None;
        }
        let header = index(4)?;
        let section = |offset: usize, length: usize| {
            let start = header.checked_add(index(offset)?)?;
            let end = start.checked_add(index(length)?)?;
            (end <= bytes.len()).then_some(start..end)
        };
        let (types_at, strings_at) = (section(8, 12)?, section(16, 20)?);
        // Type 0 is void.
        let mut types = vec![Type { kind: 0, size_or_type: 0, members: Vec::new() }];
        let mut at = types_at.start;
        while at < types_at.end {
            let info = word(at + 4)?;
            let (kind, count) = ((info >> 24) & 0x1f, usize::try_from(info & 0xffff).ok()?);
            let is_bitfield = info >> 31 != 0;
            let size_or_type = word(at + 8)?;
            at += 12;
            let (length, members) = match kind {
                KIND_INT | KIND_VAR | KIND_DECL_TAG => (4, Vec::new()),
                KIND_ARRAY => (12, vec![(0, word(at)?, word(at + 8)?)]),
                KIND_STRUCT | KIND_UNION => {
                    let member = |n: usize| {
                        let at = at + n * 12;
                        let offset = word(at + 8)?;
                        // A bit field is no scalar that can be copied by bytes.
                        let offset = match is_bitfield {
                            true if offset >> 24 != 0 => u32::MAX,
                            true => offset & 0x00ff_ffff,
                            false => offset,
                        };
                        Some((word(at)?, word(at + 4)?, offset))
                    };
                    (count * 12, (0..count).map(member).collect::<Option<Vec<_>>>()?)
                }
                KIND_ENUM | KIND_FUNC_PROTO => (count * 8, Vec::new()),
                KIND_DATASEC | KIND_ENUM64 => (count * 12, Vec::new()),
                _ => (0, Vec::new()),
            };
            at += length;
            types.push(Type { kind, size_or_type, members });
        }
        Some(Self { types, strings: bytes.get(strings_at)?.to_vec() })
    }

    /// The layout of a type; `None` if it has parts that cannot be copied by bytes.
    pub(crate) fn layout(&self, id: u32) -> Option<Layout> {
        let mut layout = Layout { size: self.size(id, 0)?, fields: BTreeMap::new() };
        self.collect(id, 0, String::new(), 0, &mut layout.fields)?;
        Some(layout)
    }

    fn get(&self, id: u32) -> Option<&Type> {
        self.types.get(usize::try_from(id).ok()?)
    }

    fn name(&self, offset: u32) -> Option<&str> {
        let rest = self.strings.get(usize::try_from(offset).ok()?..)?;
        std::str::from_utf8(rest.split(|&byte| byte == 0).next()?).ok()
    }

    fn size(&self, id: u32, depth: usize) -> Option<usize> {
        let found = self.get(id).filter(|_| depth < MAX_DEPTH)?;
        match found.kind {
            KIND_INT | KIND_ENUM | KIND_ENUM64 | KIND_STRUCT => usize::try_from(found.size_or_type).ok(),
            KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_TYPE_TAG => {
                self.size(found.size_or_type, depth + 1)
            }
            KIND_ARRAY => {
                let &(_, element, count) = found.members.first()?;
                self.size(element, depth + 1)?.checked_mul(usize::try_from(count).ok()?)
            }
            _ => None,
        }
    }

    fn collect(
        &self,
        id: u32,
        offset: usize,
        path: String,
        depth: usize,
        fields: &mut BTreeMap<String, Field>,
    ) -> Option<()> {
        let found = self.get(id).filter(|_| depth < MAX_DEPTH)?;
        match found.kind {
            KIND_INT | KIND_ENUM | KIND_ENUM64 => {
                fields.insert(path, Field { offset, size: self.size(id, depth)?, count: None });
            }
            KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_TYPE_TAG => {
                self.collect(found.size_or_type, offset, path, depth + 1, fields)?;
            }
            KIND_ARRAY => {
                let &(_, element, count) = found.members.first()?;
                let count = usize::try_from(count).ok()?;
                let mut inner = BTreeMap::new();
                self.collect(element, 0, String::new(), depth + 1, &mut inner)?;
                // Arrays of structures are not in use; an array of arrays counts as one.
                let [(name, field)] = inner.into_iter().collect::<Vec<_>>().try_into().ok()?;
                if !name.is_empty() {
                    return None;
                }
                let count = field.count.unwrap_or(1).checked_mul(count)?;
                fields.insert(path, Field { offset, size: field.size, count: Some(count) });
            }
            KIND_STRUCT => {
                for &(name, member, bits) in &found.members {
                    if bits % 8 != 0 {
                        return None;
                    }
                    let name = self.name(name)?;
                    let path = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
                    let offset = offset.checked_add(usize::try_from(bits / 8).ok()?)?;
                    self.collect(member, offset, path, depth + 1, fields)?;
                }
            }
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

    use super::super::builder::Builder;
    use super::*;

    #[test]
    fn structures_become_paths() {
        let mut builder = Builder::default();
        let (byte, word) = (builder.int(1), builder.int(4));
        let address = builder.array(byte, 16);
        let key = builder.structure("Key", 20, &[("addr", address, 0), ("port", word, 16)]);
        let outer = builder.structure("Outer", 28, &[("length", word, 0), ("key", key, 8)]);
        let btf = Btf::parse(&builder.blob()).unwrap();
        let layout = btf.layout(outer).unwrap();
        assert_eq!(layout.size, 28);
        let fields: Vec<_> = layout.fields.iter().map(|(path, field)| (path.as_str(), *field)).collect();
        assert_eq!(
            fields,
            [
                ("key.addr", Field { offset: 8, size: 1, count: Some(16) }),
                ("key.port", Field { offset: 24, size: 4, count: None }),
                ("length", Field { offset: 0, size: 4, count: None }),
            ]
        );
        let scalar = btf.layout(word).unwrap();
        assert_eq!(scalar.fields[""], Field { offset: 0, size: 4, count: None });
        assert_eq!(btf.layout(0), None);
        assert_eq!(btf.layout(99), None);
    }

    #[test]
    fn damaged_blobs_are_no_panic() {
        let mut builder = Builder::default();
        let word = builder.int(4);
        let id = builder.structure("S", 4, &[("a", word, 0)]);
        let blob = builder.blob();
        for length in 0..blob.len() {
            assert!(Btf::parse(&blob[..length]).is_none(), "{length}");
        }
        for at in 0..blob.len() {
            for bit in 0..8 {
                let mut damaged = blob.clone();
                damaged[at] ^= 1 << bit;
                // Whatever comes out, nothing panics and nothing loops.
                if let Some(btf) = Btf::parse(&damaged) {
                    (0..8).for_each(|id| drop(btf.layout(id)));
                }
            }
        }
        assert!(Btf::parse(&blob).unwrap().layout(id).is_some());
    }

    #[test]
    #[cfg_attr(ebpf_stub, ignore = "needs the eBPF object")]
    fn the_objects_own_layouts_are_read() {
        let bytes = crate::datapath::object::object().unwrap();
        let object = aya_obj::Object::parse(bytes).unwrap();
        let btf = Btf::parse(&object.btf.as_ref().unwrap().to_bytes()).unwrap();
        let aya_obj::Map::Btf(map) = &object.maps["flows_v4"] else { panic!("not a BTF map") };
        let value = btf.layout(map.def.btf_value_type_id).unwrap();
        assert_eq!(value.size, size_of::<coil_common::values::FlowValue>());
        assert_eq!(
            value.fields["tx_packets"].offset,
            std::mem::offset_of!(coil_common::values::FlowValue, tx_packets)
        );
    }
}
