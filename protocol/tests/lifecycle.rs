//! The lifecycle machine, step by step.

use std::time::Duration;

use dp_sidecar_protocol::machine::lifecycle::{Action, Event, Lifecycle, LifecycleConfig, Phase};
use dp_sidecar_protocol::machine::restart::RestartPolicy;
use dp_sidecar_protocol::{EngineIndex, GroupKind, Incarnation, Time};

const R0: EngineIndex = EngineIndex(0);
const R1: EngineIndex = EngineIndex(1);

fn machine(lockstep: bool, spawn: bool) -> Lifecycle {
    let config = LifecycleConfig {
        ranks: vec![R0, R1],
        kind: GroupKind::of(lockstep),
        spawn,
        startup_timeout: Duration::from_secs(100),
        restart: RestartPolicy::default(),
    };
    Lifecycle::new(config, Time::ZERO)
}

fn drain(m: &mut Lifecycle) -> Vec<Action> {
    std::iter::from_fn(|| m.poll_action()).collect()
}

fn at(m: &mut Lifecycle, event: Event) {
    m.handle_event(Time::ZERO, event);
}

fn lost(rank: EngineIndex, incarnation: u64) -> Event {
    let reason = "connection closed".to_owned();
    Event::Lost { rank, incarnation: Incarnation(incarnation), reason }
}

fn exited(rank: EngineIndex, incarnation: u64, reason: &str) -> Event {
    let reason = reason.to_owned();
    Event::Exited { rank, incarnation: Incarnation(incarnation), reason }
}

/// Takes one rank from Preparing through READY.
fn shake(m: &mut Lifecycle, rank: EngineIndex, incarnation: u64) {
    let incarnation = Incarnation(incarnation);
    at(m, Event::Prepared { rank, incarnation });
    at(m, Event::Connected { rank, incarnation });
    at(m, Event::Registered { rank, incarnation });
    at(m, Event::HandshakeReady { rank, incarnation });
}

fn serve(m: &mut Lifecycle, lives: &[(EngineIndex, u64)]) {
    for &(rank, incarnation) in lives {
        shake(m, rank, incarnation);
    }
    let ranks = lives.iter().map(|&(r, i)| (r, Incarnation(i))).collect();
    at(m, Event::Restored { ranks });
    drain(m);
}

#[test]
fn independent_ranks_are_restored_and_admitted_one_by_one() {
    let mut m = machine(false, true);
    let prepares = [
        Action::Prepare { rank: R0, incarnation: Incarnation(1) },
        Action::Prepare { rank: R1, incarnation: Incarnation(2) },
    ];
    assert_eq!(drain(&mut m), prepares);
    shake(&mut m, R0, 1);
    let ranks = vec![(R0, Incarnation(1))];
    let spawn = Action::Spawn { rank: R0, incarnation: Incarnation(1) };
    assert_eq!(drain(&mut m), [spawn, Action::Restore { ranks: ranks.clone() }]);
    at(&mut m, Event::Restored { ranks });
    let admit = Action::Admit { rank: R0, incarnation: Incarnation(1) };
    assert_eq!(drain(&mut m), [admit]);
    assert!(!m.started());
}

#[test]
fn a_lockstep_group_is_restored_only_when_every_rank_is_ready() {
    let mut m = machine(true, true);
    drain(&mut m);
    shake(&mut m, R0, 1);
    let spawn = |rank| Action::Spawn { rank, incarnation: Incarnation(1) };
    assert_eq!(drain(&mut m), [spawn(R0)]);
    shake(&mut m, R1, 1);
    let ranks = vec![(R0, Incarnation(1)), (R1, Incarnation(1))];
    assert_eq!(drain(&mut m), [spawn(R1), Action::Restore { ranks }]);
}

#[test]
fn an_exit_during_the_first_start_fails_at_once_with_its_last_lines() {
    let mut m = machine(false, true);
    at(&mut m, Event::Prepared { rank: R0, incarnation: Incarnation(1) });
    drain(&mut m);
    at(&mut m, exited(R0, 1, "exit code 1; last lines: no such model"));
    let actions = drain(&mut m);
    assert!(
        actions.iter().any(|a| matches!(a, Action::Fail { reason, timeout: false }
            if reason.contains("no such model"))),
        "{actions:?}"
    );
}

#[test]
fn a_connection_lost_during_the_first_start_waits_for_the_exit_that_explains_it() {
    let mut m = machine(false, true);
    at(&mut m, Event::Prepared { rank: R0, incarnation: Incarnation(1) });
    drain(&mut m);
    at(&mut m, lost(R0, 1));
    let actions = drain(&mut m);
    assert!(actions.contains(&Action::StopProcess { rank: R0, incarnation: Incarnation(1) }));
    assert!(!actions.iter().any(|a| matches!(a, Action::Fail { .. })), "{actions:?}");
    at(&mut m, exited(R0, 1, "out of memory"));
    let actions = drain(&mut m);
    assert!(
        actions.iter().any(|a| matches!(a, Action::Fail { reason, .. }
            if reason.contains("connection closed") && reason.contains("out of memory"))),
        "{actions:?}"
    );
}

