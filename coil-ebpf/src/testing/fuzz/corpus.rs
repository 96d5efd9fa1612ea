//! Cases as files, and how one becomes another.
//!
//! A file of the corpus is text: lines that begin with `#` say what the case is about, the rest is its bytes in
//! hexadecimal.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Most bytes of a case.
pub const MOST: usize = 512;

/// Where the corpus is.
#[must_use]
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// The bytes of a case from its text; `None` if it is none.
#[must_use]
pub fn parse(text: &str) -> Option<Vec<u8>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let digits: Vec<u8> = lines.flat_map(str::bytes).filter(|byte| !byte.is_ascii_whitespace()).collect();
    digits
        .chunks(2)
        .map(|pair| {
            let pair = (pair.len() == 2).then(|| std::str::from_utf8(pair).ok())??;
            u8::from_str_radix(pair, 16).ok()
        })
        .collect()
}

/// The text of a case.
#[must_use]
pub fn text(about: &str, case: &[u8]) -> String {
    let mut text: String = about.lines().map(|line| format!("# {line}\n")).collect();
    for line in case.chunks(32) {
        text.extend(line.iter().map(|byte| format!("{byte:02x}")));
        text.push('\n');
    }
    text
}

/// A name for a case: its hash.
#[must_use]
pub fn name(case: &[u8]) -> String {
    let hash = case.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// All cases of a folder with their names, in the order of those.
///
/// # Errors
///
/// The folder or a file cannot be read, or a file holds no case.
pub fn read(folder: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut cases = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "hex") {
            continue;
        }
        let name = path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let case = parse(&fs::read_to_string(&path)?);
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, format!("{}: no case", path.display()));
        cases.push((name, case.ok_or_else(invalid)?));
    }
    cases.sort();
    Ok(cases)
}

/// Random numbers from a seed: splitmix64.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `bound`, 0 if that is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.any() % (bound.max(1) as u64)).unwrap_or(0)
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        self.any().to_le_bytes()[0]
    }

    /// A case of random bytes.
    pub fn case(&mut self) -> Vec<u8> {
        let length = 16 + self.below(240);
        (0..length).map(|_| self.byte()).collect()
    }

    /// A case that is much like `case`, with pieces of `other`.
    pub fn changed(&mut self, case: &[u8], other: &[u8]) -> Vec<u8> {
        let mut new = case.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(new.len() + 1);
            let rest = new.len() - at;
            match self.below(8) {
                0 | 1 if rest > 0 => new[at] = self.byte(),
                2 if rest > 0 => new[at] = new[at].wrapping_add(1 + (self.byte() & 7)),
                3 => {
                    let count = 1 + self.below(8);
                    let bytes: Vec<u8> = (0..count).map(|_| self.byte()).collect();
                    new.splice(at..at, bytes);
                }
                4 => {
                    let count = self.below(8.min(rest) + 1);
                    new.drain(at..at + count);
                }
                5 => {
                    let from = self.below(other.len() + 1);
                    let count = self.below(other.len() - from + 1);
                    new.splice(at..at, other[from..from + count].iter().copied());
                }
                6 => {
                    let count = self.below(rest + 1);
                    let piece = new[at..at + count].to_vec();
                    new.extend(piece);
                }
                _ => {
                    let count = 1 + self.below(40);
                    new.extend((0..count).map(|_| self.byte()));
                }
            }
            new.truncate(MOST);
        }
        new
    }
}

/// The least that is left of a case that still fails: pieces are taken out, bytes become zero.
pub fn least(case: &[u8], mut fails: impl FnMut(&[u8]) -> bool) -> Vec<u8> {
    let mut best = case.to_vec();
    loop {
        let before = best.clone();
        let mut piece = best.len() / 2;
        while piece > 0 {
            let mut at = 0;
            while at + piece <= best.len() {
                let shorter = [&best[..at], &best[at + piece..]].concat();
                if fails(&shorter) {
                    best = shorter;
                } else {
                    at += piece;
                }
            }
            piece /= 2;
        }
        for at in 0..best.len() {
            let mut plainer = best.clone();
            plainer[at] = 0;
            if best[at] != 0 && fails(&plainer) {
                best = plainer;
            }
        }
        if best == before {
            return best;
        }
    }
}
