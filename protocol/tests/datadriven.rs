//! Scripts in `src/machine/testdata`: events, `----`, the actions they must cause. A reviewer who
//! reads no Rust can check them. `REWRITE=1 cargo test -p dp-sidecar-protocol --test protocol datadriven::`
//! writes what the machines do now; look at the diff.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "datadriven/coordinator.rs"]
mod coordinator;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// One line of a script: a verb and `key=value` pairs.
struct Line<'a> {
    verb: &'a str,
    arguments: BTreeMap<&'a str, &'a str>,
    text: &'a str,
}

impl<'a> Line<'a> {
    fn parse(text: &'a str) -> Self {
        let mut words = text.split_whitespace();
        let verb = words.next().unwrap();
        let arguments = words.map(|word| word.split_once('=').unwrap_or((word, "")));
        Self { verb, arguments: arguments.collect(), text }
    }

    fn text(&self, key: &str) -> Option<&'a str> {
        self.arguments.get(key).copied()
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Option<T> {
        let value = self.text(key)?;
        let parsed = value.parse().ok();
        Some(parsed.unwrap_or_else(|| panic!("{}: {key} is not a number", self.text)))
    }

    fn required<T: std::str::FromStr>(&self, key: &str) -> T {
        self.number(key).unwrap_or_else(|| panic!("{}: {key} is missing", self.text))
    }
}

/// Runs a machine line by line.
trait Script {
    /// What the line causes, one action per line.
    fn line(&mut self, line: &Line<'_>) -> Vec<String>;
}

/// Runs one script; returns it with the outputs of now.
fn run(text: &str, script: &mut dyn Script) -> String {
    let mut result = String::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        if line.trim().is_empty() || line.starts_with('#') {
            result.push_str(line);
            result.push('\n');
            continue;
        }
        let mut output = script.line(&Line::parse(line));
        result.push_str(line);
        result.push('\n');
        while lines.peek().is_some_and(|next| *next != "----") {
            let next = lines.next().unwrap();
            assert!(!next.trim().is_empty(), "after {line:?} comes no ----");
            output.extend(script.line(&Line::parse(next)));
            result.push_str(next);
            result.push('\n');
        }
        // What was expected, up to the next empty line, is not needed: the whole is compared.
        while lines.peek().is_some_and(|next| !next.trim().is_empty()) {
            lines.next();
        }
        result.push_str("----\n");
        for line in output {
            writeln!(result, "{line}").unwrap();
        }
    }
    result
}

fn scripts(prefix: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/machine/testdata");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with(prefix) && name.ends_with(".txt")
        })
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no scripts {prefix}*.txt");
    paths
}

fn check(prefix: &str, fresh: impl Fn() -> Box<dyn Script>) {
    for path in scripts(prefix) {
        let text = std::fs::read_to_string(&path).unwrap();
        let now = run(&text, &mut *fresh());
        if std::env::var_os("REWRITE").is_some() {
            std::fs::write(&path, now).unwrap();
        } else {
            let difference =
                text.lines().zip(now.lines()).enumerate().find(|(_, (expected, actual))| expected != actual);
            assert!(
                text == now,
                "{}: first difference {difference:?}; REWRITE=1 writes what the machine does now",
                path.display()
            );
        }
    }
}

#[test]
fn the_dp_coordinator_does_what_its_scripts_say() {
    check("coordinator", || Box::new(coordinator::Coordinated::default()));
}
