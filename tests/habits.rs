//! Habits of this repository that a reviewer should not have to look for.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

/// Text up to this column is readable beside a diff; `.editorconfig` says the same.
const MARKDOWN_COLUMNS: usize = 119;

/// Markdown files of the repository, but not of build outputs, caches and environments.
fn markdown_files() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut open = vec![root.to_owned()];
    let mut found = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && !path.is_symlink() {
                if !name.starts_with('.') && name != "target" {
                    open.push(path);
                }
            } else if name.ends_with(".md") {
                found.push(path.strip_prefix(root).unwrap().to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    found
}

/// Lines of `text` that are longer than the limit although they could be broken: rows of tables
/// and single words cannot be.
fn long_lines(text: &str) -> Vec<(usize, &str)> {
    (1..)
        .zip(text.lines())
        .filter(|(_, line)| line.chars().count() > MARKDOWN_COLUMNS)
        .filter(|(_, line)| !line.starts_with('|') && line.trim().contains(' '))
        .collect()
}

#[test]
fn markdown_stays_under_120_columns() {
    let files = markdown_files();
    assert!(files.len() > 10, "only {files:?}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for file in files {
        // These two are wrapped by what rewrites them next.
        if ["python-shim/README.md", "tests/README.md"].contains(&file.as_str()) {
            continue;
        }
        let text = std::fs::read_to_string(root.join(&file)).unwrap();
        found.extend(long_lines(&text).into_iter().map(|(number, line)| format!("{file}:{number}: {line}")));
    }
    assert!(found.is_empty(), "break these lines before column 120:\n{}", found.join("\n"));
}

#[test]
fn only_what_can_be_broken_counts_as_a_long_line() {
    let words = "word ".repeat(30);
    let name = "a".repeat(130);
    let text = format!("short\n{words}\n| {words}|\n  `{name}`,\n");
    assert_eq!(long_lines(&text), [(2, words.as_str())]);
    let umlauts = "ä ".repeat(59);
    assert!(long_lines(&umlauts).is_empty(), "columns are characters, not bytes");
}
