//! The handshake machine against engines, strangers and doubles.

#![allow(clippy::unwrap_used, reason = "test helpers")]

use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::handshake::Hello;
use dp_sidecar_protocol::machine::handshake::{Action, Config, Event, Handshake, PeerId, Report, Stage, Via};
use dp_sidecar_protocol::{EngineIndex, Incarnation, Time};
use proptest::prelude::*;

const INIT: Bytes = Bytes::from_static(b"the INIT payload");

fn machine(ranks: std::ops::Range<u16>) -> Handshake {
    Handshake::new(Config::new(ranks))
}

fn expect(rank: u16, incarnation: u64, own: bool) -> Event {
    Event::Expect { rank: EngineIndex(rank), incarnation: Incarnation(incarnation), own, init: INIT }
}

fn forget(rank: u16, incarnation: u64) -> Event {
    Event::Forget { rank: EngineIndex(rank), incarnation: Incarnation(incarnation) }
}

fn says(via: Via, peer: u64, rank: u16, payload: Bytes) -> Event {
    Event::Message {
        via,
        peer: PeerId(peer),
        identity: Bytes::copy_from_slice(&EngineIndex(rank).identity().0),
        frames: vec![payload],
    }
}

fn hello(peer: u64, rank: u16) -> Event {
    says(Via::Shared, peer, rank, Hello::HEADLESS.encode())
}

fn ready(peer: u64, rank: u16, hash: Option<&str>) -> Event {
    says(Via::Shared, peer, rank, ready_payload(hash))
}

/// READY written by hand, so that the test does not depend on our own writer.
fn ready_payload(hash: Option<&str>) -> Bytes {
    let mut map = vec![
        ("status".into(), "READY".into()),
        ("local".into(), false.into()),
        ("headless".into(), true.into()),
    ];
    if let Some(hash) = hash {
        map.push(("parallel_config_hash".into(), hash.into()));
    }
    let mut out = Vec::new();
    rmpv::encode::write_value(&mut out, &rmpv::Value::Map(map)).unwrap();
    out.into()
}

fn drain(machine: &mut Handshake) -> Vec<Action> {
    std::iter::from_fn(|| machine.poll_action()).collect()
}

fn step(machine: &mut Handshake, event: Event) -> Vec<Action> {
    machine.handle_event(Time::ZERO, event);
    drain(machine)
}

/// The only action, which must be a refusal.
fn refusal(actions: &[Action]) -> (Option<u16>, &str) {
    match actions {
        [Action::Report(Report::Refused { rank, error })] => (rank.map(|rank| rank.0), error),
        other => panic!("expected one refusal, got {other:?}"),
    }
}

fn assert_says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{part:?} is missing in {error:?}");
    }
}

fn stage(machine: &Handshake, rank: u16) -> Stage {
    machine.snapshot().ranks[&EngineIndex(rank)].1.clone()
}

#[test]
fn two_engines_start_in_any_order_and_init_waits_for_nobody() {
    let mut machine = machine(0..2);
    step(&mut machine, expect(0, 1, false));
    step(&mut machine, expect(1, 1, false));
    for rank in [1, 0] {
        let actions = step(&mut machine, hello(u64::from(rank), rank));
        assert_eq!(
            actions,
            [
                Action::SendInit { peer: PeerId(rank.into()), init: INIT },
                Action::Report(Report::Connected { rank: EngineIndex(rank), incarnation: Incarnation(1) }),
            ]
        );
    }
    for rank in [1, 0] {
        let actions = step(&mut machine, ready(rank.into(), rank, Some("h")));
        assert_eq!(
            actions,
            [Action::Report(Report::Ready {
                rank: EngineIndex(rank),
                incarnation: Incarnation(1),
                parallel_config_hash: Some("h".to_owned()),
                num_gpu_blocks: None,
            })]
        );
    }
    assert_eq!(machine.poll_timeout(), None);
}

