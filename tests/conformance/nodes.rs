//! Deployments over several nodes. Here a node is a sidecar with an address of its own on loopback; with hosts of
//! their own: `tests/e2e/test_cluster_fakes.py`.

use std::path::PathBuf;

use dp_sidecar_testkit::frontend::{FakeFrontend, NewRequest};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::harness::{
    Model, SOON, Setup, Sidecar, complete_on_all_ranks, directory, exited_with, free_port, frontend, model,
    states, until, weight_versions,
};

/// Two nodes with two ranks each, not started.
struct Pair {
    directory: tempfile::TempDir,
    model: Model,
    leader: String,
    token: PathBuf,
}

impl Pair {
    fn new(moe: bool) -> Self {
        let directory = directory();
        let model = model(directory.path(), "m", 1, moe);
        let token = directory.path().join("token");
        std::fs::write(&token, "the secret of this test").unwrap();
        let leader = format!("127.0.0.1:{}", free_port());
        Self { directory, model, leader, token }
    }

    /// The node whose first rank is `start`.
    fn node(&self, start: u16) -> Setup {
        Setup::spawning(4, &self.model).node(start, 2, &self.leader, &self.token)
    }

    /// Both nodes with a frontend, everything admitted and attached.
    fn up(&self, frontend: &mut FakeFrontend) -> (Sidecar, Sidecar) {
        let leader = self.node(0).frontend(frontend).start();
        let follower = self.node(2).start();
        frontend.startup(SOON).unwrap();
        leader.await_admitted();
        leader.await_attached(frontend.host_port());
        (leader, follower)
    }
}

fn link_of(status: &Value, start_rank: u16) -> Option<&str> {
    let nodes = status["nodes"].as_array()?;
    nodes.iter().find(|node| node["start_rank"] == start_rank)?["link"].as_str()
}

/// All four ranks answer, with the tokens of this model.
#[track_caller]
fn all_ranks_serve(frontend: &mut FakeFrontend, name: &str, model: &Model) {
    for completion in complete_on_all_ranks(frontend, name, 16, 4) {
        assert_eq!(completion.tokens, model.tokens(4));
    }
}

fn two_nodes_serve(moe: bool, follower_first: bool) {
    let pair = Pair::new(moe);
    let mut frontend = frontend(4, |options| options.moe = moe);
    let leader = || pair.node(0).frontend(&frontend).start();
    let follower = || pair.node(2).start();
    let (mut leader, mut follower) = if follower_first {
        let follower = follower();
        follower.await_status("the leader is missed", |status| {
            status["leader"]["state"].as_str().is_some_and(|state| state.contains("refused"))
        });
        follower.await_log(&["waiting for the leader at", &pair.leader, "refused"]);
        (leader(), follower)
    } else {
        let leader = leader();
        let status = leader.await_status("ranks are missed", |status| status["missing"] == "ranks 2 to 3");
        assert_eq!(status["sidecar"]["state"], "waiting for nodes");
        assert!(leader.processes().is_empty(), "nothing is started before all ranks have joined");
        (leader, follower())
    };
    assert_eq!(frontend.startup(SOON).unwrap().len(), 4);
    let status = leader.await_admitted();
    assert_eq!((link_of(&status, 0), link_of(&status, 2)), (Some("here"), Some("up")));
    leader.await_attached(frontend.host_port());
    let status = follower.await_status("its ranks serve", |status| states(status) == ["admitted"; 2]);
    assert_eq!(status["leader"]["up"], true);
    assert_eq!(status["deployment"]["start_rank"], 2);
    leader.await_status("round trips are measured", |status| status["nodes"][1]["rtt_us"].is_u64());
    let said = leader.command(&["version", "--json"]);
    let said = said.json();
    let relay = serde_json::json!({ "version": env!("CARGO_PKG_VERSION") });
    assert_eq!(said["running"]["relays"], serde_json::json!({ "0": relay, "2": relay }), "{said}");
    all_ranks_serve(&mut frontend, "r", &pair.model);
    let said = follower.command(&["pause"]);
    assert!(
        said.code != 0 && said.text().contains(&format!("use the leader's, at {}", pair.leader)),
        "{said:?}"
    );
    // The leader's end is everybody's.
    assert!(exited_with(leader.stop(), 0));
    assert!(exited_with(follower.await_end(), 0));
    leader.await_nothing_left();
    follower.await_nothing_left();
}

#[test]
fn two_dense_nodes_come_up_and_serve_whoever_is_first() {
    two_nodes_serve(false, false);
    two_nodes_serve(false, true);
}

#[test]
fn two_lockstep_nodes_come_up_and_serve_whoever_is_first() {
    two_nodes_serve(true, false);
    two_nodes_serve(true, true);
}

