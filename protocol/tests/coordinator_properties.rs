//! Whatever comes in, in whatever order: the DP coordinator does not panic, the wave does not go
//! back, and one event causes a bounded number of actions.

use std::time::Duration;

use dp_sidecar_protocol::layout::{Layout, VllmVersion};
use dp_sidecar_protocol::machine::coordinator::{Action, Config, Coordinator, Event, Exclude, Report, Stamp};
use dp_sidecar_protocol::stats::Load;
use dp_sidecar_protocol::{EngineIndex, FrontendId, GroupKind, Incarnation, Time, Wave};
use proptest::prelude::*;

const SIZE: u16 = 3;

fn rank() -> impl Strategy<Value = EngineIndex> {
    // One of them is not in the group.
    (0..=SIZE).prop_map(EngineIndex)
}

fn incarnation() -> impl Strategy<Value = Incarnation> {
    (0..4_u64).prop_map(Incarnation)
}

fn wave() -> impl Strategy<Value = Wave> {
    prop_oneof![9 => 0..6_u64, 1 => Just(u64::MAX)].prop_map(Wave)
}

fn frontend() -> impl Strategy<Value = FrontendId> {
    (0..3_u64).prop_map(FrontendId)
}

fn report() -> impl Strategy<Value = Report> {
    let load = (any::<u64>(), any::<u64>(), any::<f64>()).prop_map(|(waiting, running, kv)| Load {
        waiting,
        running,
        kv_cache_usage: kv,
    });
    let stamp = (wave(), 0..4_u64).prop_map(|(wave, step)| Stamp { wave, step });
    let stats = proptest::option::of((load, stamp));
    let wave = || proptest::option::weighted(0.3, wave());
    (stats, wave(), wave()).prop_map(|(stats, wave_complete, start_wave)| Report {
        stats,
        wave_complete,
        start_wave,
    })
}

fn layout(minor: u16) -> Layout {
    Layout::closest(VllmVersion::new(0, minor, 0))
}

fn event() -> impl Strategy<Value = Event> {
    let target = proptest::option::of(rank().prop_map(Exclude::Index));
    prop_oneof![
        1 => (11..35_u16).prop_map(|minor| Event::Version(Box::new(layout(minor)))),
        6 => (rank(), incarnation())
            .prop_map(|(rank, incarnation)| Event::Subscribed { rank, incarnation }),
        6 => (rank(), incarnation(), report()).prop_map(|(rank, incarnation, report)| {
            Event::Report { rank, incarnation, report }
        }),
        2 => (target, wave()).prop_map(|(target, wave)| Event::FirstRequest { target, wave }),
        2 => (frontend(), wave()).prop_map(|(frontend, wave)| Event::StartWave { frontend, wave }),
        3 => rank().prop_map(|rank| Event::Wake { rank }),
        2 => rank().prop_map(|rank| Event::Admitted { rank }),
        2 => (rank(), incarnation())
            .prop_map(|(rank, incarnation)| Event::EngineDown { rank, incarnation }),
        1 => frontend().prop_map(|frontend| Event::FrontendAttached { frontend }),
        1 => frontend().prop_map(|frontend| Event::FrontendDetached { frontend }),
    ]
}

fn config() -> impl Strategy<Value = Config> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(lockstep, upstream, publish)| {
        let kind = GroupKind::of(lockstep);
        let mut config = Config::hosted(kind, SIZE);
        if upstream {
            config = Config::upstream(kind, SIZE, layout(32));
        }
        config.upstream.publish = publish;
        config
    })
}

proptest! {
    #[test]
    fn no_order_of_events_breaks_the_machine(
        config in config(),
        steps in proptest::collection::vec((event(), 0..700_u64), 0..80),
    ) {
        let kind = config.kind;
        let mut machine = Coordinator::new(config);
        let mut now = Time::ZERO;
        let mut wave = Wave(0);
        for (event, pause_ms) in steps {
            now = now + Duration::from_millis(pause_ms);
            // Early calls are harmless.
            machine.handle_timeout(now);
            while let Some(action) = machine.poll_action() {
                let reported = matches!(action, Action::Tell { .. } | Action::Forward { .. });
                prop_assert!(!reported, "{action:?} without a report");
            }
            machine.handle_event(now, event);
            let mut actions = 0;
            while let Some(action) = machine.poll_action() {
                actions += 1;
                if let Action::SendStartWave { wave: sent, .. } = &action {
                    prop_assert_eq!(*sent, machine.wave());
                    prop_assert_eq!(kind, GroupKind::Lockstep);
                }
            }
            prop_assert!(actions <= 2 * usize::from(SIZE) + 4, "{actions} actions");
            prop_assert!(machine.wave() >= wave, "{wave} to {}", machine.wave());
            wave = machine.wave();
            let snapshot = machine.snapshot();
            prop_assert!(snapshot.subscribed <= SIZE);
            prop_assert!(!snapshot.running || kind == GroupKind::Lockstep);
        }
        // Left alone it does not spin: each timeout is later than the one before.
        for _ in 0..20 {
            let Some(due) = machine.poll_timeout() else { break };
            let before = now;
            now = due.max(now);
            machine.handle_timeout(now);
            while machine.poll_action().is_some() {}
            let next = machine.poll_timeout();
            prop_assert!(next.is_none_or(|next| next > before), "{next:?} after {before:?}");
        }
    }
}

#[test]
fn a_wave_at_the_end_of_its_range_stays_there() {
    let mut machine = Coordinator::new(Config::hosted(GroupKind::Lockstep, 1));
    let (rank, incarnation) = (EngineIndex(0), Incarnation(1));
    machine.handle_event(Time::ZERO, Event::Subscribed { rank, incarnation });
    let report = Report::wave_complete(Wave(u64::MAX));
    let event = Event::Report { rank, incarnation, report };
    machine.handle_event(Time::ZERO, event);
    assert_eq!(machine.wave(), Wave(u64::MAX));
}