#[test]
fn any_combination_of_local_and_headless_is_accepted() {
    for (local, headless) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut machine = machine(0..1);
        step(&mut machine, expect(0, 1, false));
        let hello = Hello { local, headless }.encode();
        let actions = step(&mut machine, says(Via::Shared, 1, 0, hello));
        assert_eq!(actions.len(), 2, "{local} {headless}: {actions:?}");
    }
}

#[test]
fn an_engine_that_comes_before_it_is_expected_gets_init_when_it_is() {
    let mut machine = machine(0..2);
    assert_eq!(step(&mut machine, hello(7, 1)), []);
    let actions = step(&mut machine, expect(1, 1, false));
    assert!(matches!(actions[0], Action::SendInit { peer, .. } if peer == PeerId(7)));

    // Not if it has gone in the meantime.
    assert_eq!(step(&mut machine, hello(8, 0)), []);
    step(&mut machine, Event::Closed { peer: PeerId(8) });
    assert_eq!(step(&mut machine, expect(0, 1, false)), []);
}

#[test]
fn strangers_are_refused_with_the_ranks_that_are_expected() {
    let mut machine = machine(2..4);
    step(&mut machine, expect(2, 1, false));
    let actions = step(&mut machine, hello(1, 5));
    let (rank, error) = refusal(&actions);
    assert_eq!(rank, None);
    assert_says(error, &["rank 5", "expected ranks 2..3"]);

    let actions = step(
        &mut machine,
        Event::Message {
            via: Via::Shared,
            peer: PeerId(2),
            identity: Bytes::from_static(b"\x00abcd"),
            frames: vec![Hello::HEADLESS.encode()],
        },
    );
    let (rank, error) = refusal(&actions);
    assert_eq!(rank, None);
    assert_says(error, &["5-byte identity 0061626364"]);
    assert_eq!(stage(&machine, 2), Stage::New);
}

#[test]
fn a_second_hello_is_refused_with_both_explanations_and_the_first_engine_goes_on() {
    let mut machine = machine(0..1);
    step(&mut machine, expect(0, 3, false));
    step(&mut machine, hello(1, 0));
    for stage in ["is starting", "is ready"] {
        let actions = step(&mut machine, hello(2, 0));
        let (rank, error) = refusal(&actions);
        assert_eq!(rank, None);
        assert_says(error, &["two engines run with rank 0", "exit being noticed", stage, "incarnation 3"]);
        step(&mut machine, ready(1, 0, None));
    }
    assert_eq!(stage(&machine, 0), Stage::Ready);
    // When the first is given up, the newcomer gets its INIT.
    step(&mut machine, forget(0, 3));
    let actions = step(&mut machine, expect(0, 4, false));
    assert!(matches!(actions[0], Action::SendInit { peer, .. } if peer == PeerId(2)));
}

#[test]
fn a_second_hello_on_the_same_connection_disqualifies_the_engine() {
    let mut machine = machine(0..1);
    step(&mut machine, expect(0, 1, false));
    step(&mut machine, hello(1, 0));
    let actions = step(&mut machine, hello(1, 0));
    assert_eq!(refusal(&actions).0, Some(0));
    assert_eq!(stage(&machine, 0), Stage::Refused);
}

#[test]
fn ready_of_the_first_engine_is_not_taken_for_that_of_its_successor() {
    let mut machine = machine(0..1);
    step(&mut machine, expect(0, 1, false));
    step(&mut machine, hello(1, 0));
    step(&mut machine, expect(0, 2, false));
    step(&mut machine, hello(2, 0));
    let actions = step(&mut machine, ready(1, 0, None));
    assert_says(refusal(&actions).1, &["another connection"]);
    let actions = step(&mut machine, ready(2, 0, None));
    assert!(
        matches!(actions[0], Action::Report(Report::Ready { incarnation, .. }) if incarnation == Incarnation(2))
    );
}

