//! Which module may use which: the table of layers in ARCHITECTURE.md against the sources, and rules about other
//! crates. Comments do not count.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "layering/imports.rs"]
mod imports;
#[path = "layering/table.rs"]
mod table;

use std::path::{Path, PathBuf};

use imports::{Sources, circles};
use table::covers;

/// A source file, without its comments.
struct Source {
    /// Relative to the repository, with `/`.
    path: String,
    /// Line number and code of each line that has code.
    lines: Vec<(usize, String)>,
    /// First line of the unit tests at the end of the file, if there are any.
    tests_from: Option<usize>,
}

/// Everything with a `rs` extension below `folder`.
fn sources(folder: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut open = vec![root.join(folder)];
    let mut found = Vec::new();
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target") {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(read(root, path));
            }
        }
    }
    assert!(!found.is_empty(), "no sources in {folder}");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn read(root: &Path, path: PathBuf) -> Source {
    let text = std::fs::read_to_string(&path).unwrap();
    let path = path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/");
    let mut lines = Vec::new();
    let mut tests_from = None;
    for (number, line) in (1..).zip(text.lines()) {
        let code = line.split("//").next().unwrap_or_default().trim();
        if code.starts_with("#[cfg(test)]") || code.starts_with("#[cfg(all(test") {
            tests_from.get_or_insert(number);
        }
        if !code.is_empty() {
            lines.push((number, code.to_owned()));
        }
    }
    // Modules that are compiled for tests only, by the naming of this repository.
    let stem = path.rsplit('/').next().unwrap_or_default();
    if ["simulation.rs", "tests.rs"].contains(&stem) || path.contains("/simulation/") {
        tests_from = Some(0);
    }
    Source { path, lines, tests_from }
}

/// Does `code` name the path or identifier `name`, not as a part of a longer word?
fn names(code: &str, name: &str) -> bool {
    let word = |character: char| character.is_alphanumeric() || character == '_';
    code.match_indices(name).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + name.len()..].chars().next();
        // A field or method of the same name is something else.
        let joined_before = before.is_some_and(|c| word(c) || c == '.' || c == '"');
        let joined_after = name.chars().last().is_some_and(word) && after.is_some_and(word);
        !joined_before && !joined_after
    })
}

/// Collects the places of `sources` that name one of `forbidden` and are not `allowed`.
fn violations(
    sources: &[Source],
    forbidden: &[&str],
    with_tests: bool,
    allowed: impl Fn(&str) -> bool,
) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|source| !allowed(&source.path)) {
        for (number, code) in &source.lines {
            if !with_tests && source.tests_from.is_some_and(|from| *number >= from) {
                break;
            }
            for name in forbidden.iter().filter(|name| names(code, name)) {
                found.push(format!("{}:{number} names {name}: {code}", source.path));
            }
        }
    }
    found
}

#[track_caller]
fn assert_none(rule: &str, found: &[String]) {
    assert!(found.is_empty(), "{rule}\n{}", found.join("\n"));
}

/// Files that name each other are one module: a file, and files of the folder of its name.
fn is_one_module(circle: &[&str]) -> bool {
    let modules: Vec<String> = circle.iter().filter_map(|path| table::spelled(path)).collect();
    modules.iter().any(|parent| modules.iter().all(|module| covers(parent, module)))
}

#[test]
fn every_module_uses_what_its_row_in_the_table_of_layers_lists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let rows = table::rows(&std::fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap());
    let sources = Sources::read(root);
    let found = table::differences(&rows, sources.paths(), &sources.imports());
    assert_none("the table of layers in ARCHITECTURE.md and the sources differ", &found);
}

#[test]
fn files_in_a_circle_are_one_module() {
    let imports = Sources::read(Path::new(env!("CARGO_MANIFEST_DIR"))).imports();
    let circles = circles(&imports);
    let found: Vec<String> =
        circles.iter().filter(|circle| !is_one_module(circle)).map(|circle| circle.join(", ")).collect();
    assert_none("these files name each other, and none of them is the parent of the others", &found);
}

