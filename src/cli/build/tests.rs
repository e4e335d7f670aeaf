use std::time::Duration;

use clap::{FromArgMatches, Subcommand};

use super::*;

fn built(args: &[&str]) -> Built {
    let command = super::super::args::Command::augment_subcommands(clap::Command::new("sidecar"));
    let start = ["sidecar", "run", "--dp-rank", "0", "--data-parallel-size", "2", "--model-kind", "dense"];
    let matches = command.get_matches_from(start.iter().chain(args));
    let Ok(super::super::args::Command::Run(args)) = super::super::args::Command::from_arg_matches(&matches)
    else {
        panic!("not run");
    };
    let exe = PathBuf::from("/sidecar");
    let environment = Environment { variables: Vec::new(), nvml_count: 0, memory: 64 << 30, exe, cwd: None };
    build(&args, &environment).unwrap()
}

#[test]
fn by_default_a_request_is_held_for_as_long_as_anything_takes_that_it_waits_for() {
    let hold = |args: &[&str]| built(args).config.limits.hold.as_secs();
    assert_eq!(hold(&[]), 1800 + 900);
    assert_eq!(hold(&["--load-timeout", "2h"]), 30 + 2 * 7200);
    assert_eq!(hold(&["--startup-timeout", "4h"]), 4 * 3600 + 900);
    assert_eq!(hold(&["--load-timeout", "1s", "--startup-timeout", "1s"]), 600);
    let short = built(&["--hold-timeout", "60s"]);
    assert_eq!(short.config.limits.hold, Duration::from_secs(60));
    let notes = short.notes.join("\n");
    assert!(notes.contains("--hold-timeout") && notes.contains("2700s"), "{notes}");
}

#[test]
fn a_frontend_with_as_many_api_servers_as_ranks_has_its_slots() {
    assert_eq!([1, 2, 4, 8, 16, 32, 64, 256].map(default_slots), [8, 8, 8, 16, 32, 64, 64, 256]);
    assert_eq!(built(&["--frontend-slots", "3"]).config.frontend_slots, 3);
}

#[test]
fn what_is_held_and_read_follows_from_the_memory_unless_it_is_said() {
    let limits = built(&[]).config.limits;
    assert_eq!((limits.held_bytes, limits.in_flight_bytes), (4 << 30, 4 << 30));
    assert_eq!(limits.request_bytes, 16 << 30);
    let limits = built(&["--max-held-bytes", "1MiB", "--max-request-bytes", "2MiB"]).config.limits;
    assert_eq!(
        (limits.held_bytes, limits.in_flight_bytes, limits.request_bytes),
        (1 << 20, 1 << 20, 2 << 20)
    );
}
