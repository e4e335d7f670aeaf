//! Seeded simulation of the DP coordinator with lockstep engines, frontends and crashes.
//!
//! One `u64` decides everything: sizes, versions, delays, interleaving, faults. To see a run:
//! `SIM_SEED=50 cargo test -p dp-sidecar-protocol --test protocol -- --nocapture sim::one_seed`.
//! `SIM_SEEDS=1000000` runs more of them.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "sim/engine_model.rs"]
mod engine_model;
#[path = "sim/frontend_model.rs"]
mod frontend_model;
#[path = "sim/world.rs"]
mod world;

use std::panic::catch_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::laws;
use dp_sidecar_protocol::machine::mutation::Mutation;
use world::{Outcome, World, law};

fn seeds() -> u64 {
    std::env::var("SIM_SEEDS").map_or(20_000, |seeds| seeds.parse().unwrap())
}

/// Runs the seeds on all cores; returns how many failed, the first few failures and the number of
/// events.
fn run_all(seeds: u64, mutation: Option<Mutation>) -> (usize, Vec<(u64, String)>, u64) {
    const BLOCK: u64 = 100;
    let next = AtomicU64::new(0);
    let events = AtomicU64::new(0);
    let failures = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let from = next.fetch_add(BLOCK, Ordering::Relaxed);
                    if from >= seeds {
                        break;
                    }
                    for seed in from..(from + BLOCK).min(seeds) {
                        let run = || World::new(seed, mutation, false).run();
                        let outcome = catch_unwind(run)
                            .unwrap_or_else(|panic| Outcome { result: Err(laws::text(&*panic)), events: 0 });
                        events.fetch_add(outcome.events, Ordering::Relaxed);
                        if let Err(broken) = outcome.result {
                            failures.lock().unwrap().push((seed, broken));
                        }
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().unwrap();
    failures.sort();
    let count = failures.len();
    failures.truncate(5);
    (count, failures, events.into_inner())
}

#[test]
fn every_law_holds_on_every_seed() {
    let seeds = seeds();
    let (count, first, events) = run_all(seeds, None);
    println!("{seeds} seeds, {events} events, {count} failures");
    assert!(events > seeds * 50, "the worlds are too quiet: {events}");
    assert!(first.is_empty(), "{count} of {seeds} seeds failed; replay with SIM_SEED=<seed>: {first:#?}");
}

#[test]
fn a_stale_hint_that_rewinds_the_wave_is_caught() {
    caught(Mutation::StaleHintRewindsWave, law::FORWARD);
}

#[test]
fn a_stale_hint_that_still_excludes_its_engine_is_caught() {
    caught(Mutation::StaleHintKeepsExclude, law::AT_REST);
}

#[test]
fn a_forwarded_wake_that_counts_as_running_is_caught() {
    caught(Mutation::ForwardedWakeSetsRunning, law::AT_REST);
}

#[test]
fn a_fresh_group_that_keeps_its_own_wave_numbers_is_caught() {
    caught(Mutation::NoWaveForFreshGroup, law::AT_REST);
}

#[test]
fn a_wake_that_is_lost_in_a_pause_and_not_repeated_is_caught() {
    caught(Mutation::NoSecondStart, law::AT_REST);
}

#[test]
fn a_successor_that_counts_from_zero_is_caught() {
    caught(Mutation::AdoptFromZero, law::INFORMED);
}

#[test]
fn a_successor_that_does_not_wake_the_group_is_caught() {
    caught(Mutation::AdoptWithoutWake, law::AT_REST);
}

fn caught(mutation: Mutation, law: &str) {
    let (count, first, _) = run_all(20_000, Some(mutation));
    println!("{mutation:?}: {count} of 20000 seeds fail, first {:?}", first.first());
    let named = first.iter().any(|(_, broken)| broken.contains(law));
    assert!(named, "{mutation:?} breaks no law named {law:?}, but: {first:#?}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..50 {
        let one = World::new(seed, None, false).run();
        let two = World::new(seed, None, false).run();
        assert_eq!(one, two, "seed {seed}");
    }
}

#[test]
fn one_seed() {
    let Ok(seed) = std::env::var("SIM_SEED") else {
        return;
    };
    let mutation = match std::env::var("SIM_MUTATION").as_deref() {
        Ok("rewind") => Some(Mutation::StaleHintRewindsWave),
        Ok("exclude") => Some(Mutation::StaleHintKeepsExclude),
        Ok("zero") => Some(Mutation::AdoptFromZero),
        Ok("asleep") => Some(Mutation::AdoptWithoutWake),
        Ok("running") => Some(Mutation::ForwardedWakeSetsRunning),
        _ => None,
    };
    let outcome = World::new(seed.parse().unwrap(), mutation, true).run();
    println!("{outcome:?}");
    outcome.result.unwrap();
}