#[test]
fn a_start_that_takes_too_long_fails_as_a_timeout_and_names_the_stage() {
    let mut m = machine(false, true);
    at(&mut m, Event::Prepared { rank: R0, incarnation: Incarnation(1) });
    at(&mut m, Event::Connected { rank: R0, incarnation: Incarnation(1) });
    drain(&mut m);
    let due = m.poll_timeout().expect("a deadline");
    m.handle_timeout(due);
    let actions = drain(&mut m);
    assert!(
        actions.iter().any(|a| matches!(a, Action::Fail { reason, timeout: true }
            if reason.contains("no registration frame"))),
        "{actions:?}"
    );
}

#[test]
fn losing_one_lockstep_rank_stops_all_and_starts_one_new_generation() {
    let mut m = machine(true, true);
    drain(&mut m);
    serve(&mut m, &[(R0, 1), (R1, 1)]);
    at(&mut m, lost(R1, 1));
    let actions = drain(&mut m);
    for rank in [R0, R1] {
        assert!(actions.contains(&Action::StopProcess { rank, incarnation: Incarnation(1) }));
    }
    at(&mut m, exited(R1, 1, "signal 9"));
    assert_eq!(m.poll_timeout(), None, "the group waits for its last process");
    at(&mut m, exited(R0, 1, "signal 15"));
    let due = m.poll_timeout().expect("the back-off");
    m.handle_timeout(due);
    let prepare = |rank| Action::Prepare { rank, incarnation: Incarnation(2) };
    assert_eq!(drain(&mut m), [prepare(R0), prepare(R1)]);
}

#[test]
fn losing_one_independent_rank_leaves_the_other_alone() {
    let mut m = machine(false, true);
    drain(&mut m);
    serve(&mut m, &[(R0, 1), (R1, 2)]);
    assert!(m.started());
    at(&mut m, lost(R1, 2));
    let actions = drain(&mut m);
    assert!(actions.contains(&Action::StopProcess { rank: R1, incarnation: Incarnation(2) }));
    let touches_r0 = |a: &Action| matches!(a, Action::Down { rank: R0, .. } | Action::Fail { .. });
    assert!(!actions.iter().any(touches_r0), "{actions:?}");
    assert_eq!(m.snapshot()[&R0].phase, Phase::Serving);
}

#[test]
fn an_engine_that_somebody_else_starts_is_awaited_again_at_once() {
    let mut m = machine(false, false);
    drain(&mut m);
    shake(&mut m, R0, 1);
    drain(&mut m);
    at(&mut m, lost(R0, 1));
    m.handle_timeout(Time::ZERO);
    let actions = drain(&mut m);
    let again = Action::Prepare { rank: R0, incarnation: Incarnation(3) };
    assert!(actions.contains(&again), "{actions:?}");
    assert!(!actions.iter().any(|a| matches!(a, Action::Fail { .. })));
}

#[test]
fn lockstep_engines_of_somebody_else_come_back_as_one_generation() {
    let mut m = machine(true, false);
    drain(&mut m);
    serve(&mut m, &[(R0, 1), (R1, 1)]);
    at(&mut m, lost(R1, 1));
    m.handle_timeout(Time::ZERO);
    at(&mut m, lost(R0, 1));
    m.handle_timeout(Time::ZERO);
    let lives: Vec<_> = m.snapshot().values().map(|l| l.incarnation).collect();
    assert_eq!(lives, [Incarnation(2), Incarnation(2)]);
    drain(&mut m);
    shake(&mut m, R0, 2);
    assert!(!drain(&mut m).iter().any(|a| matches!(a, Action::Restore { .. })));
    shake(&mut m, R1, 2);
    assert!(drain(&mut m).iter().any(|a| matches!(a, Action::Restore { .. })));
}

#[test]
fn reports_about_an_older_incarnation_change_nothing() {
    let mut m = machine(true, true);
    drain(&mut m);
    serve(&mut m, &[(R0, 1), (R1, 1)]);
    at(&mut m, lost(R0, 0));
    assert_eq!(drain(&mut m), []);
    assert_eq!(m.snapshot()[&R0].phase, Phase::Serving);
}

