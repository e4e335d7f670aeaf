//! Sidecars and relay processes that are killed: who goes on, and who is told.

use std::collections::BTreeSet;

use dp_sidecar_testkit::frontend::{FakeFrontend, FrontendError, NewRequest};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::harness::{
    Model, SOON, Setup, Sidecar, complete_all, directory, engine, frontend, frontend_state, model, states,
};

/// Pids of the engines' processes.
fn pids(status: &Value) -> BTreeSet<i64> {
    status["engines"].as_array().unwrap().iter().filter_map(|engine| engine["pid"].as_i64()).collect()
}

fn relay_pid(status: &Value) -> i64 {
    status["sidecar"]["relay_pid"].as_i64().unwrap()
}

fn kill_9(sidecar: &mut Sidecar) {
    sidecar.signal(Signal::SIGKILL);
    sidecar.await_end();
}

/// Waits until each running request has at least `more` tokens more than now.
fn await_tokens(frontend: &mut FakeFrontend, more: usize) {
    let before: Vec<(String, usize)> = frontend
        .server()
        .requests()
        .iter()
        .filter(|(_, request)| request.finish.is_none())
        .map(|(id, request)| (id.clone(), request.tokens.len()))
        .collect();
    assert!(!before.is_empty(), "nothing is in flight");
    frontend
        .server()
        .until("tokens", SOON, |server| {
            before.iter().all(|(id, had)| server.requests()[id].tokens.len() >= had + more)
        })
        .unwrap();
}

/// The sidecar is killed with requests in flight, is away for a while, and comes back.
fn a_killed_sidecar_is_missed_by_nobody(model: &Model, moe: bool) {
    let mut frontend = frontend(2, |options| options.moe = moe);
    let mut sidecar = Setup::spawning(2, model).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    let before = sidecar.await_admitted();
    sidecar.await_attached(frontend.host_port());
    for at in 0..4 {
        frontend.server().add(&NewRequest::new(format!("long-{at}"), 600)).unwrap();
    }
    await_tokens(&mut frontend, 1);
    kill_9(&mut sidecar);
    // Nobody is there: tokens go on, and new requests are answered.
    await_tokens(&mut frontend, 50);
    for done in complete_all(&mut frontend, "alone", 4, 5) {
        assert_eq!(done.tokens, model.tokens(5));
    }
    sidecar.start_again();
    let after = sidecar.await_admitted();
    sidecar.await_attached(frontend.host_port());
    assert_eq!(pids(&before), pids(&after), "the engines are the same");
    assert_eq!(relay_pid(&before), relay_pid(&after), "the relay process is the same");
    for at in 0..4 {
        let done = frontend.server().await_request(&format!("long-{at}"), SOON).unwrap();
        assert_eq!((done.tokens, done.finish), (model.tokens(600), Some(1)));
    }
    for done in complete_all(&mut frontend, "after", 8, 5) {
        assert_eq!(done.tokens, model.tokens(5));
    }
    sidecar.stop();
    sidecar.await_nothing_left();
}

#[test]
fn a_killed_sidecar_costs_no_engine_and_no_request() {
    let directory = directory();
    a_killed_sidecar_is_missed_by_nobody(&model(directory.path(), "m", 1, false), false);
}

#[test]
fn a_killed_sidecar_costs_no_lockstep_group_and_no_request() {
    let directory = directory();
    a_killed_sidecar_is_missed_by_nobody(&model(directory.path(), "m", 1, true), true);
}

#[test]
fn a_killed_relay_process_costs_its_engines_and_frontends_which_all_come_back() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut first = frontend(2, |_| {});
    let mut sidecar = Setup::spawning(2, &model).frontend(&first).start();
    first.startup(SOON).unwrap();
    let before = sidecar.await_admitted();
    first.server().add(&NewRequest::new("long", 1_000_000)).unwrap();
    await_tokens(&mut first, 1);
    let relay = i32::try_from(relay_pid(&before)).unwrap();
    kill(Pid::from_raw(relay), Signal::SIGKILL).unwrap();
    // The frontend is told, so that it fails at once instead of waiting for ever.
    let error = first.server().until("its end", SOON, |_| false).unwrap_err();
    assert!(matches!(error, FrontendError::EngineDead { .. }), "{error}");
    let address = first.address().to_owned();
    drop(first);
    let mut second = frontend(2, |options| options.address = address);
    second.startup(SOON).unwrap();
    let after = sidecar.await_status("new engines behind a new relay process", |status| {
        states(status) == ["admitted", "admitted"]
            && pids(status).is_disjoint(&pids(&before))
            && status["sidecar"]["relay_pid"].as_i64().is_some_and(|pid| pid != i64::from(relay))
    });
    assert_eq!(frontend_state(&after, second.host_port()).as_deref(), Some("attached"));
    for done in complete_all(&mut second, "after", 8, 5) {
        assert_eq!(done.tokens, model.tokens(5));
    }
    sidecar.stop();
    sidecar.await_nothing_left();
}

#[test]
fn a_relay_process_that_dies_while_no_sidecar_is_there_is_replaced_by_the_next_one() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut sidecar = Setup::spawning(1, &model).start();
    let before = sidecar.await_admitted();
    let relay = i32::try_from(relay_pid(&before)).unwrap();
    kill_9(&mut sidecar);
    kill(Pid::from_raw(relay), Signal::SIGKILL).unwrap();
    sidecar.start_again();
    let after = sidecar.await_status("a new engine", |status| {
        states(status) == ["admitted"] && pids(status).is_disjoint(&pids(&before))
    });
    assert_ne!(relay_pid(&after), i64::from(relay));
    sidecar.stop();
    sidecar.await_nothing_left();
}

#[test]
fn a_killed_sidecar_costs_no_engine_that_somebody_else_has_started() {
    let mut frontend = frontend(2, |_| {});
    let mut sidecar = Setup::waiting(2, false).frontend(&frontend).start();
    let engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |_| {})).collect();
    frontend.startup(SOON).unwrap();
    sidecar.await_attached(frontend.host_port());
    for at in 0..4 {
        frontend.server().add(&NewRequest::new(format!("long-{at}"), 400)).unwrap();
    }
    await_tokens(&mut frontend, 1);
    kill_9(&mut sidecar);
    await_tokens(&mut frontend, 20);
    sidecar.start_again();
    sidecar.await_admitted();
    sidecar.await_attached(frontend.host_port());
    for at in 0..4 {
        let done = frontend.server().await_request(&format!("long-{at}"), SOON).unwrap();
        assert_eq!((done.tokens.len(), done.finish), (400, Some(1)));
    }
    assert_eq!(complete_all(&mut frontend, "after", 4, 5).len(), 4);
    assert!(engines.iter().all(|engine| engine.reporter().count("hello") == 1), "no engine said HELLO again");
}
