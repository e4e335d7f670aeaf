//! The table of layers in ARCHITECTURE.md.

use super::imports::Import;

/// A module: where it is, and what it may use.
#[derive(Debug)]
pub(super) struct Row {
    /// Path below `src`, or `protocol/` and the path below `protocol/src`; without `.rs` and `/mod.rs`.
    pub module: String,
    /// Modules, parts of a module, or `protocol` for all of its modules.
    pub may_use: Vec<String>,
}

/// The rows below `## Layers`, from the top down.
pub(super) fn rows(text: &str) -> Vec<Row> {
    let section = text.split("\n## Layers\n").nth(1).expect("ARCHITECTURE.md has a section `Layers`");
    let lines =
        section.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    lines.skip(2).map(row).collect()
}

fn row(line: &str) -> Row {
    let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
    let [module, may_use, _holds] = cells[..] else { panic!("three columns expected: {line}") };
    let names =
        |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let module = names(module).pop().unwrap_or_else(|| panic!("a module in backticks expected: {line}"));
    Row { module, may_use: names(may_use) }
}

/// How the table spells a file; none for the root of a crate, which only names its modules.
pub(super) fn spelled(path: &str) -> Option<String> {
    let path = path.strip_suffix(".rs")?;
    let path = path.strip_suffix("/mod").unwrap_or(path);
    let (prefix, path) = match path.strip_prefix("protocol/src/") {
        Some(path) => ("protocol/", path),
        None => ("", path.strip_prefix("src/")?),
    };
    (path != "lib").then(|| format!("{prefix}{path}"))
}

/// Is `inner` the module `outer` or a part of it?
pub(super) fn covers(outer: &str, inner: &str) -> bool {
    inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The row that `module` belongs to.
fn row_of(rows: &[Row], module: &str) -> Option<usize> {
    let fits = (0..rows.len()).filter(|row| covers(&rows[*row].module, module));
    fits.max_by_key(|row| rows[*row].module.len())
}

/// Everything in which `rows` and the sources differ.
pub(super) fn differences<'a>(
    rows: &[Row],
    files: impl Iterator<Item = &'a str>,
    imports: &[Import],
) -> Vec<String> {
    let mut found = Vec::new();
    let mut has_files = vec![false; rows.len()];
    for path in files {
        let Some(module) = spelled(path) else { continue };
        match row_of(rows, &module) {
            Some(row) => has_files[row] = true,
            None => found.push(format!("{path}: no row for it")),
        }
    }
    for (row, _) in rows.iter().zip(has_files).filter(|(_, has_files)| !has_files) {
        found.push(format!("row `{}`: no such module", row.module));
    }
    found.extend(upward(rows));
    let mut used: Vec<Vec<bool>> = rows.iter().map(|row| vec![false; row.may_use.len()]).collect();
    for import in imports {
        let (Some(from), Some(to)) = (spelled(&import.from), spelled(&import.to)) else { continue };
        let Some(row) = row_of(rows, &from).filter(|row| row_of(rows, &to) != Some(*row)) else {
            continue;
        };
        let entries = &rows[row].may_use;
        let fits = (0..entries.len()).filter(|entry| covers(&entries[*entry], &to));
        match fits.max_by_key(|entry| entries[*entry].len()) {
            Some(entry) => used[row][entry] = true,
            None => found.push(format!(
                "{}:{} names `{to}`, which row `{}` does not list",
                import.from, import.line, rows[row].module
            )),
        }
    }
    for (row, used) in rows.iter().zip(used) {
        for (entry, _) in row.may_use.iter().zip(used).filter(|(_, used)| !used) {
            found.push(format!("row `{}`: nothing there uses `{entry}`", row.module));
        }
    }
    found
}

/// Entries that point to their own row, to one above it, or nowhere.
fn upward(rows: &[Row]) -> Vec<String> {
    let mut found = Vec::new();
    for (at, row) in rows.iter().enumerate() {
        for entry in &row.may_use {
            let whole = (0..rows.len()).filter(|other| covers(entry, &rows[*other].module));
            let targets: Vec<usize> = whole.chain(row_of(rows, entry)).collect();
            if targets.is_empty() {
                found.push(format!("row `{}`: no module `{entry}`", row.module));
            } else if targets.iter().any(|target| *target <= at) {
                found.push(format!("row `{}`: `{entry}` does not stand below", row.module));
            }
        }
    }
    found
}