#[test]
fn the_loss_of_the_keeper_starts_everything_over() {
    let mut m = machine(true, true);
    drain(&mut m);
    serve(&mut m, &[(R0, 1), (R1, 1)]);
    at(&mut m, Event::KeeperLost { ranks: vec![R0, R1] });
    m.handle_timeout(Time::ZERO);
    let actions = drain(&mut m);
    let again = Action::Prepare { rank: R1, incarnation: Incarnation(2) };
    assert!(actions.contains(&again), "{actions:?}");
    assert!(!actions.iter().any(|a| matches!(a, Action::StopProcess { .. })));
}

#[test]
fn the_loss_of_one_nodes_keeper_ends_the_lockstep_group_on_the_other_nodes() {
    let mut m = machine(true, true);
    drain(&mut m);
    serve(&mut m, &[(R0, 1), (R1, 1)]);
    at(&mut m, Event::KeeperLost { ranks: vec![R1] });
    let actions = drain(&mut m);
    assert!(actions.contains(&Action::StopProcess { rank: R0, incarnation: Incarnation(1) }), "{actions:?}");
    assert!(!actions.iter().any(|a| matches!(a, Action::StopProcess { rank: R1, .. })), "{actions:?}");
    at(&mut m, exited(R0, 1, ""));
    let due = m.poll_timeout().expect("a new generation");
    m.handle_timeout(due);
    let lives: Vec<_> = m.snapshot().values().map(|l| l.incarnation).collect();
    assert_eq!(lives, [Incarnation(2), Incarnation(2)]);
}

#[test]
fn the_loss_of_one_nodes_keeper_leaves_independent_ranks_elsewhere_alone() {
    let mut m = machine(false, true);
    drain(&mut m);
    serve(&mut m, &[(R0, 1), (R1, 2)]);
    at(&mut m, Event::KeeperLost { ranks: vec![R1] });
    assert_eq!(m.snapshot()[&R0].phase, Phase::Serving);
    assert_eq!(m.snapshot()[&R1].phase, Phase::Waiting);
}

#[test]
fn stop_is_over_when_the_last_process_is_gone() {
    let mut m = machine(false, true);
    drain(&mut m);
    shake(&mut m, R0, 1);
    shake(&mut m, R1, 2);
    drain(&mut m);
    at(&mut m, Event::Stop);
    assert!(!drain(&mut m).contains(&Action::Stopped));
    at(&mut m, exited(R0, 1, ""));
    assert_eq!(drain(&mut m), []);
    at(&mut m, exited(R1, 2, ""));
    assert_eq!(drain(&mut m), [Action::Stopped]);
}

#[test]
fn a_spent_budget_ends_the_sidecar_only_when_no_rank_is_left() {
    let mut m = machine(false, true);
    drain(&mut m);
    let mut now = Time::ZERO;
    let mut failed = 0;
    let mut lives = vec![(R0, Incarnation(1)), (R1, Incarnation(2))];
    for (rank, incarnation) in lives.clone() {
        shake(&mut m, rank, incarnation.0);
        m.handle_event(now, Event::Restored { ranks: vec![(rank, incarnation)] });
    }
    for _ in 0..200 {
        for (rank, incarnation) in lives.drain(..) {
            let reason = "it died again".to_owned();
            m.handle_event(now, Event::Prepared { rank, incarnation });
            m.handle_event(now, Event::Exited { rank, incarnation, reason });
        }
        if let Some(due) = m.poll_timeout() {
            now = due;
            m.handle_timeout(now);
        }
        for action in drain(&mut m) {
            match action {
                Action::Prepare { rank, incarnation } => lives.push((rank, incarnation)),
                Action::Fail { reason, .. } => {
                    failed += 1;
                    assert!(reason.contains("it died again"), "{reason}");
                    assert!(m.snapshot().values().all(|l| l.phase == Phase::GivenUp));
                }
                _ => {}
            }
        }
    }
    assert_eq!(failed, 1);
}

#[test]
fn a_waiting_engine_may_go_through_its_handshake_before_its_rank_is_known_to_be_prepared() {
    let orders: [[usize; 4]; 4] = [[1, 2, 3, 0], [1, 2, 0, 3], [1, 0, 2, 3], [2, 1, 3, 0]];
    for order in orders {
        let mut m = machine(false, false);
        drain(&mut m);
        let (rank, incarnation) = (R0, Incarnation(1));
        let mut events = [
            Some(Event::Prepared { rank, incarnation }),
            Some(Event::Connected { rank, incarnation }),
            Some(Event::Registered { rank, incarnation }),
            Some(Event::HandshakeReady { rank, incarnation }),
        ];
        for number in order {
            at(&mut m, events[number].take().unwrap());
        }
        let restore = Action::Restore { ranks: vec![(rank, incarnation)] };
        assert_eq!(drain(&mut m), [restore], "order {order:?}");
    }
}
