//! The seeds, and single cases.

use super::super::laws;
use super::*;
use dp_sidecar_protocol::machine::mutation::Mutation;

fn simulate(seed: u64) -> World {
    let mut world = World::new(seed);
    let complete = Event::EnginesComplete(Engines {
        size: world.size,
        lockstep: world.lockstep,
        parallel_config_hash: world.lockstep.then(|| "h".to_owned()),
    });
    let (when, first) = (world.rng.random_range(0..10_000), world.rng.random_range(0..10_000));
    world.at(first, Item::StartFrontend);
    // The deployment may look incomplete again for a while.
    let mut time = when;
    while time < STORM && world.rng.random_bool(0.5) {
        world.at(time, Item::Machine(complete.clone()));
        let missing = Event::EnginesMissing(vec![EngineIndex(0)]);
        time += world.rng.random_range(0..10_000);
        world.at(time, Item::Machine(missing));
        time += world.rng.random_range(0..2_000);
    }
    world.at(time, Item::Machine(complete));
    world.at(0, Item::Machine(Event::FreeSlots(8)));
    world
}

fn check(world: &mut World) {
    for _ in 0..3 {
        let pause = world.rng.random_range(0..STORM / 3);
        world.run(world.now + pause);
        match world.rng.random_range(0..3) {
            0 => world.restart(),
            1 => world.break_route(),
            _ => {
                world.break_route();
                world.restart();
            }
        }
    }
    world.run(STORM);
    let removed = world.rng.random_bool(0.1);
    if removed {
        world.tell(Event::Remove);
    } else {
        // The last frontend that does not fit is stopped; the next one fits.
        world.stop("the storm is over");
        world.at(STORM + 1, Item::StartFrontend);
    }
    world.run(END);
    let snapshot = world.machine.snapshot();
    if removed {
        assert!(world.done && snapshot.state == State::Removed, "{}: {snapshot:?}", law::ENDS_REMOVED);
        assert!(world.open.is_empty(), "{}: {:?}", law::ENDS_REMOVED, world.open);
    } else {
        assert_eq!(snapshot.state, State::Attached, "{}: {snapshot:?}", law::ENDS_ATTACHED);
        assert_eq!(snapshot.detail, None);
        assert!(world.attached, "{}", law::ENDS_ATTACHED);
        let current = world.process.as_ref().map(|process| process.generation);
        let routes: Vec<u64> = world
            .open
            .iter()
            .filter(|((_, link), _)| matches!(link, Link::Route(..)))
            .map(|(_, generation)| *generation)
            .collect();
        let own = !routes.is_empty() && routes.iter().all(|generation| Some(*generation) == current);
        assert!(own, "{}: {routes:?} of {current:?}", law::ENDS_ATTACHED);
    }
    assert!(world.waves_passed <= world.waves_expected, "{}", law::WAVE_ONCE);
}

#[test]
fn in_any_order_of_events_it_ends_attached_and_no_frontend_gets_hello_twice() {
    let only = std::env::var("SEED").ok().map(|seed| seed.parse().unwrap());
    let seeds = only.map_or(0..SEEDS, |seed: u64| seed..seed + 1);
    for seed in seeds {
        let run = |world: &mut World| std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(world)));
        if let Err(panic) = run(&mut simulate(seed)) {
            // Once more, with a log.
            let mut world = simulate(seed);
            world.verbose = true;
            let _ = run(&mut world);
            let skip = world.log.len().saturating_sub(80);
            eprintln!("SEED={seed}:\n{}", world.log[skip..].join("\n"));
            std::panic::resume_unwind(panic);
        }
    }
}

fn caught(mutation: Mutation, law: &str) {
    laws::caught(mutation, law, 2_000, |seed| {
        check(&mut simulate(seed));
        Ok(())
    });
}

#[test]
fn ready_before_the_frontends_coordinator_is_there_is_caught() {
    caught(Mutation::ReadyBeforeCoordinator, law::READY_SECOND);
}

#[test]
fn a_wave_that_is_passed_on_for_each_rank_is_caught() {
    caught(Mutation::WaveForEachRank, law::WAVE_ONCE);
}

#[test]
fn an_attempt_that_does_not_wait_for_the_end_of_the_last_is_caught() {
    caught(Mutation::RetryBeforeTornDown, law::ONE_ATTEMPT);
}

#[test]
fn a_route_whose_loss_is_ignored_is_caught() {
    caught(Mutation::IgnoreLostRoutes, law::ENDS_ATTACHED);
}

#[test]
fn a_wave_of_the_frontend_is_passed_on_once_however_many_ranks_hear_it() {
    let mut world = World::new(1);
    world.size = 3;
    world.lockstep = true;
    let engines = Engines { size: 3, lockstep: true, parallel_config_hash: None };
    world.now = STORM;
    world.start();
    world.at(STORM, Item::Machine(Event::FreeSlots(8)));
    world.at(STORM, Item::Machine(Event::EnginesComplete(engines)));
    world.run(STORM + 60_000);
    assert!(world.attached);
    assert_eq!(world.waves_passed, 1);
    world.broadcast(world.generations);
    world.run(STORM + 120_000);
    assert_eq!(world.waves_passed, 2);
}

#[test]
fn backoff_stays_within_its_bounds() {
    let mut machine = Attachment::new("frontend:1", STALL);
    let mut now = Time::ZERO;
    machine.handle_event(
        now,
        Event::EnginesComplete(Engines { size: 1, lockstep: false, parallel_config_hash: None }),
    );
    let mut pauses = Vec::new();
    for attempt in 1..8 {
        assert_eq!(machine.poll_action(), Some(Action::Probe { attempt }));
        machine.handle_event(now, Event::ProbeFailed { attempt, reason: "refused".to_owned() });
        let due = machine.poll_timeout().unwrap();
        pauses.push(due.saturating_since(now));
        now = due;
        machine.handle_timeout(now);
    }
    assert_eq!(pauses, [100, 200, 400, 800, 1000, 1000, 1000].map(Duration::from_millis));
}