#[test]
fn ready_out_of_turn_is_refused() {
    let mut machine = machine(0..2);
    let actions = step(&mut machine, ready(1, 0, None));
    assert_says(refusal(&actions).1, &["not expected"]);
    step(&mut machine, expect(0, 1, false));
    let actions = step(&mut machine, ready(1, 0, None));
    assert_says(refusal(&actions).1, &["expected HELLO first"]);
    step(&mut machine, hello(1, 0));
    assert_eq!(step(&mut machine, ready(1, 0, None)).len(), 1);
    let actions = step(&mut machine, ready(1, 0, None));
    assert_says(refusal(&actions).1, &["second READY from rank 0"]);
    assert_eq!(stage(&machine, 0), Stage::Ready);
}

#[test]
fn differing_hashes_name_both_ranks_and_both_values() {
    let mut machine = machine(0..3);
    for rank in 0..3 {
        step(&mut machine, expect(rank, 1, false));
        step(&mut machine, hello(rank.into(), rank));
    }
    step(&mut machine, ready(0, 0, Some("aaaa")));
    let actions = step(&mut machine, ready(1, 1, Some("bbbb")));
    let (rank, error) = refusal(&actions);
    assert_eq!(rank, Some(1));
    assert_says(error, &["rank 0", "aaaa", "rank 1", "bbbb"]);
    // The third is not disturbed.
    let actions = step(&mut machine, ready(2, 2, Some("aaaa")));
    assert!(matches!(actions[0], Action::Report(Report::Ready { .. })));
    // A new incarnation with the same flags as the others is welcome.
    step(&mut machine, expect(1, 2, false));
    step(&mut machine, hello(9, 1));
    let actions = step(&mut machine, ready(9, 1, Some("aaaa")));
    assert!(matches!(actions[0], Action::Report(Report::Ready { .. })));
}

#[test]
fn a_malformed_message_disqualifies_only_the_engine_that_sent_it() {
    let mut machine = machine(0..2);
    step(&mut machine, expect(0, 1, false));
    step(&mut machine, expect(1, 1, false));
    let garbage = |peer, rank| says(Via::Shared, peer, rank, Bytes::from_static(b"GET / HTTP"));
    let actions = step(&mut machine, garbage(1, 0));
    assert_eq!(refusal(&actions).0, None);
    assert_eq!(stage(&machine, 0), Stage::New);
    step(&mut machine, hello(1, 0));
    let actions = step(&mut machine, garbage(1, 0));
    assert_eq!(refusal(&actions).0, Some(0));
    // A stranger with the same identity cannot do that to rank 1.
    step(&mut machine, hello(2, 1));
    let actions = step(&mut machine, garbage(3, 1));
    assert_eq!(refusal(&actions).0, None);
    assert_eq!(stage(&machine, 1), Stage::Connected);
}

#[test]
fn an_engine_that_dies_before_ready_is_reported_at_once() {
    let mut machine = machine(0..1);
    step(&mut machine, expect(0, 1, false));
    step(&mut machine, hello(1, 0));
    let actions = step(&mut machine, Event::Closed { peer: PeerId(1) });
    let (rank, error) = refusal(&actions);
    assert_eq!(rank, Some(0));
    assert_says(error, &["died while it was starting"]);
    // After READY the connection closes as a matter of course.
    step(&mut machine, expect(0, 2, false));
    step(&mut machine, hello(2, 0));
    step(&mut machine, ready(2, 0, None));
    assert_eq!(step(&mut machine, Event::Closed { peer: PeerId(2) }), []);
}

#[test]
fn own_ports_and_the_shared_address_do_not_mix() {
    let mut machine = machine(0..2);
    step(&mut machine, expect(0, 1, true));
    let actions = step(&mut machine, hello(1, 0));
    assert_says(refusal(&actions).1, &["starts rank 0 itself"]);
    let own = |rank, incarnation| {
        let via = Via::Own { rank: EngineIndex(0), incarnation: Incarnation(incarnation) };
        says(via, 2, rank, Hello::HEADLESS.encode())
    };
    let actions = step(&mut machine, own(1, 1));
    assert_says(refusal(&actions).1, &["port made for rank 0"]);
    let actions = step(&mut machine, own(0, 0));
    assert_says(refusal(&actions).1, &["given up"]);
    assert_eq!(step(&mut machine, own(0, 1)).len(), 2);
}

