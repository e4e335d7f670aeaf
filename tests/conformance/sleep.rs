//! Engines that sleep, by frontends and by the operator: memory is given up and brought back in parts, weights that were
//! discarded are loaded before anything is answered.

use dp_sidecar_testkit::frontend::{FakeFrontend, FrontendError, NewRequest};
use nix::sys::signal::Signal;
use rmpv::Value;

use super::harness::{
    Model, SOON, Setup, Sidecar, complete_on_all_ranks, directory, free_port, frontend, model,
    weight_versions,
};

struct Rig {
    _directory: tempfile::TempDir,
    old: Model,
    new: Model,
    frontend: FakeFrontend,
    sidecar: Sidecar,
}

fn rig(moe: bool) -> Rig {
    let directory = directory();
    let old = model(directory.path(), "old", 1, moe);
    let new = model(directory.path(), "new", 2, moe);
    let mut frontend = frontend(2, |options| options.moe = moe);
    let address = frontend.host_port().to_owned();
    let sidecar =
        Setup::spawning(2, &old).faults("").args(&["--orphan-grace", "60s"]).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    sidecar.await_attached(&address);
    Rig { _directory: directory, old, new, frontend, sidecar }
}

fn tags(names: &[&str]) -> Vec<Value> {
    vec![Value::Array(names.iter().map(|name| Value::from(*name)).collect())]
}

impl Rig {
    fn call(&mut self, method: &str, args: &[Value]) -> Result<Vec<Value>, FrontendError> {
        self.frontend.server().call_all(method, args, SOON)
    }

    fn all_say(&mut self, method: &str, args: &[Value], answer: impl Into<Value>) {
        assert_eq!(self.call(method, args).unwrap(), vec![answer.into(); 2], "{method} {args:?}");
    }

    fn refused(&mut self, method: &str, args: &[Value], why: &str) {
        let error = self.call(method, args).unwrap_err().to_string();
        assert!(error.contains(why), "{method}: {error}");
    }

    /// A request for each rank, which is held.
    fn ask(&mut self, name: &str) {
        for rank in 0..2 {
            let request = NewRequest::new(format!("{name}-{rank}"), 4).to(rank);
            self.frontend.server().add(&request).unwrap();
        }
    }

    fn answered(&mut self, name: &str, expected: &[u32]) {
        for rank in 0..2 {
            let done = self.frontend.server().await_request(&format!("{name}-{rank}"), SOON).unwrap();
            assert_eq!((&done.tokens[..], done.finish), (expected, Some(1)), "{name} on rank {rank}");
        }
    }

    fn serves(&mut self, name: &str, expected: &[u32]) {
        for done in complete_on_all_ranks(&mut self.frontend, name, 8, 4) {
            assert_eq!(done.tokens, expected, "{name}");
        }
    }

    fn update(&self) -> super::harness::Said {
        let path = self.new.path.display().to_string();
        self.sidecar.command(&["update", "--json", "--path", &path, "--version", "v2"])
    }

    fn version(&self, expected: &str) -> serde_json::Value {
        self.sidecar.await_status(expected, |status| {
            status["weights"]["version"] == expected && weight_versions(status) == [expected; 2]
        })
    }
}

#[test]
fn the_sequence_of_colocated_training_answers_nothing_with_garbage() {
    for moe in [false, true] {
        let mut rig = rig(moe);
        let (old, new) = (rig.old.tokens(4), rig.new.tokens(4));
        rig.serves("before", &old);
        rig.all_say("sleep", &[Value::from(2)], Value::Nil);
        let status = rig.version("unknown");
        assert_eq!(status["engines"][1]["asleep"], serde_json::json!(["weights", "kv_cache"]));
        rig.all_say("is_sleeping", &[], true);
        rig.ask("held");

        let said = rig.update();
        assert_eq!(said.code, 10, "{}", said.text());
        assert!(
            said.text().contains("the weights of rank 0, 1 sleep: wake them up first"),
            "{}",
            said.text()
        );
        assert_eq!(said.json()["version"], "unknown");
        rig.refused("wake_up", &[], "load weights (`sidecar update`");
        rig.refused("resume_scheduler", &[], "the engines sleep: call wake_up");

        rig.all_say("wake_up", &tags(&["weights"]), false);
        rig.refused("wake_up", &tags(&["kv_cache"]), "the engines would answer with garbage");
        let said = rig.update();
        assert_eq!(said.code, 0, "{}", said.text());
        let report = said.json();
        assert_eq!((&report["status"], &report["asleep"]), (&"committed".into(), &true.into()), "{report:#}");
        let status = rig.version("v2");
        assert_eq!(status["engines"][0]["asleep"], serde_json::json!(["kv_cache"]));
        rig.all_say("is_sleeping", &[], true);

        rig.all_say("wake_up", &tags(&["kv_cache"]), true);
        rig.all_say("is_sleeping", &[], false);
        rig.answered("held", &new);
        rig.serves("after", &new);
        assert_eq!(rig.version("v2")["controller"]["paused"], false);
    }
}

