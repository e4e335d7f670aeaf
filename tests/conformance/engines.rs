//! Engines die, and frontends do not notice more than they must.

use dp_sidecar_testkit::frontend::{Completion, NewRequest};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{SOON, Setup, Sidecar, complete_all, directory, exited_with, frontend, model, states};

/// Kills the engine core of a rank (the child of its launcher) with -9.
fn kill_engine(sidecar: &Sidecar, rank: usize) -> u64 {
    let status = sidecar.await_admitted();
    let launcher = status["engines"][rank]["pid"].as_i64().unwrap();
    let children = std::fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
    let core: i32 = children.split_whitespace().next().unwrap().parse().unwrap();
    kill(Pid::from_raw(core), Signal::SIGKILL).unwrap();
    status["engines"][rank]["incarnation"].as_u64().unwrap()
}

#[test]
fn a_dense_engine_killed_under_load_is_answered_for_and_comes_back() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut frontend = frontend(2, |options| options.api_servers = 2);
    let sidecar = Setup::spawning(2, &model).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    for at in 0..8 {
        let rank = u16::try_from(at % 2).unwrap();
        frontend.server().add(&NewRequest::new(format!("r{at}"), 500).to(rank)).unwrap();
    }
    frontend
        .server()
        .until("tokens of all", SOON, |server| {
            server.requests().values().all(|request| !request.tokens.is_empty())
        })
        .unwrap();
    let life = kill_engine(&sidecar, 1);
    for at in 0..8 {
        let done = frontend.server().await_request(&format!("r{at}"), SOON).unwrap();
        if at % 2 == 0 {
            assert_eq!((done.tokens.len(), done.finish), (500, Some(1)), "r{at}");
        } else {
            // Abort or error; never a normal end, never a hang.
            assert!(matches!(done.finish, Some(2 | 3)), "r{at}: {done:?}");
        }
    }
    // What arrives meanwhile goes to the other rank or waits; nobody is told ENGINE_CORE_DEAD.
    for done in complete_all(&mut frontend, "meanwhile", 8, 5) {
        assert_eq!(done.tokens, model.tokens(5));
    }
    let status = sidecar.await_status("rank 1 back", |status| {
        status["engines"][1]["incarnation"].as_u64().unwrap() > life
            && states(status) == ["admitted", "admitted"]
    });
    assert!(status["engines"][1]["restarts"].as_u64().unwrap() >= 1);
    assert_eq!(status["engines"][0]["restarts"], 0);
    let done = frontend.server().complete(&NewRequest::new("after", 4).to(1), SOON).unwrap();
    assert_eq!(done.tokens, model.tokens(4));
    for server in &mut frontend.servers {
        server.pump().unwrap();
    }
    assert_eq!(frontend.reporter().count("engine_core_dead"), 0);
}

#[test]
fn a_request_for_a_dead_rank_is_held_until_it_is_back() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut frontend = frontend(2, |_| {});
    let sidecar = Setup::spawning(2, &model).env("FAKE_VLLM_START_MS", "500").frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    kill_engine(&sidecar, 0);
    sidecar.await_status("rank 0 down", |status| states(status)[0] != "admitted");
    let done = frontend.server().complete(&NewRequest::new("held", 4).to(0), SOON).unwrap();
    assert_eq!((done.tokens, done.finish), (model.tokens(4), Some(1)));
}

#[test]
fn a_lockstep_group_lives_and_dies_together_and_serves_again() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, true);
    let mut a = frontend(2, |options| options.moe = true);
    let mut b = frontend(2, |options| options.moe = true);
    let sidecar = Setup::spawning(2, &model).frontend(&a).frontend(&b).start();
    a.startup(SOON).unwrap();
    b.startup(SOON).unwrap();
    for at in 0..4 {
        let rank = u16::try_from(at % 2).unwrap();
        a.server().add(&NewRequest::new(format!("a{at}"), 100_000).to(rank)).unwrap();
    }
    a.server()
        .until("tokens of all", SOON, |server| {
            server.requests().values().all(|request| !request.tokens.is_empty())
        })
        .unwrap();
    let life = kill_engine(&sidecar, 1);
    for at in 0..4 {
        let done = a.server().await_request(&format!("a{at}"), SOON).unwrap();
        assert!(matches!(done.finish, Some(2 | 3)), "a{at}: {done:?}");
    }
    sidecar.await_status("group back", |status| {
        states(status) == ["admitted", "admitted"]
            && (0..2).all(|rank| status["engines"][rank]["incarnation"].as_u64().unwrap() > life)
    });
    for (name, frontend) in [("a", &mut a), ("b", &mut b)] {
        for done in complete_all(frontend, &format!("{name} again"), 6, 5) {
            assert_eq!(done.tokens, model.tokens(5));
        }
        assert_eq!(frontend.reporter().count("engine_core_dead"), 0);
    }
}

#[test]
fn engine_core_dead_of_an_engine_is_not_passed_on() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut frontend = frontend(2, |_| {});
    let sidecar = Setup::spawning(2, &model).faults("").frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    frontend.server().add(&NewRequest::new("r", 100_000).to(0)).unwrap();
    sidecar.set_faults(0, "dead:now");
    let done = frontend.server().await_request("r", SOON).unwrap();
    assert!(matches!(done.finish, Some(2 | 3)), "{done:?}");
    sidecar.set_faults(0, "");
    sidecar.await_status("rank 0 restarted", |status| status["engines"][0]["restarts"].as_u64() >= Some(1));
    sidecar.await_admitted();
    frontend.server().complete(&NewRequest::new("after", 3).to(0), SOON).unwrap();
}