#[test]
fn deadlines_apply_to_engines_that_have_init_and_progress_names_the_others() {
    let mut machine = Handshake::new(Config {
        ranks: 0..2,
        ready_timeout: Duration::from_secs(60),
        progress_interval: Duration::from_secs(10),
    });
    step(&mut machine, expect(0, 1, false));
    step(&mut machine, expect(1, 1, false));
    step(&mut machine, hello(0, 0));
    assert_eq!(machine.poll_timeout(), Some(Time::from_millis(10_000)));
    machine.handle_timeout(Time::from_millis(9_999));
    assert_eq!(drain(&mut machine), []);
    machine.handle_timeout(Time::from_millis(10_000));
    assert_eq!(
        drain(&mut machine),
        [Action::Waiting { hello: vec![EngineIndex(1)], ready: vec![EngineIndex(0)] }]
    );
    machine.handle_timeout(Time::from_millis(60_000));
    let actions = drain(&mut machine);
    let Some(Action::Report(Report::Refused { rank, error })) = actions.first() else {
        panic!("{actions:?}");
    };
    assert_eq!(*rank, Some(EngineIndex(0)));
    assert_says(error, &["no READY within 60s"]);
    // Rank 1 may still come, however late.
    machine.handle_event(Time::from_millis(7_200_000), hello(1, 1));
    assert_eq!(stage(&machine, 1), Stage::Connected);
}

fn any_event() -> impl Strategy<Value = Event> {
    let via = prop_oneof![
        Just(Via::Shared),
        (0u16..4, 0u64..4).prop_map(|(rank, incarnation)| Via::Own {
            rank: EngineIndex(rank),
            incarnation: Incarnation(incarnation),
        }),
    ];
    let payload = prop_oneof![
        Just(Hello::HEADLESS.encode()),
        Just(ready_payload(None)),
        Just(ready_payload(Some("x"))),
        proptest::collection::vec(any::<u8>(), 0..20).prop_map(Bytes::from),
    ];
    prop_oneof![
        (0u16..4, 0u64..4, any::<bool>()).prop_map(|(r, i, own)| expect(r, i, own)),
        (0u16..4, 0u64..4).prop_map(|(rank, incarnation)| forget(rank, incarnation)),
        (via, 0u64..6, 0u16..5, payload)
            .prop_map(|(via, peer, rank, payload)| says(via, peer, rank, payload)),
        (0u64..6).prop_map(|peer| Event::Closed { peer: PeerId(peer) }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn every_expectation_gets_at_most_one_init_and_one_ready_after_it(
        events in proptest::collection::vec(any_event(), 0..60)
    ) {
        let mut machine = machine(0..4);
        // Since the last expectation of the rank: INITs sent, READYs accepted.
        let mut seen = [(0u32, 0u32); 4];
        for (at, event) in (0u64..).zip(events) {
            if let Event::Expect { rank, .. } = &event {
                seen[usize::from(rank.0)] = (0, 0);
            }
            machine.handle_event(Time::from_millis(at), event);
            let actions = drain(&mut machine);
            prop_assert!(actions.len() <= 2, "{actions:?}");
            for action in actions {
                match action {
                    Action::Report(Report::Connected { rank, .. }) => {
                        let (inits, _) = &mut seen[usize::from(rank.0)];
                        *inits += 1;
                        prop_assert_eq!(*inits, 1);
                    }
                    Action::Report(Report::Ready { rank, .. }) => {
                        let (inits, readies) = &mut seen[usize::from(rank.0)];
                        *readies += 1;
                        prop_assert_eq!((*inits, *readies), (1, 1));
                    }
                    _ => {}
                }
            }
        }
    }
}
