//! Drains, and sidecars that end on purpose without what they started.

use std::io::{Read, Write};

use dp_sidecar_testkit::frontend::{FakeFrontend, NewRequest};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::harness::{
    Model, SOON, Setup, Sidecar, complete_all, directory, exited_with, free_port, frontend, model, until,
};

/// Pid and incarnation of each engine.
fn lives(status: &Value) -> Vec<(i64, i64)> {
    let engines = status["engines"].as_array().unwrap();
    let number = |engine: &Value, name: &str| engine[name].as_i64().unwrap();
    engines.iter().map(|engine| (number(engine, "pid"), number(engine, "incarnation"))).collect()
}

fn sum(status: &Value, field: &str) -> u64 {
    status["engines"].as_array().unwrap().iter().map(|engine| engine[field].as_u64().unwrap()).sum()
}

/// Two engines that outlive their sidecar, and a frontend.
fn start(model: &Model, moe: bool, change: impl FnOnce(Setup) -> Setup) -> (Sidecar, FakeFrontend) {
    let mut frontend = frontend(2, |options| options.moe = moe);
    let setup = Setup::spawning(2, model).args(&["--orphan-grace", "60s"]);
    let sidecar = change(setup).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    sidecar.await_attached(frontend.host_port());
    (sidecar, frontend)
}

fn begin(frontend: &mut FakeFrontend, id: &str, tokens: u32) {
    frontend.server().add(&NewRequest::new(id, tokens)).unwrap();
    frontend.server().until("a first token", SOON, |s| !s.requests()[id].tokens.is_empty()).unwrap();
}

#[test]
fn a_drain_lets_requests_end_and_holds_new_ones_until_the_resume() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let (mut sidecar, mut frontend) = start(&model, false, |setup| setup);
    begin(&mut frontend, "long", 100_000);
    let said = sidecar.command(&["drain", "--limit", "1s"]);
    assert_eq!(said.code, 5, "a request still runs: {}", said.text());
    assert!(said.text().contains("1 running"), "{}", said.text());
    frontend.server().add(&NewRequest::new("new", 3)).unwrap();
    sidecar.await_status("a held request", |status| sum(status, "held") == 1);
    assert_eq!(sidecar.command(&["pause"]).code, 13, "the drain has the engines");
    frontend.server().abort(&["long"]).unwrap();
    let said = sidecar.command(&["drain", "--limit", "10s"]);
    assert_eq!(said.code, 0, "{}", said.text());
    assert_eq!(frontend.server().request("new").unwrap().tokens.len(), 0);
    assert_eq!(sidecar.command(&["resume"]).code, 0);
    let done = frontend.server().await_request("new", SOON).unwrap();
    assert_eq!((done.tokens, done.finish), (model.tokens(3), Some(1)));
    for done in complete_all(&mut frontend, "after", 4, 3) {
        assert_eq!(done.tokens, model.tokens(3));
    }
    sidecar.stop();
    sidecar.await_nothing_left();
}

fn a_planned_restart_is_missed_by_nobody(model: &Model, moe: bool) {
    let (mut sidecar, mut frontend) =
        start(model, moe, |setup| setup.args(&["--keep-engines"]).args(&["--shutdown-timeout", "1s"]));
    let before = sidecar.await_admitted();
    // Longer than the sidecar waits.
    begin(&mut frontend, "long", 2_000);
    sidecar.signal(Signal::SIGTERM);
    frontend.server().add(&NewRequest::new("new", 3)).unwrap();
    let status = sidecar.await_end();
    assert!(exited_with(status, 0), "{status}");
    sidecar.start_again();
    let after = sidecar.await_admitted();
    assert_eq!(lives(&before), lives(&after));
    sidecar.await_attached(frontend.host_port());
    let done = frontend.server().await_request("new", SOON).unwrap();
    assert_eq!((done.tokens, done.finish), (model.tokens(3), Some(1)), "held by nobody any more");
    let done = frontend.server().await_request("long", SOON).unwrap();
    assert_eq!((done.tokens, done.finish), (model.tokens(2_000), Some(1)));
    for done in complete_all(&mut frontend, "after", 4, 3) {
        assert_eq!(done.tokens, model.tokens(3));
    }
    let said = sidecar.command(&["stop"]);
    assert_eq!(said.code, 0, "{}", said.text());
    assert!(exited_with(sidecar.await_end(), 0));
    sidecar.await_nothing_left();
}

#[test]
fn a_planned_restart_keeps_engines_and_requests() {
    let directory = directory();
    a_planned_restart_is_missed_by_nobody(&model(directory.path(), "m", 1, false), false);
}