#[test]
fn an_engine_whose_output_cannot_be_read_is_restarted_and_its_requests_are_answered() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut frontend = frontend(2, |_| {});
    let sidecar = Setup::spawning(2, &model).faults("").frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    for rank in [0, 1] {
        frontend.server().add(&NewRequest::new(format!("r{rank}"), 100_000).to(rank)).unwrap();
    }
    let has_tokens = |request: &Completion| !request.tokens.is_empty();
    frontend.server().until("tokens", SOON, |server| server.requests().values().all(has_tokens)).unwrap();
    sidecar.set_faults(0, "garbled-output");
    let done = frontend.server().await_request("r0", SOON).unwrap();
    assert!(matches!(done.finish, Some(3)), "{done:?}");
    sidecar.set_faults(0, "");
    let status =
        sidecar.await_status("restart", |status| status["engines"][0]["restarts"].as_u64() >= Some(1));
    let why = status["engines"][0]["last_error"].as_str().unwrap();
    assert!(why.contains("cannot be read"), "{why}");
    sidecar.await_admitted();
    frontend.server().complete(&NewRequest::new("after", 3).to(0), SOON).unwrap();
    // The other rank's request goes on, and a drain waits for nothing that cannot come.
    frontend.server().abort(&["r1"]).unwrap();
    assert_eq!(sidecar.command(&["drain", "--limit", "20s"]).code, 0);
}

#[test]
fn an_engine_that_ends_during_its_start_is_reported_at_once_with_its_last_lines() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let setup = Setup::spawning(2, &model).faults("1@die:after-init").args(&[
        "--max-restarts",
        "0",
        "--startup-timeout",
        "600s",
    ]);
    let start = std::time::Instant::now();
    let mut sidecar = setup.start();
    let status = sidecar.await_end();
    assert!(exited_with(status, 6), "{status}");
    assert!(start.elapsed() < SOON, "no waiting out of the timeout");
    let line = sidecar.await_log(&["rank 1"]);
    assert!(!line.is_empty());
    sidecar.await_log(&["die at AfterInit"]);
    sidecar.await_nothing_left();
}

#[test]
fn an_engine_without_the_shim_is_named() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let sidecar = Setup::spawning(2, &model).faults("1@no-shim").start();
    let line = sidecar.await_log(&["shim", "rank 1"]);
    assert!(line.contains("dp-sidecar-shim") || line.contains("shim"), "{line}");
}

#[test]
fn a_shim_of_another_protocol_is_named_with_both_versions() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let sidecar = Setup::spawning(2, &model).faults("0@shim-protocol:99,0@shim-version:7.7.7").start();
    sidecar.await_log(&["shim", "99", "rank 0"]);
}

#[test]
fn a_wrong_hash_of_a_spawned_rank_ends_the_start_and_names_it() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, true);
    let sidecar = Setup::spawning(2, &model).faults("1@wrong-hash").args(&["--max-restarts", "0"]).start();
    sidecar.await_log(&["another-parallel-config", "rank"]);
}

#[test]
fn an_engine_that_never_gets_ready_is_given_up_and_said_so() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut sidecar = Setup::spawning(2, &model)
        .faults("0@never-ready")
        .args(&["--max-restarts", "0", "--startup-timeout", "2s"])
        .start();
    let status = sidecar.await_end();
    assert!(exited_with(status, 6) || exited_with(status, 5), "{status}");
    sidecar.await_log(&["rank 0", "READY"]);
    sidecar.await_nothing_left();
}

#[test]
fn an_engine_that_dies_again_and_again_is_given_up_after_the_allowed_restarts() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let sidecar = Setup::spawning(2, &model).faults("").args(&["--max-restarts", "2"]).start();
    sidecar.await_admitted();
    // The file stays: each next life ends as soon as it reads it.
    sidecar.set_faults(1, "die:now");
    let status = sidecar
        .await_status("rank 1 given up, rank 0 serving", |status| states(status) == ["admitted", "failed"]);
    assert_eq!(sidecar.command(&["status"]).code, 6);
    assert_eq!(status["sidecar"]["state"], "degraded");
    assert_eq!(status["engines"][1]["restarts"], 2);
    let error = status["engines"][1]["last_error"].as_str().unwrap();
    assert!(error.contains("engine 1"), "{error}");
    let starts = sidecar
        .log()
        .lines()
        .filter(|line| line.contains("starting engine") && line.contains("rank=1"))
        .count();
    assert_eq!(starts, 3, "one start and two restarts");
}

#[test]
fn a_request_for_a_rank_that_has_failed_is_answered_at_once() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut frontend = frontend(2, |_| {});
    let sidecar =
        Setup::spawning(2, &model).faults("").args(&["--max-restarts", "0"]).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    sidecar.set_faults(1, "die:now");
    sidecar.await_status("rank 1 given up", |status| states(status) == ["admitted", "failed"]);
    let done = frontend.server().complete(&NewRequest::new("vain", 3).to(1), SOON).unwrap();
    assert!(matches!(done.finish, Some(3)), "{done:?}");
    let status =
        sidecar.await_status("refusal", |status| status["engines"][1]["refused"].as_u64() >= Some(1));
    let why = status["engines"][1]["last_refusal"].as_str().unwrap();
    assert!(why.contains("DP rank 1 has failed"), "{why}");
    frontend.server().complete(&NewRequest::new("other", 3).to(0), SOON).unwrap();
}