#[test]
fn a_trainers_own_load_brings_the_engines_back_at_an_unknown_version() {
    let mut rig = rig(false);
    let new = rig.new.tokens(4);
    rig.all_say("sleep", &[Value::from(2)], Value::Nil);
    rig.ask("held");
    rig.all_say("wake_up", &tags(&["weights"]), false);
    let path = rig.new.path.display().to_string();
    let kwargs = Value::Map(vec![("weights_path".into(), path.into())]);
    let reload = ["reload_weights".into(), Value::Nil, Value::Array(Vec::new()), kwargs];
    rig.all_say("collective_rpc", &reload, Value::Array(vec![Value::Nil]));
    rig.all_say("wake_up", &tags(&["kv_cache"]), true);
    rig.answered("held", &new);
    rig.serves("after", &new);
    rig.version("unknown");
}

#[test]
fn level_1_keeps_weights_and_version_and_requests_wait() {
    let mut rig = rig(true);
    let old = rig.old.tokens(4);
    rig.all_say("sleep", &[Value::from(1), Value::from("keep")], Value::Nil);
    rig.version("default");
    rig.ask("asleep");
    rig.all_say("wake_up", &tags(&["kv_cache"]), false);
    rig.all_say("wake_up", &[], true);
    rig.answered("asleep", &old);
    rig.version("default");
}

#[test]
fn worker_methods_do_not_go_around_the_engines_sleep() {
    let mut rig = rig(false);
    for method in ["sleep", "wake_up", "discard"] {
        rig.refused("collective_rpc", &[method.into()], "call the engine's own sleep or wake_up");
    }
    let old = rig.old.tokens(4);
    rig.serves("after", &old);
}

#[test]
fn a_sidecar_that_starts_again_in_front_of_discarded_weights_opens_no_gate() {
    for moe in [false, true] {
        let mut rig = rig(moe);
        let (address, new) = (rig.frontend.host_port().to_owned(), rig.new.tokens(4));
        rig.all_say("sleep", &[Value::from(2)], Value::Nil);
        rig.sidecar.signal(Signal::SIGKILL);
        rig.sidecar.await_end();
        rig.ask("away");
        rig.sidecar.start_again();
        rig.sidecar.await_attached(&address);
        let status = rig.version("unknown");
        assert_eq!(status["engines"][0]["restarts"], 0, "{status:#}");
        rig.ask("back");
        rig.refused("wake_up", &[], "discarded by a sleep of level 2");
        rig.all_say("wake_up", &tags(&["weights"]), false);

        // In the middle of the sequence as well.
        rig.sidecar.signal(Signal::SIGKILL);
        rig.sidecar.await_end();
        rig.sidecar.start_again();
        rig.sidecar.await_attached(&address);
        rig.version("unknown");
        let said = rig.update();
        assert_eq!(said.code, 0, "{}", said.text());
        rig.all_say("wake_up", &tags(&["kv_cache"]), true);
        rig.answered("away", &new);
        rig.answered("back", &new);
        rig.version("v2");
    }
}