#[test]
fn names_are_followed_to_the_file_that_declares_them() {
    let sources = Sources::of(&[
        ("src/lib.rs", "pub mod low; mod top; pub use low::Deep;"),
        ("src/low/mod.rs", "mod deep; pub use deep::*; pub struct Low; #[cfg(test)] mod tests;"),
        ("src/low/deep.rs", "pub struct Deep; pub fn work() {} mod inside { use super::Deep; }"),
        ("src/low/tests.rs", "use crate::top::Top;"),
        (
            "src/top.rs",
            "use crate::low::{self, Low}; fn f() { low::work(); g!(x, crate::Deep) } #[cfg(test)] mod x {}",
        ),
        ("protocol/src/lib.rs", "mod ids; pub use ids::Id; fn f() { std::mem::swap(); ids::g() }"),
        ("protocol/src/ids.rs", "pub struct Id; fn f(id: dp_sidecar_protocol::Id) { low::Low }"),
    ]);
    let found = sources.imports();
    let found: Vec<_> = found.iter().map(|import| (import.from.as_str(), import.to.as_str())).collect();
    let expected = [
        ("protocol/src/lib.rs", "protocol/src/ids.rs"),
        ("src/lib.rs", "src/low/deep.rs"),
        ("src/lib.rs", "src/low/mod.rs"),
        ("src/low/mod.rs", "src/low/deep.rs"),
        ("src/top.rs", "src/low/deep.rs"),
        ("src/top.rs", "src/low/mod.rs"),
    ];
    assert_eq!(found, expected);
}

#[test]
fn each_difference_between_table_and_sources_is_found() {
    let check = |table: &str, sources: &[(&str, &str)]| {
        let sources = Sources::of(sources);
        let rows = table::rows(&format!("\n## Layers\n\n|module|may use|holds|\n|---|---|---|\n{table}"));
        table::differences(&rows, sources.paths(), &sources.imports())
    };
    let sources =
        [("src/a.rs", "use crate::b::c::C;"), ("src/b/mod.rs", ""), ("src/b/c.rs", "pub struct C;")];
    let none: [&str; 0] = [];
    assert_eq!(check("|`a`|`b`|x|\n|`b`||y|\n", &sources), none);
    assert_eq!(check("|`a`|`b/c`|x|\n|`b`||y|\n", &sources), none);
    for (table, expected) in [
        ("|`a`|`b`|x|\n", "src/b/c.rs: no row for it"),
        ("|`a`|`b`|x|\n|`b`||y|\n|`c`||z|\n", "row `c`: no such module"),
        ("|`a`||x|\n|`b`||y|\n", "src/a.rs:1 names `b/c`, which row `a` does not list"),
        ("|`a`|`b`|x|\n|`b`|`c`|y|\n|`c`||z|\n", "row `b`: nothing there uses `c`"),
        ("|`b`||y|\n|`a`|`b`|x|\n", "row `a`: `b` does not stand below"),
    ] {
        let found = check(table, &sources);
        assert!(found.iter().any(|found| found == expected), "{expected}: {found:?}");
    }
    assert!(is_one_module(&["src/a.rs", "src/a/b.rs", "src/a/c.rs"]));
    assert!(!is_one_module(&["src/a/b.rs", "src/a/c.rs"]));
}

#[test]
fn only_the_transport_names_the_zeromq_crate() {
    let found = violations(&sources("src"), &["zeromq::", "use zeromq"], true, |path| {
        path.starts_with("src/transport/")
    });
    assert_none("the zeromq crate belongs behind src/transport", &found);
}

#[test]
fn only_the_command_line_parses_with_clap() {
    // A value type may derive `clap::ValueEnum`; parsing and its types stay in one place.
    let forbidden = [
        "use clap",
        "clap::Parser",
        "clap::Args",
        "clap::Subcommand",
        "clap::Command",
        "clap::ArgMatches",
        "clap::builder",
    ];
    let found = violations(&sources("src"), &forbidden, true, |path| {
        path == "src/cli.rs" || path.starts_with("src/cli/")
    });
    assert_none("parsing of the command line belongs in src/cli", &found);
}

