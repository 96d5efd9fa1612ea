//! Tables, numbers and JSON as they are printed.

use std::io::{Write, stdout};

use serde::Serialize;

use super::InspectError;

/// What `-o json` prints: one object with a kind and the items.
#[derive(Serialize)]
struct Envelope<'a, T> {
    #[serde(rename = "apiVersion")]
    api_version: &'static str,
    kind: &'a str,
    items: &'a [T],
}

/// Version of the JSON that is printed: fields are added, never removed or changed.
pub(crate) const API_VERSION: &str = "coilctl/v1";

/// Prints a list as JSON.
pub(crate) fn json_list<T: Serialize>(kind: &str, items: &[T]) -> Result<(), InspectError> {
    json(&Envelope { api_version: API_VERSION, kind, items })
}

/// Prints JSON over several lines.
pub(crate) fn json(value: &impl Serialize) -> Result<(), InspectError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| InspectError::Output(error.into()))?;
    line(&text)
}

/// Prints JSON on a line.
pub(crate) fn json_line(value: &impl Serialize) -> Result<(), InspectError> {
    let text = serde_json::to_string(value).map_err(|error| InspectError::Output(error.into()))?;
    line(&text)
}

/// Prints a line.
pub(crate) fn line(text: &str) -> Result<(), InspectError> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .map_err(InspectError::Output)
}

/// Prints a table, or a remark if it is empty.
pub(crate) fn table(headers: &[&str], rows: &[Vec<String>], if_empty: &str) -> Result<(), InspectError> {
    if rows.is_empty() { line(if_empty) } else { line(render(headers, rows).trim_end_matches('\n')) }
}

/// A table as text: columns as wide as they must be, numbers to the right.
pub(crate) fn render(headers: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = headers.iter().map(|header| header.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let numeric: Vec<bool> = (0..headers.len())
        .map(|column| {
            rows.iter().all(|row| {
                row.get(column).is_none_or(|cell| {
                    cell.is_empty()
                        || cell == "-"
                        || cell.starts_with(|c: char| c.is_ascii_digit()) && !cell.contains([':', '/', '.'])
                })
            })
        })
        .collect();
    let mut text = String::new();
    let headers: Vec<String> = headers.iter().map(|header| (*header).to_owned()).collect();
    for row in std::iter::once(&headers).chain(rows) {
        let mut out = String::new();
        for ((cell, width), right) in row.iter().zip(&widths).zip(&numeric) {
            let cell = if cell.is_empty() { "-" } else { cell };
            let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
            if *right {
                out.push_str(&pad);
                out.push_str(cell);
            } else {
                out.push_str(cell);
                out.push_str(&pad);
            }
            out.push_str("  ");
        }
        text.push_str(out.trim_end());
        text.push('\n');
    }
    text
}

/// A number of bytes in few characters.
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count;
    for unit in ["", "K", "M", "G"] {
        if value < 10_000 {
            return format!("{value}{unit}");
        }
        value /= 1024;
    }
    format!("{value}T")
}

/// Seconds in few characters.
pub(crate) fn seconds(count: u32) -> String {
    match count {
        0..60 => format!("{count}s"),
        60..3600 => format!("{}m{:02}s", count / 60, count % 60),
        3600..86400 => format!("{}h{:02}m", count / 3600, count % 3600 / 60),
        _ => format!("{}d{:02}h", count / 86400, count % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = vec![vec!["a".to_owned(), "5".to_owned()], vec!["long".to_owned(), "1000".to_owned()]];
        assert_eq!(render(&["NAME", "PACKETS"], &rows), "NAME  PACKETS\na           5\nlong     1000\n");
    }

    #[test]
    fn an_empty_cell_is_a_dash() {
        assert_eq!(render(&["A", "B"], &[vec![String::new(), "x".into()]]), "A  B\n-  x\n");
    }

    #[test]
    fn times_and_sizes_are_short() {
        assert_eq!(seconds(59), "59s");
        assert_eq!(seconds(125), "2m05s");
        assert_eq!(seconds(7440), "2h04m");
        assert_eq!(seconds(90_000), "1d01h");
        assert_eq!(bytes(9999), "9999");
        assert_eq!(bytes(10_240), "10K");
        assert_eq!(bytes(20 << 30), "20G");
    }
}
