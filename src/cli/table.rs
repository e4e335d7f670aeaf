//! Plain tables: columns as wide as their content, numbers to the right.

use std::fmt::Write as _;

/// A table with these columns, each line indented by two spaces. A column whose name starts with `>` is aligned to the
/// right.
pub(super) fn table<const N: usize>(
    columns: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let header = columns.map(|name| name.trim_start_matches('>').to_owned());
    let rows: Vec<[String; N]> = std::iter::once(header).chain(rows).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::from(" ");
        for ((cell, width), column) in row.iter().zip(widths).zip(columns) {
            let _ = match column.starts_with('>') {
                true => write!(line, " {cell:>width$}"),
                false => write!(line, " {cell:<width$}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_content_and_numbers_stand_to_the_right() {
        let rows = [["a", "1", "ok"], ["längst", "1000", ""]].map(|row| row.map(str::to_owned));
        let table = table(["name", ">n", "state"], rows);
        assert_eq!(table, "  name      n state\n  a         1 ok\n  längst 1000\n");
    }
}
