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

use world::World;

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