#[test]
fn nodes_that_differ_end_at_once_with_all_values() {
    let pair = Pair::new(false);
    let mut leader = pair.node(0).args(&["--frontend-slots", "4"]).start();
    let other = model(pair.directory.path(), "other", 1, true);
    let mut follower = Setup::spawning(4, &other).node(2, 2, &pair.leader, &pair.token).start();
    for sidecar in [&mut leader, &mut follower] {
        let status = sidecar.await_end();
        assert!(exited_with(status, 9), "{status}: {}", sidecar.log());
        let log = sidecar.log();
        for expected in [
            "(ranks 2 to 3)",
            "--frontend-slots: expected 4, found 8",
            "model kind: expected dense, found moe",
            "model files",
        ] {
            assert!(log.contains(expected), "{expected}: {log}");
        }
        assert!(!log.contains("starting engine"), "no engine was started: {log}");
        sidecar.await_nothing_left();
    }
}

#[test]
fn two_trainings_of_one_model_are_told_apart_before_anything_starts() {
    let pair = Pair::new(false);
    let mut leader = pair.node(0).start();
    // The same names, shapes and sizes.
    let other = model(pair.directory.path(), "other", 2, false);
    let mut follower = Setup::spawning(4, &other).node(2, 2, &pair.leader, &pair.token).start();
    for sidecar in [&mut leader, &mut follower] {
        let status = sidecar.await_end();
        let log = sidecar.log();
        assert!(exited_with(status, 9), "{status}: {log}");
        assert!(log.contains("model files (digest of") && log.contains("samples): expected"), "{log}");
        assert!(!log.contains("starting engine"), "no engine was started: {log}");
        sidecar.await_nothing_left();
    }
}

#[test]
fn a_second_claim_of_a_rank_is_refused_and_names_the_holder() {
    let pair = Pair::new(false);
    let mut frontend = frontend(4, |_| {});
    let (leader, _follower) = pair.up(&mut frontend);
    let mut second = pair.node(2).start();
    let status = second.await_end();
    assert!(exited_with(status, 9), "{status}: {}", second.log());
    assert!(second.log().contains("held by node"), "{}", second.log());
    assert_eq!(states(&leader.status().unwrap()), ["admitted"; 4]);
    all_ranks_serve(&mut frontend, "r", &pair.model);
}

#[test]
fn a_wrong_secret_is_refused_logged_once_and_changes_nothing() {
    let pair = Pair::new(false);
    let mut frontend = frontend(4, |_| {});
    let (leader, _follower) = pair.up(&mut frontend);
    let wrong = pair.directory.path().join("wrong");
    std::fs::write(&wrong, "not the secret of this test").unwrap();
    for _ in 0..3 {
        let mut stranger = Setup::spawning(4, &pair.model).node(2, 2, &pair.leader, &wrong).start();
        assert!(exited_with(stranger.await_end(), 9), "{}", stranger.log());
        assert!(stranger.log().contains("--auth-token-file"), "{}", stranger.log());
    }
    let log = leader.log();
    let refusals =
        log.lines().filter(|line| line.contains("peer refused") && !line.contains("DEBUG")).count();
    assert_eq!(refusals, 1, "{log}");
    assert!(!log.contains("the secret of this test"));
    assert_eq!(states(&leader.status().unwrap()), ["admitted"; 4]);
    all_ranks_serve(&mut frontend, "r", &pair.model);
}

#[test]
fn engines_of_a_follower_are_stopped_when_its_leader_stays_away() {
    let pair = Pair::new(false);
    let mut frontend = frontend(4, |_| {});
    let mut leader = pair.node(0).frontend(&frontend).start();
    let mut follower = pair.node(2).args(&["--leader-timeout", "1s"]).start();
    frontend.startup(SOON).unwrap();
    leader.await_admitted();
    leader.signal(Signal::SIGKILL);
    leader.await_end();
    let status = follower.await_end();
    assert!(exited_with(status, 7), "{status}: {}", follower.log());
    follower.await_nothing_left();
    leader.await_nothing_left();
}

#[test]
fn a_follower_that_is_stopped_takes_only_its_own_ranks_with_it_and_may_come_back() {
    let pair = Pair::new(false);
    let mut frontend = frontend(4, |_| {});
    let (leader, mut follower) = pair.up(&mut frontend);
    assert!(exited_with(follower.stop(), 0), "{}", follower.log());
    follower.await_nothing_left();
    let status = leader.await_status("its ranks are down", |status| {
        let states = states(status);
        states[..2] == ["admitted", "admitted"] && states[2..].iter().all(|state| state == "stopped")
    });
    assert_eq!(link_of(&status, 2), Some("down"));
    leader.await_log(&["node stops", "SIGTERM"]);
    follower.start_again();
    leader.await_admitted();
}

#[test]
fn an_update_reaches_the_ranks_of_all_nodes() {
    let pair = Pair::new(false);
    let mut frontend = frontend(4, |_| {});
    let (mut leader, mut follower) = pair.up(&mut frontend);
    let next = model(pair.directory.path(), "next", 2, false);
    let path = next.path.display().to_string();
    let said = leader.command(&["update", "--path", &path, "--version", "v2", "--json"]);
    assert_eq!(said.code, 0, "{}", said.text());
    assert_eq!(weight_versions(&leader.status().unwrap()), ["v2"; 4]);
    all_ranks_serve(&mut frontend, "r", &next);
    let refused = follower.command(&["update", "--path", &path]);
    assert!(refused.text().contains("use the leader's"), "{refused:?}");
    leader.stop();
    follower.await_end();
    leader.await_nothing_left();
    follower.await_nothing_left();
}

