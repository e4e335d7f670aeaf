//! The control machine: rounds, the lock, leases; and seeds.

mod sleep;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use dp_sidecar_protocol::machine::control::{Action, Control, Event, Grant, OwnerId};
use dp_sidecar_protocol::machine::held_call::{HeldCall, Verdict};
use dp_sidecar_protocol::machine::memory::Memory;
use dp_sidecar_protocol::machine::mutation::Mutation;
use dp_sidecar_protocol::{EngineIndex, FrontendId, GroupKind, PausedBy, Time};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rmpv::Value;

use super::laws;

fn control(ranks: u16, lockstep: bool) -> Control {
    let mut control = Control::new((0..ranks).map(EngineIndex), GroupKind::of(lockstep));
    for rank in 0..ranks {
        control.handle_event(Time::ZERO, up(rank));
    }
    control
}

fn up(rank: u16) -> Event {
    Event::EngineUp { rank: EngineIndex(rank), memory: Memory::default() }
}

fn held(rank: u16, ticket: u64, frontend: u64, method: &str) -> Event {
    Event::Held(HeldCall {
        rank: EngineIndex(rank),
        ticket,
        frontend: FrontendId(frontend),
        api_server: 0,
        method: method.to_owned(),
        args: Vec::new(),
    })
}

fn answered(rank: u16, ticket: u64) -> Event {
    Event::Answered { rank: EngineIndex(rank), ticket, result: Ok(Value::Nil) }
}

fn acquire(owner: u64, name: &str, patience: u64) -> Event {
    Event::Acquire { owner: OwnerId(owner), name: name.to_owned(), patience: Duration::from_millis(patience) }
}

fn actions(control: &mut Control) -> Vec<Action> {
    std::iter::from_fn(|| control.poll_action()).collect()
}

fn at(ms: u64) -> Time {
    Time::from_millis(ms)
}

/// `(rank, ticket, decision)` of what was decided.
fn decisions(control: &mut Control) -> Vec<(u16, u64, Verdict)> {
    actions(control)
        .into_iter()
        .filter_map(|action| match action {
            Action::Decide { rank, ticket, verdict } => Some((rank.0, ticket, verdict)),
            _ => None,
        })
        .collect()
}

