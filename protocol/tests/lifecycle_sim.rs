//! Seeded simulation of the lifecycle machine over two nodes: engines die, keepers are killed, links are cut, the
//! sidecars of leader and follower are killed and started again, at any step.
//!
//! `SIM_SEED=50 cargo test -p dp-sidecar-protocol --test protocol -- --nocapture lifecycle_sim::one_seed` shows a run.
//! `SIM_SEEDS=1000000` runs more of them.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "lifecycle_sim/world.rs"]
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use dp_sidecar_protocol::machine::mutation::Mutation;

use super::laws;
use world::{World, law};

#[test]
fn every_law_holds_on_every_seed() {
    let seeds = std::env::var("SIM_SEEDS").map_or(20_000, |seeds| seeds.parse().unwrap());
    let next = AtomicU64::new(0);
    let results = Mutex::new((Vec::new(), [0; 4]));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    let mut world = World::new(seed, false);
                    let result = world.run();
                    let counts = [world.steps, world.sidecar_restarts, world.flaps, world.adoptions];
                    let mut results = results.lock().unwrap();
                    results.0.extend(result.err().map(|broken| (seed, broken)));
                    results.1.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
                }
            });
        }
    });
    let (mut failures, [steps, restarts, flaps, adopted]) = results.into_inner().unwrap();
    failures.sort();
    println!("{seeds} seeds, {steps} steps, {restarts} restarts, {flaps} flaps, {adopted} adoptions");
    let count = failures.len();
    failures.truncate(5);
    assert!(
        failures.is_empty(),
        "{count} of {seeds} seeds failed; replay with SIM_SEED=<seed>: {failures:#?}"
    );
    // The laws are about these.
    assert!(restarts > seeds && flaps > seeds && adopted > seeds / 2, "the worlds are too quiet");
}

fn caught(mutation: Mutation, law: &str) {
    laws::caught(mutation, law, 2_000, |seed| World::new(seed, false).run());
}

#[test]
fn a_successor_that_counts_lives_from_0_is_caught() {
    caught(Mutation::ForgetNewest, law::NEW_NUMBER);
}

#[test]
fn a_successor_that_admits_engines_that_were_not_restored_is_caught() {
    caught(Mutation::AdoptUnrestored, law::RESTORED);
}

#[test]
fn a_successor_that_takes_over_a_part_of_a_lockstep_group_is_caught() {
    caught(Mutation::AdoptPartOfGroup, law::WHOLE_GROUP);
}

#[test]
fn an_adoption_that_fails_with_its_link_and_is_held_against_the_engines_is_caught() {
    caught(Mutation::BlameLostLink, law::HEALTHY);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..50 {
        let run = || {
            let mut world = World::new(seed, false);
            (world.run(), world.steps)
        };
        assert_eq!(run(), run(), "seed {seed}");
    }
}

#[test]
fn one_seed() {
    if let Ok(seed) = std::env::var("SIM_SEED") {
        World::new(seed.parse().unwrap(), true).run().unwrap();
    }
}
