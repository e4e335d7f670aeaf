//! Habits of this repository that a reviewer should not have to look for.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

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
        let text = std::fs::read_to_string(root.join(&file)).unwrap();
        found.extend(long_lines(&text).into_iter().map(|(number, line)| format!("{file}:{number}: {line}")));
    }
    assert!(found.is_empty(), "break these lines before column 120:\n{}", found.join("\n"));
}

/// Files of this repository that `text` names in code spans: whole paths, or their ends.
fn named_files(text: &str) -> Vec<&str> {
    let spans = text.split('`').skip(1).step_by(2);
    spans
        .map(|span| span.split("::").next().unwrap_or_default())
        .filter(|span| [".rs", ".py", ".md"].iter().any(|ending| span.ends_with(ending)))
        .filter(|span| !span.starts_with("vllm/") && !span.contains([' ', '*']))
        .collect()
}

#[test]
fn files_that_the_architecture_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let named = named_files(&text);
    assert!(named.len() > 50, "only {named:?}");
    let mut open: Vec<_> = ["src", "protocol", "python-shim", "tests", "scripts"]
        .iter()
        .map(|folder| root.join(folder))
        .collect();
    let mut files = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { open.push(path) } else { files.push(path) }
        }
    }
    let missing: Vec<_> =
        named.iter().filter(|name| !files.iter().any(|file| file.ends_with(name))).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md names files that are not there: {missing:?}");
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

/// What `cargo metadata` says about the workspace and everything it depends on here: what other platforms need was
/// not downloaded for the build.
fn metadata() -> Value {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--offline", "--all-features"])
        .args(["--filter-platform", &platform])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Names of the packages that `root` is built of: its dependencies, theirs and so on, but nothing that
/// only tests or build scripts of the workspace use.
fn built_into(metadata: &Value, root: &str) -> BTreeSet<String> {
    let names: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| (package["id"].as_str().unwrap(), package["name"].as_str().unwrap()))
        .collect();
    let nodes: BTreeMap<&str, &Value> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| (node["id"].as_str().unwrap(), node))
        .collect();
    let mut open: Vec<&str> = names.iter().filter(|(_, name)| **name == root).map(|(id, _)| *id).collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        if !seen.insert(id) {
            continue;
        }
        for dependency in nodes[id]["deps"].as_array().unwrap() {
            let kinds = dependency["dep_kinds"].as_array().unwrap();
            if kinds.iter().any(|kind| kind["kind"].as_str() != Some("dev")) {
                open.push(dependency["pkg"].as_str().unwrap());
            }
        }
    }
    seen.into_iter().map(|id| names[id].to_owned()).collect()
}

/// Is a licence expression satisfied by the `allowed` ones? `/` is how old packages wrote `OR`.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let expression = expression.replace('/', " OR ");
    let any = |alternatives: &str| {
        alternatives.split(" OR ").any(|one| allowed.iter().any(|allowed| allowed == one.trim()))
    };
    if any(&expression) {
        return true;
    }
    expression.split(" AND ").all(|part| any(part.trim().trim_start_matches('(').trim_end_matches(')')))
}

#[test]
fn the_sidecar_is_built_of_what_deny_toml_allows() {
    let metadata = metadata();
    let built = built_into(&metadata, "dp-sidecar");
    assert!(built.len() > 100 && built.contains("zeromq"), "not the sidecar's dependencies: {built:?}");
    // Tests speak libzmq, so that they do not share the mistakes of what they test.
    for banned in ["zmq", "zmq-sys", "openssl-sys", "dp-sidecar-testkit"] {
        assert!(!built.contains(banned), "{banned} is built into the sidecar");
    }
    let rules = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deny.toml")).unwrap();
    let list = rules.split("allow = [").nth(1).unwrap().split(']').next().unwrap();
    let allowed: Vec<String> = list.split('"').skip(1).step_by(2).map(str::to_owned).collect();
    assert!(allowed.iter().any(|license| license == "MIT"), "licences of deny.toml: {allowed:?}");
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        match package["license"].as_str() {
            Some(license) if is_allowed(license, &allowed) => {}
            license => wrong.push(format!("{name}: licence {license:?}")),
        }
        // Ours have no source.
        if let Some(source) = package["source"].as_str()
            && source != "registry+https://github.com/rust-lang/crates.io-index"
        {
            wrong.push(format!("{name}: from {source}"));
        }
    }
    assert!(wrong.is_empty(), "deny.toml does not allow:\n{}", wrong.join("\n"));
}

#[test]
fn one_alternative_of_a_licence_is_enough_and_every_part_of_it_counts() {
    let allowed = ["MIT", "Apache-2.0", "Unicode-3.0"].map(str::to_owned);
    for expression in ["MIT", "GPL-3.0 OR MIT", "MIT/GPL-3.0", "(MIT OR GPL-3.0) AND Unicode-3.0"] {
        assert!(is_allowed(expression, &allowed), "{expression}");
    }
    for expression in ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR Apache-2.0) AND GPL-3.0", ""] {
        assert!(!is_allowed(expression, &allowed), "{expression}");
    }
}

#[test]
fn one_release_of_the_compiler_is_named_everywhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |name: &str| std::fs::read_to_string(root.join(name)).unwrap();
    let value = |text: &str, key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key} = \""))).unwrap();
        line.trim_end_matches('"').to_owned()
    };
    let pinned = value(&read("rust-toolchain.toml"), "channel");
    assert_eq!(pinned.split('.').count(), 3, "a release, not a channel: {pinned}");
    let oldest = value(&read("Cargo.toml"), "rust-version");
    assert!(pinned.starts_with(&format!("{oldest}.")), "pinned {pinned}, rust-version {oldest}");
    assert!(
        read("CONTRIBUTING.md").contains(&format!("Rust {pinned}")),
        "CONTRIBUTING.md names another release"
    );
}
