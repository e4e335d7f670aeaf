//! The attachment machine step by step: what it says about frontends that do not fit, and what it
//! tolerates.
#![allow(clippy::unwrap_used, reason = "test helpers")]

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::handshake::{Addresses, ConfigValue, Init};
use dp_sidecar_protocol::machine::attachment::{Action, Attachment, Engines, Event, STALL, Snapshot, State};
use dp_sidecar_protocol::{EngineIndex, Time, Wave};

const A: u64 = 1;
/// What `host` is.
const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 7));

struct Bench {
    machine: Attachment,
    now: Time,
}

/// INIT of a frontend with this many API servers.
fn init(api_servers: u32, coordinator: bool, size: Option<i64>) -> Bytes {
    let list = |kind: &str| (0..api_servers).map(|n| format!("tcp://host:{kind}{n}")).collect();
    let mut init = Init::independent(Addresses {
        inputs: list("i"),
        outputs: list("o"),
        coordinator_input: coordinator.then(|| "tcp://host:b".to_owned()),
        coordinator_output: coordinator.then(|| "tcp://host:k".to_owned()),
        frontend_stats_publish_address: coordinator.then(|| "f".to_owned()),
    });
    if let Some(size) = size {
        let size = ("data_parallel_size".to_owned(), ConfigValue::Int(size));
        init.parallel_config.push(size);
    }
    init.encode()
}

impl Bench {
    /// A deployment with all handshake sockets connected to the frontend.
    fn connected(size: u16, lockstep: bool) -> Self {
        let mut bench = Self { machine: Attachment::new("host:7200", STALL), now: Time::ZERO };
        bench.event(Event::FreeSlots(4));
        bench.event(Event::EnginesComplete(Engines {
            size,
            lockstep,
            parallel_config_hash: lockstep.then(|| "cafe".to_owned()),
        }));
        bench.event(Event::ProbeOk { attempt: A, peer: PEER, mismatch: None });
        for rank in (0..size).map(EngineIndex) {
            bench.event(Event::HandshakeConnected { attempt: A, rank });
        }
        bench.drain();
        bench.pass(Duration::from_millis(100));
        assert_eq!(bench.drain(), [hello(0)]);
        bench
    }

    fn event(&mut self, event: Event) {
        self.machine.handle_event(self.now, event);
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        self.machine.handle_timeout(self.now);
    }

    fn drain(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.machine.poll_action()).collect()
    }

    fn init(&mut self, rank: u16, payload: Bytes) {
        self.event(Event::Init { attempt: A, rank: EngineIndex(rank), payload });
    }

    fn handshake_lost(&mut self, rank: u16) {
        self.event(Event::HandshakeLost { attempt: A, rank: EngineIndex(rank), reason: "closed".to_owned() });
    }

    fn snapshot(&self) -> Snapshot {
        self.machine.snapshot()
    }

    /// Asserts that the frontend is shown as refused, with a text that has these parts.
    fn assert_refused(&self, parts: &[&str]) {
        let snapshot = self.snapshot();
        assert_eq!(snapshot.state, State::Refused, "{snapshot:?}");
        let detail = snapshot.detail.unwrap();
        for part in ["frontend host:7200"].iter().chain(parts) {
            assert!(detail.contains(part), "{part:?} is missing in {detail:?}");
        }
    }
}

fn hello(rank: u16) -> Action {
    Action::SendHello { attempt: A, rank: EngineIndex(rank) }
}

fn is_teardown(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Teardown { .. }))
}

#[test]
fn the_whole_way_to_attached_and_back() {
    let mut bench = Bench::connected(2, true);
    bench.init(0, init(2, true, Some(2)));
    assert_eq!(bench.drain(), [hello(1)]);
    bench.init(1, init(2, true, Some(2)));
    let actions = bench.drain();
    let routes = actions.iter().filter(|action| matches!(action, Action::OpenRoute { .. }));
    assert_eq!(routes.count(), 4);
    assert!(actions.contains(&Action::ConnectCoordinator {
        attempt: A,
        rank: EngineIndex(1),
        input: "tcp://host:b".to_owned(),
        output: "tcp://host:k".to_owned(),
    }));
    let rank = EngineIndex(0);
    bench.event(Event::CoordinatorReady { attempt: A, rank });
    assert_eq!(bench.drain(), []);
    let rank = EngineIndex(1);
    bench.event(Event::CoordinatorReady { attempt: A, rank });
    let ready =
        |rank| Action::SendReady { attempt: A, rank: EngineIndex(rank), stats_address: Some("f".to_owned()) };
    assert_eq!(bench.drain(), [Action::JoinCoordinator { attempt: A }, ready(0), ready(1)]);
    for rank in 0..2 {
        bench.handshake_lost(rank);
        for api_server in 0..2 {
            assert_eq!(bench.snapshot().state, State::Registering);
            bench.event(Event::RouteOpen { attempt: A, rank: EngineIndex(rank), api_server });
        }
    }
    assert_eq!(
        bench.drain(),
        [Action::CloseHandshake { attempt: A }, Action::Attached { attempt: A, api_servers: 2 },]
    );
    for rank in (0..2).map(EngineIndex) {
        bench.event(Event::StartWave { attempt: A, rank, wave: Wave(3) });
    }
    let wave = Action::StartWave { wave: Wave(3) };
    assert_eq!(bench.drain(), [wave]);
    bench.now = bench.now + Duration::from_secs(60);
    bench.event(Event::RouteLost {
        attempt: A,
        rank: EngineIndex(1),
        api_server: 0,
        reason: "closed".to_owned(),
    });
    let actions = bench.drain();
    assert!(
        matches!(&actions[..], [Action::Teardown { told_dead, .. }] if *told_dead == ["tcp://host:o0", "tcp://host:o1"]),
        "{actions:?}"
    );
    assert_eq!(bench.snapshot().slots_claimed, 2);
    bench.event(Event::TornDown { attempt: A });
    assert_eq!(bench.snapshot().slots_claimed, 0);
    bench.pass(Duration::from_millis(100));
    assert_eq!(bench.drain(), [Action::Probe { attempt: 2 }]);
}