/// Kills a sidecar, starts it again, and gives the pids of the engines before and after.
fn killed_and_back(moe: bool, kill_leader: bool) {
    let pair = Pair::new(moe);
    let mut frontend = frontend(4, |options| options.moe = moe);
    let leader = || pair.node(0).args(&["--orphan-grace", "30s"]).frontend(&frontend).start();
    let follower = || pair.node(2).args(&["--orphan-grace", "30s"]).start();
    let (mut leader, mut follower) = (leader(), follower());
    frontend.startup(SOON).unwrap();
    leader.await_admitted();
    leader.await_attached(frontend.host_port());
    all_ranks_serve(&mut frontend, "before", &pair.model);
    let before = pids(&leader.status().unwrap());
    let running: Vec<String> = (0..8).map(|at| format!("running-{at}")).collect();
    for id in &running {
        frontend.servers[0].add(&NewRequest::new(id, 300)).unwrap();
    }
    let killed = if kill_leader { &mut leader } else { &mut follower };
    killed.signal(Signal::SIGKILL);
    killed.await_end();
    killed.start_again();
    leader.await_status("all nodes are back", |status| {
        states(status) == ["admitted"; 4] && link_of(status, 2) == Some("up")
    });
    let status = leader.await_admitted();
    assert_eq!(pids(&status), before, "no engine was started again");
    follower.await_status("the leader is back", |status| status["leader"]["up"] == true);
    for id in &running {
        let done = frontend.servers[0].await_request(id, SOON).unwrap();
        assert_eq!(done.tokens, pair.model.tokens(300), "requests in flight went on");
    }
    leader.await_attached(frontend.host_port());
    all_ranks_serve(&mut frontend, "after", &pair.model);
    leader.stop();
    follower.await_end();
    leader.await_nothing_left();
    follower.await_nothing_left();
}

fn pids(status: &Value) -> Vec<u64> {
    let engines = status["engines"].as_array().cloned().unwrap_or_default();
    engines.iter().map(|engine| engine["pid"].as_u64().unwrap_or_default()).collect()
}

#[test]
fn a_follower_killed_and_started_again_costs_no_engine_and_no_request() {
    killed_and_back(false, false);
    killed_and_back(true, false);
}

#[test]
fn a_leader_killed_and_started_again_costs_no_engine_and_no_request() {
    killed_and_back(false, true);
    killed_and_back(true, true);
}

#[test]
fn both_sidecars_killed_at_once_cost_no_engine() {
    for moe in [false, true] {
        let pair = Pair::new(moe);
        let mut frontend = frontend(4, |options| options.moe = moe);
        let mut leader = pair.node(0).args(&["--orphan-grace", "30s"]).frontend(&frontend).start();
        let mut follower = pair.node(2).args(&["--orphan-grace", "30s"]).start();
        frontend.startup(SOON).unwrap();
        let before = pids(&leader.await_admitted());
        leader.await_attached(frontend.host_port());
        for sidecar in [&mut leader, &mut follower] {
            sidecar.signal(Signal::SIGKILL);
            sidecar.await_end();
        }
        for sidecar in [&mut follower, &mut leader] {
            sidecar.start_again();
        }
        assert_eq!(pids(&leader.await_admitted()), before, "no engine was started again");
        leader.await_attached(frontend.host_port());
        all_ranks_serve(&mut frontend, "after", &pair.model);
        leader.stop();
        follower.await_end();
        leader.await_nothing_left();
        follower.await_nothing_left();
    }
}

#[test]
fn a_lockstep_group_waits_for_a_follower_that_was_stopped() {
    let pair = Pair::new(true);
    let mut frontend = frontend(4, |options| options.moe = true);
    let (mut leader, mut follower) = pair.up(&mut frontend);
    assert!(exited_with(follower.stop(), 0), "{}", follower.log());
    follower.await_nothing_left();
    leader
        .await_status("the group is down", |status| !states(status).iter().any(|state| state == "admitted"));
    follower.start_again();
    leader.await_admitted();
    leader.stop();
    follower.await_end();
    leader.await_nothing_left();
    follower.await_nothing_left();
}

#[test]
fn sigterm_while_nodes_are_missing_ends_all_that_wait() {
    let pair = Pair::new(false);
    let mut leader = Setup::spawning(6, &pair.model).node(0, 2, &pair.leader, &pair.token).start();
    let mut follower = Setup::spawning(6, &pair.model).node(2, 2, &pair.leader, &pair.token).start();
    follower.await_status("others are missed", |status| {
        status["leader"]["state"].as_str().is_some_and(|state| state.contains("waits for ranks 4 to 5"))
    });
    assert!(exited_with(leader.stop(), 0));
    assert!(exited_with(follower.await_end(), 0), "{}", follower.log());
    until("nothing is left", SOON, || follower.processes().is_empty().then_some(()));
}
