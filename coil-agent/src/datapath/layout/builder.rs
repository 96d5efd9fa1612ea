//! Hand-made BTF for tests, here and in `tests/privileged`.

#![allow(clippy::unwrap_used, reason = "tests")]

/// Makes a blob, type by type; each returns its id.
#[derive(Default)]
pub(crate) struct Builder {
    types: Vec<u8>,
    strings: Vec<u8>,
    last: u32,
}

impl Builder {
    fn string(&mut self, text: &str) -> u32 {
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        let at = u32::try_from(self.strings.len()).unwrap();
        self.strings.extend(text.bytes().chain([0]));
        at
    }

    fn words(&mut self, words: &[u32]) {
        self.types.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    }

    fn next(&mut self) -> u32 {
        self.last += 1;
        self.last
    }

    /// An unsigned number.
    pub(crate) fn int(&mut self, bytes: u32) -> u32 {
        let name = self.string(&format!("u{}", bytes * 8));
        self.words(&[name, 1 << 24, bytes, bytes * 8]);
        self.next()
    }

    /// An array.
    pub(crate) fn array(&mut self, element: u32, count: u32) -> u32 {
        let index = self.int(4);
        self.words(&[0, 3 << 24, 0, element, index, count]);
        self.next()
    }

    /// A structure with members as name, type and offset in bytes.
    pub(crate) fn structure(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
        let name = self.string(name);
        let members: Vec<_> =
            members.iter().map(|(name, id, offset)| [self.string(name), *id, offset * 8]).collect();
        self.words(&[name, 4 << 24 | u32::try_from(members.len()).unwrap(), size]);
        for member in members {
            self.words(&member);
        }
        self.next()
    }

    /// All of it (kernel: `struct btf_header`).
    pub(crate) fn blob(&self) -> Vec<u8> {
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
        let mut blob = Vec::from(0xeb9f_u16.to_ne_bytes());
        blob.extend([1, 0]);
        let header = [24, 0, length(&self.types), length(&self.types), length(&self.strings)];
        blob.extend(header.iter().flat_map(|word| word.to_ne_bytes()));
        blob.extend(&self.types);
        blob.extend(&self.strings);
        blob
    }
}
