//! Plain tables: columns as wide as their content, numbers to the right.

/// A table that is built row by row.
#[derive(Debug)]
pub(super) struct Table {
    header: Vec<&'static str>,
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns. A column whose name starts with `>` is aligned to the right.
    pub(super) fn new(columns: &[&'static str]) -> Self {
        Self {
            header: columns.iter().map(|name| name.trim_start_matches('>')).collect(),
            right: columns.iter().map(|name| name.starts_with('>')).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The text, each line indented by two spaces.
    pub(super) fn render(&self) -> String {
        let header: Vec<String> = self.header.iter().map(|name| (*name).to_owned()).collect();
        let width = |column: usize| {
            std::iter::once(&header)
                .chain(&self.rows)
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..header.len()).map(width).collect();
        let mut text = String::new();
        for row in std::iter::once(&header).chain(&self.rows) {
            let mut line = String::from(" ");
            for (column, cell) in row.iter().enumerate() {
                let width = widths.get(column).copied().unwrap_or(0);
                if self.right.get(column).copied().unwrap_or(false) {
                    line.push_str(&format!(" {cell:>width$}"));
                } else {
                    line.push_str(&format!(" {cell:<width$}"));
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_content_and_numbers_stand_to_the_right() {
        let mut table = Table::new(&["name", ">n", "state"]);
        table.row(vec!["a".into(), "1".into(), "ok".into()]);
        table.row(vec!["längst".into(), "1000".into(), String::new()]);
        assert_eq!(table.render(), "  name      n state\n  a         1 ok\n  längst 1000\n");
    }
}