fn refusal(verdict: &Verdict) -> &str {
    match verdict {
        Verdict::Refuse(text) => text,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

/// Frontend `frontend` pauses both ranks, and both engines answer.
fn pause(control: &mut Control, now: Time, frontend: u64, ticket: u64) {
    control.handle_event(now, held(0, ticket, frontend, "pause_scheduler"));
    control.handle_event(now, held(1, ticket, frontend, "pause_scheduler"));
    control.handle_event(now, answered(0, ticket));
    control.handle_event(now, answered(1, ticket));
    assert_eq!(decisions(control).len(), 2);
}

#[test]
fn a_call_is_forwarded_when_all_ranks_have_it() {
    let mut control = control(2, true);
    control.handle_event(at(0), held(0, 10, 1, "pause_scheduler"));
    assert_eq!(decisions(&mut control), []);
    control.handle_event(at(3), held(1, 20, 1, "pause_scheduler"));
    assert_eq!(decisions(&mut control), [(0, 10, Verdict::Forward), (1, 20, Verdict::Forward)]);
}

#[test]
fn two_frontends_reach_all_ranks_in_the_same_order() {
    let mut control = control(2, true);
    control.handle_event(at(0), held(0, 1, 1, "pause_scheduler"));
    control.handle_event(at(0), held(1, 2, 2, "pause_scheduler"));
    control.handle_event(at(1), held(0, 3, 2, "pause_scheduler"));
    let first = decisions(&mut control);
    assert_eq!(first, [(0, 3, Verdict::Forward), (1, 2, Verdict::Forward)]);
    control.handle_event(at(2), held(1, 4, 1, "pause_scheduler"));
    assert_eq!(decisions(&mut control), [], "one round at a time");
    control.handle_event(at(3), answered(0, 3));
    assert_eq!(decisions(&mut control), []);
    control.handle_event(at(4), answered(1, 2));
    let second = decisions(&mut control);
    assert_eq!(second, [(0, 1, Verdict::Forward), (1, 4, Verdict::Forward)]);
}

#[test]
fn a_call_that_misses_a_rank_is_refused_after_five_seconds_and_the_rank_is_named() {
    let mut control = control(3, true);
    control.handle_event(at(0), held(0, 1, 7, "sleep"));
    control.handle_event(at(10), held(2, 1, 7, "sleep"));
    assert_eq!(control.poll_timeout(), Some(at(5000)));
    control.handle_timeout(at(4999));
    assert_eq!(decisions(&mut control), []);
    control.handle_timeout(at(5000));
    let refused = decisions(&mut control);
    assert_eq!(refused.len(), 2);
    let text = refusal(&refused[0].2);
    assert!(text.contains("sleep of frontend 7") && text.contains("not for rank 1 within"), "{text}");
}

#[test]
fn the_same_call_sent_twice_makes_two_rounds() {
    let mut control = control(2, false);
    for ticket in [1, 2] {
        control.handle_event(at(0), held(0, ticket, 1, "reset_prefix_cache"));
    }
    control.handle_event(at(0), held(1, 5, 1, "reset_prefix_cache"));
    assert_eq!(decisions(&mut control), [(0, 1, Verdict::Forward), (1, 5, Verdict::Forward)]);
    assert_eq!(control.snapshot().waiting_rounds, 1);
}

#[test]
fn calls_are_refused_with_the_name_and_phase_of_the_running_update() {
    let mut control = control(2, false);
    control.handle_event(at(0), held(0, 1, 1, "pause_scheduler"));
    control.handle_event(at(1), acquire(9, "update u1", 0));
    let granted = actions(&mut control);
    assert!(matches!(&granted[0], Action::Decide { verdict: Verdict::Refuse(text), .. }
        if text.contains("update u1 is running")));
    let Action::Granted { owner: OwnerId(9), grant } = &granted[1] else { panic!("{granted:?}") };
    assert!(grant.paused_by.is_none() && !grant.external_weights && !grant.asleep(), "{grant:?}");
    let doing = Event::Doing { owner: OwnerId(9), what: "loading".to_owned() };
    control.handle_event(at(2), doing);
    control.handle_event(at(3), held(1, 1, 1, "resume_scheduler"));
    let refused = decisions(&mut control);
    assert!(refusal(&refused[0].2).contains("update u1 (loading) is running"));
    control.handle_event(at(4), Event::Release { owner: OwnerId(9) });
    control.handle_event(at(5), held(0, 2, 1, "list_loras"));
    control.handle_event(at(5), held(1, 2, 1, "list_loras"));
    assert_eq!(decisions(&mut control).len(), 2);
}

#[test]
fn a_second_owner_waits_and_is_denied_with_the_name_of_the_holder() {
    let mut control = control(1, false);
    control.handle_event(at(0), acquire(1, "update u1", 0));
    control.handle_event(at(0), acquire(2, "update u2", 100));
    control.handle_event(at(0), acquire(3, "operator pause", 1000));
    assert_eq!(actions(&mut control).len(), 1);
    control.handle_timeout(at(100));
    assert_eq!(actions(&mut control), [Action::Denied { owner: OwnerId(2), holder: "update u1".to_owned() }]);
    control.handle_event(at(200), Event::Release { owner: OwnerId(1) });
    assert!(matches!(actions(&mut control)[..], [Action::Granted { owner: OwnerId(3), .. }]));
}

#[test]
fn a_waiting_update_goes_before_rounds_that_are_ready() {
    let mut control = control(1, false);
    control.handle_event(at(0), held(0, 1, 1, "pause_scheduler"));
    control.handle_event(at(1), held(0, 2, 1, "resume_scheduler"));
    control.handle_event(at(1), acquire(1, "update u1", 1000));
    assert_eq!(decisions(&mut control), [(0, 1, Verdict::Forward)]);
    control.handle_event(at(2), answered(0, 1));
    let all = actions(&mut control);
    assert!(matches!(&all[0], Action::Decide { ticket: 2, verdict: Verdict::Refuse(_), .. }), "{all:?}");
    let by_frontend = Some(PausedBy::Frontend { id: FrontendId(1) });
    assert!(matches!(&all[1], Action::Granted { grant, .. } if grant.paused_by == by_frontend), "{all:?}");
}

#[test]
fn resume_of_engines_that_are_not_paused_is_answered_without_asking_them() {
    let mut control = control(2, true);
    control.handle_event(at(0), held(0, 1, 1, "resume_scheduler"));
    control.handle_event(at(0), held(1, 2, 1, "resume_scheduler"));
    let nil = Verdict::Answer(Value::Nil);
    assert_eq!(decisions(&mut control), [(0, 1, nil.clone()), (1, 2, nil.clone())]);
    pause(&mut control, at(1), 1, 3);
    control.handle_event(at(2), held(0, 4, 2, "resume_scheduler"));
    control.handle_event(at(2), held(1, 4, 2, "resume_scheduler"));
    let forwarded = decisions(&mut control);
    assert_eq!(forwarded[0].2, Verdict::Forward);
    control.handle_event(at(3), answered(0, 4));
    control.handle_event(at(3), answered(1, 4));
    assert_eq!(control.snapshot().paused_by, None);
}

#[test]
fn the_pause_of_a_frontend_that_dies_is_lifted_after_the_grace() {
    let mut control = control(2, true);
    pause(&mut control, at(0), 1, 1);
    let gone = Event::FrontendGone { frontend: FrontendId(1) };
    control.handle_event(at(1000), gone);
    assert_eq!(control.poll_timeout(), Some(at(31_000)));
    actions(&mut control);
    control.handle_timeout(at(31_000));
    let all = actions(&mut control);
    let called: Vec<u16> = all
        .iter()
        .filter_map(|action| match action {
            Action::Call { rank, method: "resume_scheduler", .. } => Some(rank.0),
            _ => None,
        })
        .collect();
    assert_eq!(called, [0, 1]);
    let says_so = |action: &Action| matches!(action, Action::Note { text, .. } if text.contains("frontend 1 paused them"));
    assert!(all.iter().any(says_so), "{all:?}");
    for rank in [0, 1] {
        let event = Event::CallAnswered { rank: EngineIndex(rank), operation: 1, result: Ok(Value::Nil) };
        control.handle_event(at(31_001), event);
    }
    assert_eq!(control.snapshot().paused_by, None);
    assert_eq!(control.snapshot().holder, None);
}

#[test]
fn a_pause_that_completes_after_its_frontend_died_is_lifted_too() {
    let mut control = control(1, false);
    control.handle_event(at(0), held(0, 1, 1, "pause_scheduler"));
    let gone = Event::FrontendGone { frontend: FrontendId(1) };
    control.handle_event(at(1000), gone);
    control.handle_event(at(2000), answered(0, 1));
    assert_eq!(control.poll_timeout(), Some(at(31_000)));
}

#[test]
fn a_lease_is_over_when_somebody_else_resumes() {
    let mut control = control(2, false);
    pause(&mut control, at(0), 1, 1);
    let gone = Event::FrontendGone { frontend: FrontendId(1) };
    control.handle_event(at(1000), gone);
    control.handle_event(at(2000), held(0, 4, 2, "resume_scheduler"));
    control.handle_event(at(2000), held(1, 4, 2, "resume_scheduler"));
    control.handle_event(at(2000), answered(0, 4));
    control.handle_event(at(2000), answered(1, 4));
    assert_eq!(control.poll_timeout(), None);
}

#[test]
fn the_operators_pause_is_not_lifted_by_a_frontend() {
    let mut control = control(1, false);
    control.handle_event(at(0), acquire(1, "operator pause", 0));
    let paused = Event::PausedSet { owner: OwnerId(1), paused_by: Some(PausedBy::Operator) };
    control.handle_event(at(0), paused);
    control.handle_event(at(0), Event::Release { owner: OwnerId(1) });
    control.handle_event(at(1), held(0, 1, 1, "resume_scheduler"));
    let refused = decisions(&mut control);
    assert!(refusal(&refused[0].2).contains("paused by the operator"));
    assert_eq!(control.snapshot().paused_by, Some(PausedBy::Operator));
}

#[test]
fn an_engine_that_dies_ends_its_part_of_the_round_and_waiting_rounds_are_refused() {
    let mut control = control(2, true);
    for rank in [0, 1] {
        control.handle_event(at(0), held(rank, 1, 1, "pause_scheduler"));
        control.handle_event(at(0), held(rank, 2, 2, "list_loras"));
    }
    actions(&mut control);
    let down = |rank| Event::EngineDown { rank: EngineIndex(rank), reason: "killed".to_owned() };
    control.handle_event(at(1), down(1));
    assert_eq!(decisions(&mut control), [], "rank 0 has not answered yet");
    control.handle_event(at(2), down(0));
    let refused = decisions(&mut control);
    assert_eq!(refused.len(), 2);
    assert!(refusal(&refused[0].2).contains("engine of rank 0, 1 is down"));
}

#[test]
fn an_independent_engine_that_starts_again_into_a_pause_is_paused() {
    let mut control = control(2, false);
    pause(&mut control, at(0), 1, 1);
    let down = Event::EngineDown { rank: EngineIndex(1), reason: "killed".to_owned() };
    control.handle_event(at(1), down);
    control.handle_event(at(9), up(1));
    let calls: Vec<_> =
        actions(&mut control).into_iter().filter(|action| matches!(action, Action::Call { .. })).collect();
    assert!(matches!(calls[..], [Action::Call { rank: EngineIndex(1), method: "pause_scheduler", .. }]));
}

/// The laws, by name.
mod law {
    pub(super) const ONCE: &str = "a call is decided once";
    pub(super) const DECIDED: &str = "every call and every owner is answered within the deadlines";
    pub(super) const ONE_HOLDER: &str = "nothing goes past the lock";
    pub(super) const TO_THE_LIVING: &str = "no call goes to an engine that is down";
    pub(super) const WHOLE: &str = "a call reaches all ranks, a lockstep group in one piece";
    pub(super) const ONE_ORDER: &str = "all ranks see the calls in one order";
}

#[derive(Debug, Default)]
struct Counts {
    forwarded_rounds: u64,
    refused_calls: u64,
    grants: u64,
    compared: usize,
}

/// Frontends call, come and go, engines die, owners come and go, in an order that a seed decides.
fn simulate(seed: u64, counts: &mut Counts) {
    let methods = ["pause_scheduler", "resume_scheduler", "sleep", "wake_up", "list_loras"];
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let ranks = rng.random_range(1..=3u16);
    let lockstep = rng.random_bool(0.5);
    // Calm: nothing is lost, late or down, so that all ranks must see all calls.
    let calm = rng.random_bool(0.4);
    let lossy = !calm && rng.random_bool(0.3);
    let mut control = control(ranks, lockstep);
    let mut now = Time::ZERO;
    let mut ticket = 0u64;
    // Messages on their way: the calls of one frontend reach one rank in order.
    let mut links: BTreeMap<(u16, u64), Vec<(u64, &str)>> = BTreeMap::new();
    let mut open: BTreeSet<(u16, u64)> = BTreeSet::new();
    let mut of_call: BTreeMap<(u16, u64), u64> = BTreeMap::new();
    let mut in_engine: BTreeMap<(u16, u64), &str> = BTreeMap::new();
    let mut order: Vec<Vec<u64>> = vec![Vec::new(); usize::from(ranks)];
    let mut calls: BTreeSet<(u16, u64)> = BTreeSet::new();
    let mut owner: Option<OwnerId> = None;
    let mut asked: BTreeSet<OwnerId> = BTreeSet::new();
    let mut call_number = 0;
    let mut next_owner = 0;
    let mut down: BTreeSet<u16> = BTreeSet::new();
    let refused_before = counts.refused_calls;
    for step in 0..60 {
        now = now + Duration::from_millis(rng.random_range(0..if calm { 50 } else { 2_000 }));
        let quiet = step >= 40; // let everything come to an end
        let choice = rng.random_range(0..10);
        let event = match choice {
            0 | 1 if !quiet => {
                call_number += 1;
                let frontend = rng.random_range(1..=2);
                let method = methods[rng.random_range(0..methods.len())];
                for rank in 0..ranks {
                    if !(lossy && rng.random_bool(0.1)) {
                        links.entry((rank, frontend)).or_default().push((call_number, method));
                    }
                }
                None
            }
            2..=5 => {
                let waiting: Vec<_> = links.iter_mut().filter(|(_, queue)| !queue.is_empty()).collect();
                let at = rng.random_range(0..waiting.len().max(1));
                waiting.into_iter().nth(at).map(|((rank, frontend), queue)| {
                    let (call, method) = queue.remove(0);
                    ticket += 1;
                    open.insert((*rank, ticket));
                    of_call.insert((*rank, ticket), call);
                    in_engine.insert((*rank, ticket), method);
                    held(*rank, ticket, *frontend, method)
                })
            }
            6 if !quiet && !calm => {
                next_owner += 1;
                asked.insert(OwnerId(next_owner));
                Some(acquire(next_owner, "update", rng.random_range(0..3_000)))
            }
            7 => owner.take().map(|owner| Event::Release { owner }),
            8 if !quiet && !calm && rng.random_bool(0.3) => {
                let rank = rng.random_range(0..ranks);
                if down.remove(&rank) {
                    Some(up(rank))
                } else {
                    down.insert(rank);
                    calls.retain(|(at, _)| *at != rank);
                    Some(Event::EngineDown { rank: EngineIndex(rank), reason: "killed".to_owned() })
                }
            }
            9 if !quiet && !calm && rng.random_bool(0.1) => {
                Some(Event::FrontendGone { frontend: FrontendId(rng.random_range(1..=2)) })
            }
            _ => calls.pop_first().map(|(rank, ticket)| {
                if ticket >= 1 << 32 {
                    Event::CallAnswered {
                        rank: EngineIndex(rank),
                        operation: ticket - (1 << 32),
                        result: Ok(Value::Nil),
                    }
                } else {
                    answered(rank, ticket)
                }
            }),
        };
        if let Some(event) = event {
            control.handle_event(now, event);
        }
        if control.poll_timeout().is_some_and(|due| due <= now) {
            control.handle_timeout(now);
        }
        let mut forwards: BTreeSet<u16> = BTreeSet::new();
        let mut answers: BTreeSet<u16> = BTreeSet::new();
        let mut last_call = None;
        for action in actions(&mut control) {
            match action {
                Action::Decide { rank, ticket, verdict } => {
                    let key = (rank.0, ticket);
                    assert!(open.remove(&key), "{}: seed {seed}: {key:?}", law::ONCE);
                    match verdict {
                        Verdict::Forward => {
                            assert_eq!(owner, None, "{}: seed {seed}: a call", law::ONE_HOLDER);
                            assert!(!down.contains(&rank.0), "{}: seed {seed}", law::TO_THE_LIVING);
                            forwards.insert(rank.0);
                            calls.insert(key);
                            order[usize::from(rank.0)].push(of_call[&key]);
                            last_call = in_engine.get(&key).copied();
                        }
                        Verdict::Answer(_) => {
                            answers.insert(rank.0);
                        }
                        Verdict::Refuse(text) => {
                            assert!(text.starts_with("refused by the sidecar"));
                            counts.refused_calls += 1;
                        }
                    }
                }
                Action::Call { rank, operation, .. } => {
                    assert_eq!(owner, None, "{}: seed {seed}: an errand", law::ONE_HOLDER);
                    calls.insert((rank.0, operation + (1 << 32)));
                }
                Action::Granted { owner: new, .. } => {
                    assert_eq!(owner, None, "{}: seed {seed}: two owners", law::ONE_HOLDER);
                    assert!(asked.remove(&new), "seed {seed}");
                    owner = Some(new);
                    counts.grants += 1;
                }
                Action::Denied { owner: late, .. } => {
                    assert!(asked.remove(&late), "seed {seed}");
                }
                Action::Note { .. } => {}
            }
        }
        if !forwards.is_empty() {
            counts.forwarded_rounds += 1;
            let all = forwards.len() + answers.len();
            assert!(all >= usize::from(ranks), "{}: seed {seed}: {last_call:?} to {forwards:?}", law::WHOLE);
            if lockstep {
                assert_eq!(forwards.len() % usize::from(ranks), 0, "{}: seed {seed}", law::WHOLE);
            }
        }
    }
    // Where no message was lost, the ranks saw the same calls in the same order. (When one was, or the
    // gathering took too long, equal calls pair up differently.)
    let timed_out = counts.refused_calls > refused_before;
    for (a, b) in order.iter().zip(order.iter().skip(1)) {
        let both = |calls: &[u64], other: &[u64]| -> Vec<u64> {
            let kept = calls.iter().filter(|call| other.contains(call));
            kept.copied().collect()
        };
        if calm && !timed_out {
            assert_eq!(both(a, b), both(b, a), "{}: seed {seed}", law::ONE_ORDER);
            counts.compared += both(a, b).len();
        }
    }
    // Nothing stays open for longer than the deadlines.
    if let Some(owner) = owner.take() {
        control.handle_event(now, Event::Release { owner });
    }
    for _ in 0..50 {
        let Some(due) = control.poll_timeout() else {
            break;
        };
        now = now.max(due);
        control.handle_timeout(now);
        for action in actions(&mut control) {
            match action {
                Action::Decide { rank, ticket, .. } => {
                    open.remove(&(rank.0, ticket));
                }
                Action::Granted { owner, .. } => {
                    asked.remove(&owner);
                    control.handle_event(now, Event::Release { owner });
                }
                Action::Denied { owner, .. } => {
                    asked.remove(&owner);
                }
                _ => {}
            }
        }
    }
    for action in actions(&mut control) {
        match action {
            Action::Decide { rank, ticket, .. } => {
                open.remove(&(rank.0, ticket));
            }
            Action::Granted { owner, .. } => {
                asked.remove(&owner);
            }
            _ => {}
        }
    }
    assert!(open.is_empty(), "{}: seed {seed}: {open:?}", law::DECIDED);
    assert!(asked.is_empty(), "{}: seed {seed}: {asked:?}", law::DECIDED);
}

#[test]
fn every_call_is_decided_once_and_all_ranks_see_one_order_whatever_happens() {
    let mut counts = Counts::default();
    for seed in 0..20_000 {
        simulate(seed, &mut counts);
    }
    assert!(counts.forwarded_rounds > 10_000 && counts.refused_calls > 10_000, "{counts:?}");
    assert!(counts.grants > 10_000 && counts.compared > 1_000, "{counts:?}");
}

fn caught(mutation: Mutation, law: &str) {
    laws::caught(mutation, law, 5_000, |seed| {
        simulate(seed, &mut Counts::default());
        Ok(())
    });
}

#[test]
fn a_lock_that_is_free_after_the_death_of_an_engine_is_caught() {
    caught(Mutation::DeathFreesLock, law::ONE_HOLDER);
}

#[test]
fn a_call_that_reaches_a_part_of_a_lockstep_group_is_caught() {
    caught(Mutation::RunInPart, law::WHOLE);
}

#[test]
fn a_call_that_is_late_and_forgotten_is_caught() {
    caught(Mutation::DropLateRounds, law::DECIDED);
}

#[test]
fn equal_calls_that_are_paired_crosswise_are_caught() {
    caught(Mutation::GatherNewestFirst, law::ONE_ORDER);
}