#[test]
fn only_the_supervisor_and_the_command_line_start_processes() {
    let forbidden = ["process::Command", "tokio::process", "Command::new", "unistd::fork", "unistd::execv"];
    let found = violations(&sources("src"), &forbidden, false, |path| {
        path.starts_with("src/supervisor/") || path == "src/cli.rs" || path.starts_with("src/cli/")
    });
    assert_none("processes are started by src/supervisor, the keeper by src/cli", &found);
}

#[test]
fn only_the_supervisor_signals_processes() {
    let found = violations(
        &sources("src"),
        &["signal::kill", "signal::killpg", "kill_process", "kill_process_group"],
        false,
        |path| path.starts_with("src/supervisor/"),
    );
    assert_none("processes are stopped by src/supervisor", &found);
}

#[test]
fn the_protocol_crate_does_no_io_and_reads_no_clock() {
    let forbidden = [
        "tokio",
        "zeromq",
        "zmq",
        "dp_sidecar",
        "std::net",
        "std::fs",
        "std::process",
        "std::thread",
        "std::env",
        "Instant",
        "SystemTime",
        "HashMap",
        "HashSet",
    ];
    let found = violations(&sources("protocol/src"), &forbidden, false, |_| false);
    assert_none("protocol is pure: no IO, no clock, no order that changes", &found);
    let found =
        violations(&sources("protocol/src"), &["dp_sidecar::", "dp_sidecar_testkit"], true, |_| false);
    assert_none("protocol uses nothing of ours", &found);
}

#[test]
fn the_protocol_crate_depends_on_no_runtime() {
    let manifest = std::fs::read_to_string("protocol/Cargo.toml").unwrap();
    let dependencies = manifest.split("[dev-dependencies]").next().unwrap();
    for name in ["tokio", "zeromq", "zmq", "nix", "parking_lot", "dp-sidecar."] {
        assert!(
            !dependencies.lines().any(|line| line.starts_with(name)),
            "protocol/Cargo.toml depends on {name}"
        );
    }
}

#[test]
fn the_testkit_shares_nothing_with_the_sidecar() {
    let found =
        violations(&sources("tests/testkit"), &["dp_sidecar::", "use dp_sidecar;", "zeromq"], true, |_| {
            false
        });
    assert_none("a fake that shares our transport shares our bugs", &found);
    let manifest = std::fs::read_to_string("tests/testkit/Cargo.toml").unwrap();
    for line in manifest.lines() {
        assert!(
            !line.starts_with("dp-sidecar.")
                && !line.starts_with("dp-sidecar ")
                && !line.starts_with("zeromq"),
            "tests/testkit/Cargo.toml: {line}"
        );
    }
}

#[test]
fn nothing_is_ever_unpickled() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut open = vec![root.join("python-shim"), root.join("scripts")];
    while let Some(directory) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&directory) else {
            continue;
        };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|ending| ending == "py") {
                let text = std::fs::read_to_string(&path).unwrap();
                for (number, line) in (1..).zip(text.lines()) {
                    let code = line.split('#').next().unwrap_or_default();
                    assert!(
                        !names(code, "import pickle")
                            && !names(code, "import cloudpickle")
                            && !names(code, "import dill"),
                        "{}:{number}: {line}",
                        path.display()
                    );
                }
            }
        }
    }
}

#[test]
fn a_word_inside_another_word_is_not_a_name() {
    assert!(names("use zeromq::Socket;", "zeromq::"));
    assert!(!names("let my_zeromq::x", "zeromq::"));
    assert!(!names("instant_noodles", "Instant"));
    assert!(!names("request.machine", "machine"));
    assert!(names("std::time::Instant::now()", "Instant"));
}

#[test]
fn every_test_that_the_specification_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("SPECIFICATION.md")).unwrap();
    let mut named = 0;
    for reference in text.split('`').filter(|part| part.contains("::")) {
        let Some((file, test)) = reference.split_once("::").filter(|_| reference != "file::test") else {
            continue;
        };
        named += 1;
        let source = std::fs::read_to_string(root.join(file))
            .unwrap_or_else(|error| panic!("SPECIFICATION.md names {file}: {error}"));
        let found = source.contains(&format!("fn {test}(")) || source.contains(&format!("def {test}("));
        assert!(found, "SPECIFICATION.md names {reference}, which does not exist");
    }
    assert!(named > 40, "only {named} tests named");
}
