//! Stable short hashes for names.

use serde_json::Value;

/// A hash of a value as ten characters that are safe in names and labels.
pub(super) fn hash(value: &Value) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    // FNV-1a over the compact text: keys of JSON maps are sorted, so equal values have equal texts.
    let mut state = 0xcbf2_9ce4_8422_2325_u64;
    for byte in value.to_string().bytes() {
        state = (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let mut text = String::new();
    let size = ALPHABET.len() as u64;
    for _ in 0..10 {
        let index = usize::try_from(state % size).unwrap_or(0);
        text.push(char::from(ALPHABET[index]));
        state /= size;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn equal_values_equal_hashes() {
        assert_eq!(hash(&json!({"a": 1, "b": 2})), hash(&json!({"b": 2, "a": 1})));
        assert_ne!(hash(&json!({"a": 1})), hash(&json!({"a": 2})));
        assert_eq!(hash(&json!(null)).len(), 10);
    }
}