#[test]
fn the_operator_puts_all_ranks_to_sleep_and_wakes_them_up_in_parts() {
    for moe in [false, true] {
        let mut rig = rig(moe);
        let (old, new) = (rig.old.tokens(4), rig.new.tokens(4));
        let said = rig.sidecar.command(&["sleep"]);
        assert_eq!(said.code, 0, "{}", said.text());
        assert!(said.text().contains("rank 1 asleep: weights, kv_cache\n"), "{}", said.text());
        rig.refused("wake_up", &[], "paused by the operator");
        let said = rig.sidecar.command(&["resume"]);
        assert_eq!(said.code, 15, "{}", said.text());
        assert!(said.text().contains("sidecar wake"), "{}", said.text());
        rig.ask("asleep");
        let said = rig.sidecar.command(&["wake"]);
        assert_eq!(said.code, 0, "{}", said.text());
        assert!(said.text().contains("the engines serve"), "{}", said.text());
        rig.answered("asleep", &old);

        let said = rig.sidecar.command(&["sleep", "--level", "2", "--mode", "abort", "--json"]);
        assert_eq!(said.code, 0, "{}", said.text());
        let report = said.json();
        assert_eq!(report["version"], "unknown", "{report:#}");
        for engine in report["engines"].as_array().unwrap() {
            assert_eq!(engine["without_weights"], true, "{report:#}");
            assert_eq!(engine["asleep"], serde_json::json!(["weights", "kv_cache"]));
        }
        rig.ask("held");
        let said = rig.sidecar.command(&["wake"]);
        assert_eq!(said.code, 15, "{}", said.text());
        assert!(
            said.text().contains("`sidecar wake --tag weights`, then `sidecar update`"),
            "{}",
            said.text()
        );
        let said = rig.sidecar.command(&["wake", "--tag", "weights"]);
        assert_eq!(said.code, 0, "{}", said.text());
        assert!(said.text().contains("next: `sidecar update`, then `sidecar wake`"), "{}", said.text());
        let said = rig.update();
        assert_eq!(said.code, 0, "{}", said.text());
        let said = rig.sidecar.command(&["wake", "--tag", "kv_cache"]);
        assert_eq!(said.code, 0, "{}", said.text());
        rig.answered("held", &new);
        rig.serves("after", &new);
        rig.version("v2");
    }
}

#[test]
fn a_rank_that_does_not_fall_asleep_is_named() {
    let mut rig = rig(false);
    rig.sidecar.set_faults(1, "sleep-fails");
    rig.call("is_sleeping", &[]).unwrap();
    let said = rig.sidecar.command(&["sleep", "--level", "2"]);
    assert_eq!(said.code, 15, "{}", said.text());
    assert!(said.text().contains("rank 0 asleep: weights, kv_cache"), "{}", said.text());
    assert!(
        said.text().contains("error: rank 1: Call to sleep method failed: ordered fault"),
        "{}",
        said.text()
    );
    rig.version("unknown");
    rig.sidecar.set_faults(1, "");
    let said = rig.sidecar.command(&["sleep", "--level", "2"]);
    assert_eq!(said.code, 0, "{}", said.text());
    for args in [&["wake", "--tag", "weights"][..], &["wake", "--tag", "kv_cache"]] {
        if args.contains(&"kv_cache") {
            assert_eq!(rig.update().code, 0);
        }
        let said = rig.sidecar.command(args);
        assert_eq!(said.code, 0, "{}", said.text());
    }
    let new = rig.new.tokens(4);
    rig.serves("after", &new);
}

#[test]
fn all_ranks_of_two_nodes_sleep_and_wake_up() {
    let directory = directory();
    let (old, new) = (model(directory.path(), "old", 1, true), model(directory.path(), "new", 2, true));
    let token = directory.path().join("token");
    std::fs::write(&token, "the secret of this test").unwrap();
    let address = format!("127.0.0.1:{}", free_port());
    let mut frontend = frontend(4, |options| options.moe = true);
    let node = |start| Setup::spawning(4, &old).node(start, 2, &address, &token);
    let leader = node(0).frontend(&frontend).start();
    let _follower = node(2).start();
    frontend.startup(SOON).unwrap();
    leader.await_admitted();
    leader.await_attached(frontend.host_port());
    let said = leader.command(&["sleep", "--level", "2", "--json"]);
    assert_eq!(said.code, 0, "{}", said.text());
    assert_eq!(said.json()["engines"].as_array().unwrap().len(), 4);
    assert_eq!(leader.command(&["wake", "--tag", "weights"]).code, 0);
    let path = new.path.display().to_string();
    let said = leader.command(&["update", "--path", &path, "--version", "v2"]);
    assert_eq!(said.code, 0, "{}", said.text());
    assert!(said.text().contains("still asleep"), "{}", said.text());
    let said = leader.command(&["wake"]);
    assert_eq!(said.code, 0, "{}", said.text());
    for done in complete_on_all_ranks(&mut frontend, "after", 16, 4) {
        assert_eq!(done.tokens, new.tokens(4));
    }
}