#[test]
fn a_planned_restart_keeps_a_lockstep_group_and_its_requests() {
    let directory = directory();
    a_planned_restart_is_missed_by_nobody(&model(directory.path(), "m", 1, true), true);
}

#[test]
fn an_engine_that_dies_while_no_sidecar_is_there_is_started_again_and_the_other_goes_on() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let (mut sidecar, mut frontend) = start(&model, false, |setup| setup);
    let before = lives(&sidecar.await_admitted());
    sidecar.signal(Signal::SIGKILL);
    sidecar.await_end();
    let victim = nix::unistd::Pid::from_raw(i32::try_from(before[1].0).unwrap());
    nix::sys::signal::kill(victim, Signal::SIGKILL).unwrap();
    until("the engine is gone", SOON, || (!sidecar.processes().contains(&victim.as_raw())).then_some(()));
    sidecar.start_again();
    let after = sidecar.await_status("two engines", |status| {
        super::harness::states(status) == ["admitted", "admitted"] && lives(status)[1] != before[1]
    });
    let after = lives(&after);
    assert_eq!(after[0], before[0]);
    assert!(
        after[1].1 > before.iter().map(|life| life.1).max().unwrap(),
        "a new number: {before:?} {after:?}"
    );
    for done in complete_all(&mut frontend, "after", 4, 3) {
        assert_eq!(done.tokens, model.tokens(3));
    }
    sidecar.stop();
    sidecar.await_nothing_left();
}

#[test]
fn a_sidecar_with_other_flags_stops_the_engines_of_the_one_before() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let (mut sidecar, _frontend) = start(&model, false, |setup| setup);
    let before = lives(&sidecar.await_admitted());
    sidecar.signal(Signal::SIGKILL);
    sidecar.await_end();
    sidecar.start_again_with(&["--frontend-slots", "3"]);
    let after = lives(&sidecar.await_admitted());
    assert!(before.iter().all(|(pid, _)| after.iter().all(|(now, _)| pid != now)), "{before:?} {after:?}");
    sidecar.stop();
    sidecar.await_nothing_left();
}

#[test]
fn the_served_frontend_outlives_a_killed_sidecar() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let port = free_port().to_string();
    let mut sidecar = Setup::spawning(2, &model)
        .args(&["--orphan-grace", "60s"])
        .args(&["--serve", "--port", &port, "--host", "127.0.0.1"])
        .start();
    let before = lives(&sidecar.await_admitted());
    until("an HTTP answer", SOON, || answers(&port));
    let processes = sidecar.processes();
    sidecar.signal(Signal::SIGKILL);
    sidecar.await_end();
    assert!(answers(&port).is_some(), "without a sidecar, too");
    sidecar.start_again();
    let after = lives(&sidecar.await_admitted());
    assert_eq!(before, after);
    until("an HTTP answer", SOON, || answers(&port));
    assert_eq!(sidecar.processes(), processes);
    sidecar.stop();
    sidecar.await_nothing_left();
}

fn answers(port: &str) -> Option<()> {
    let body = r#"{"prompt": [1, 2, 3], "max_tokens": 4}"#;
    let mut stream = std::net::TcpStream::connect(format!("127.0.0.1:{port}")).ok()?;
    write!(stream, "POST /v1/completions HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()).ok()?;
    stream.shutdown(std::net::Shutdown::Write).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.starts_with("HTTP/1.1 200").then_some(())
}

#[test]
fn stop_waits_for_the_end_and_says_what_for() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut frontend = frontend(1, |_| {});
    let mut sidecar = Setup::spawning(1, &model).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    frontend.server().add(&NewRequest::new("r", 1_000_000)).unwrap();
    sidecar.await_status("it runs", |status| status["engines"][0]["in_flight"] == 1);
    let said = sidecar.command(&["stop"]);
    // Nothing is left when the command ends.
    assert!(sidecar.has_ended(), "{}", said.text());
    assert!(sidecar.processes().is_empty());
    assert_eq!(said.code, 0, "{}", said.text());
    for part in ["waiting for 1 running requests", "the sidecar has stopped"] {
        assert!(said.stdout.contains(part), "{part}: {}", said.text());
    }
    assert_eq!(sidecar.command(&["stop"]).code, 14);
    sidecar.start_again();
    sidecar.await_admitted();
    let began = std::time::Instant::now();
    assert_eq!(sidecar.command(&["stop", "--no-wait"]).stdout.trim(), "the sidecar stops");
    assert!(!sidecar.has_ended(), "ended within {:?}", began.elapsed());
    assert!(sidecar.await_end().success());
}
