//! One program of all integration tests but those that read files alone: linking the whole crate once is most of
//! what building them costs. `cargo test --test integration rank::` runs those of `rank.rs`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod attachment;
mod cli;
mod conformance;
mod coordinator;
mod edge;
mod handshake;
mod keeper;
mod keeper_hosted;
mod likeness;
mod rank;
mod relay_host;
mod transcripts;
mod transport;

/// Files that are programs of their own.
const PROGRAMS: [&str; 4] = ["integration", "layering", "habits", "protocol"];

/// A file that neither `integration.rs` nor `protocol.rs` names would not be compiled, and its tests not be missed.
#[test]
fn every_file_of_a_tests_folder_is_a_module() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    for (folder, program) in [("tests", "integration.rs"), ("protocol/tests", "protocol.rs")] {
        let named = std::fs::read_to_string(root.join(folder).join(program)).unwrap();
        for entry in std::fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_str().unwrap();
            if path.extension().is_some_and(|ending| ending == "rs") && !PROGRAMS.contains(&stem) {
                assert!(named.lines().any(|line| line == format!("mod {stem};")), "{folder}/{stem}.rs");
            }
        }
    }
}