#[test]
fn without_a_coordinator_ready_waits_for_nothing() {
    let mut bench = Bench::connected(1, false);
    bench.init(0, init(1, false, None));
    let actions = bench.drain();
    assert!(
        matches!(&actions[..], [Action::OpenRoute { .. }, Action::SendReady { stats_address: None, .. }]),
        "{actions:?}"
    );
}

#[test]
fn another_dp_size_of_a_moe_frontend_is_read_from_init_before_the_second_hello() {
    let mut bench = Bench::connected(2, true);
    bench.init(0, init(1, true, Some(4)));
    bench.assert_refused(&["--data-parallel-size 4", "this deployment has 2"]);
    let actions = bench.drain();
    assert!(!is_teardown(&actions) && !actions.contains(&hello(1)));
    // It is not asked again; when it has gone the next one is.
    bench.pass(Duration::from_secs(600));
    assert_eq!(bench.drain(), []);
    bench.handshake_lost(0);
    assert!(is_teardown(&bench.drain()));
    bench.assert_refused(&["--data-parallel-size 4"]);
}

#[test]
fn another_dp_size_of_a_dense_frontend_is_told_by_what_it_does() {
    // Smaller: it closes the connection at the first rank it does not know.
    let mut bench = Bench::connected(4, false);
    for rank in 0..2 {
        bench.init(rank, init(1, true, None));
    }
    assert_eq!(bench.drain(), [hello(1), hello(2)]);
    bench.handshake_lost(0);
    bench.assert_refused(&["after HELLO of rank 2", "--data-parallel-size 2 while this deployment has 4"]);

    // Larger: its coordinator waits.
    let mut bench = Bench::connected(1, false);
    bench.init(0, init(1, true, None));
    bench.pass(Duration::from_secs(30));
    bench.assert_refused(&[
        "broadcast READY to 0 of 1 ranks",
        "--data-parallel-size is probably larger than 1",
        "--data-parallel-size-local",
    ]);
    assert!(!is_teardown(&bench.drain()));

    // Larger, and without a coordinator: it keeps its handshake socket open.
    let mut bench = Bench::connected(1, false);
    bench.init(0, init(1, false, None));
    bench.event(Event::RouteOpen { attempt: A, rank: EngineIndex(0), api_server: 0 });
    bench.pass(Duration::from_secs(5));
    let snapshot = bench.snapshot();
    assert_eq!(snapshot.state, State::Attached);
    assert!(snapshot.detail.unwrap().contains("wait for more engines than 1"));
}

#[test]
fn a_dense_and_a_moe_model_do_not_fit_together() {
    let mut bench = Bench::connected(2, true);
    bench.init(0, init(1, true, None));
    bench.assert_refused(&["this deployment runs a MoE model", "another model"]);
    let mut bench = Bench::connected(2, false);
    bench.init(0, init(1, true, Some(2)));
    bench.assert_refused(&["this deployment runs a dense model", "another model"]);
}

#[test]
fn a_frontend_that_goes_away_after_ready_may_have_another_config_hash() {
    let mut bench = Bench::connected(1, true);
    bench.init(0, init(1, false, None));
    bench.handshake_lost(0);
    bench.event(Event::RouteLost {
        attempt: A,
        rank: EngineIndex(0),
        api_server: 0,
        reason: "closed".to_owned(),
    });
    bench.assert_refused(&["right after READY", "cafe", "configuration mismatch"]);
}

#[test]
fn too_many_api_servers_are_refused_with_numbers_and_go_on_when_slots_are_free() {
    let mut bench = Bench::connected(1, false);
    bench.init(0, init(5, false, None));
    bench.assert_refused(&["5 API servers", "4 slots are free", "--frontend-slots"]);
    assert_eq!(bench.drain().len(), 1);
    bench.event(Event::FreeSlots(4));
    assert_eq!(bench.drain(), [], "said once");
    bench.event(Event::FreeSlots(5));
    assert_eq!(bench.snapshot().state, State::Registering);
    assert_eq!(bench.snapshot().slots_claimed, 5);
}

#[test]
fn a_process_that_cannot_fit_gets_no_hello_and_is_looked_at_again() {
    let mut machine = Attachment::new("host:7200", STALL);
    machine.handle_event(
        Time::ZERO,
        Event::EnginesComplete(Engines { size: 2, lockstep: false, parallel_config_hash: None }),
    );
    machine.handle_event(
        Time::ZERO,
        Event::ProbeOk {
            attempt: A,
            peer: PEER,
            mismatch: Some("frontend host:7200 (pid 7) serves model other".to_owned()),
        },
    );
    let actions: Vec<_> = std::iter::from_fn(|| machine.poll_action()).collect();
    assert!(matches!(&actions[..], [Action::Probe { .. }, Action::Refused { .. }]), "{actions:?}");
    assert_eq!(machine.snapshot().state, State::Refused);
    assert_eq!(machine.poll_timeout(), Some(Time::from_millis(5000)));
    machine.handle_timeout(Time::from_millis(5000));
    assert_eq!(machine.poll_action(), Some(Action::Probe { attempt: 2 }));
}

#[test]
fn an_incomplete_deployment_names_the_missing_ranks() {
    let mut machine = Attachment::new("host:7200", STALL);
    let missing = (3..20).map(EngineIndex).collect();
    machine.handle_event(Time::ZERO, Event::EnginesMissing(missing));
    assert_eq!(machine.poll_action(), None);
    let snapshot = machine.snapshot();
    assert_eq!(snapshot.state, State::Waiting);
    assert_eq!(
        snapshot.detail.unwrap(),
        "the deployment is not complete: waiting for ranks 3, 4, 5, 6, 7, 8, 9, 10, .."
    );
}

#[test]
fn init_that_is_no_init_is_refused() {
    let mut bench = Bench::connected(2, false);
    bench.init(0, Bytes::from_static(b"\xc1"));
    bench.assert_refused(&["malformed INIT to rank 0"]);
    assert!(!bench.drain().contains(&hello(1)));
}

#[test]
fn sockets_of_another_host_or_of_this_one_are_not_connected() {
    let with = |change: &dyn Fn(&mut Addresses)| {
        let mut init = Init::decode(&init(2, true, Some(2))).unwrap();
        change(&mut init.addresses);
        init.encode()
    };
    type Change = fn(&mut Addresses, String);
    let places: [Change; 4] = [
        |addresses, socket| addresses.inputs[1] = socket,
        |addresses, socket| addresses.outputs[1] = socket,
        |addresses, socket| addresses.coordinator_input = Some(socket),
        |addresses, socket| addresses.coordinator_output = Some(socket),
    ];
    for change in places {
        for socket in [
            "tcp://10.0.0.8:7300",
            "tcp://other:7300",
            "tcp://[::1]:7300",
            "tcp://0.0.0.0:7300",
            "tcp://10.0.0.7",
            "ipc:///run/dp-sidecar/0.1.i",
            "10.0.0.7:7300",
        ] {
            let mut bench = Bench::connected(2, true);
            bench.init(0, with(&|addresses| change(addresses, socket.to_owned())));
            bench.assert_refused(&[socket, "own host, 10.0.0.7", "--data-parallel-address"]);
            assert!(matches!(&bench.drain()[..], [Action::Refused { .. }]), "{socket}");
        }
        for socket in ["tcp://10.0.0.7:7300", "tcp://HOST:7300", "tcp://[::ffff:10.0.0.7]:7300"] {
            let mut bench = Bench::connected(2, true);
            let init = with(&|addresses| change(addresses, socket.to_owned()));
            bench.init(0, init.clone());
            bench.init(1, init);
            assert_eq!(bench.snapshot().state, State::Registering, "{socket}");
        }
    }
    // Nobody here connects to the one for frontends.
    let mut bench = Bench::connected(1, false);
    let ipc = with(&|addresses| addresses.frontend_stats_publish_address = Some("ipc:///tmp/x".to_owned()));
    bench.init(0, ipc);
    assert_eq!(bench.snapshot().state, State::Registering);
}

#[test]
fn a_removed_frontend_is_told_only_if_it_may_have_routes() {
    let mut bench = Bench::connected(2, false);
    bench.event(Event::Remove);
    let actions = bench.drain();
    assert!(
        matches!(&actions[..], [Action::Teardown { told_dead, .. }] if told_dead.is_empty()),
        "{actions:?}"
    );
    bench.event(Event::TornDown { attempt: A });
    assert_eq!(bench.drain(), [Action::Done]);
    assert_eq!(bench.machine.poll_timeout(), None);

    let mut bench = Bench::connected(1, false);
    bench.init(0, init(1, false, None));
    bench.drain();
    bench.event(Event::Remove);
    let actions = bench.drain();
    assert!(
        matches!(&actions[..], [Action::Teardown { told_dead, .. }] if *told_dead == ["tcp://host:o0"]),
        "{actions:?}"
    );
}
