//! Weight updates as transactions, on fake engines that really read the checkpoints.

use std::collections::BTreeSet;
use std::path::Path;

use dp_sidecar_testkit::engine::weights;
use dp_sidecar_testkit::frontend::{FakeFrontend, NewRequest};

use super::harness::{
    Model, SOON, Said, Setup, Sidecar, complete_all, directory, exited_with, frontend, model, states,
    weight_versions,
};

pub(super) struct Rig {
    pub(super) directory: tempfile::TempDir,
    old: Model,
    pub(super) new: Model,
    frontend: FakeFrontend,
    pub(super) sidecar: Sidecar,
}

fn rig(moe: bool, faults: &str) -> Rig {
    let directory = directory();
    let old = model(directory.path(), "old", 1, moe);
    rig_of(directory, old, moe, faults)
}

/// Two engines that serve `old`.
pub(super) fn rig_of(directory: tempfile::TempDir, old: Model, moe: bool, faults: &str) -> Rig {
    let new = model(directory.path(), "new", 2, moe);
    let mut frontend = frontend(2, |options| options.moe = moe);
    let sidecar = Setup::spawning(2, &old).faults(faults).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    Rig { directory, old, new, frontend, sidecar }
}

impl Rig {
    pub(super) fn update(&self, path: &Path, more: &[&str]) -> Said {
        let path = path.display().to_string();
        let mut args = vec!["update", "--json", "--path", &path];
        args.extend(more);
        self.sidecar.command(&args)
    }

    #[track_caller]
    pub(super) fn assert_serves(&mut self, model: &str, name: &str) {
        let expected = if model == "old" { self.old.tokens(4) } else { self.new.tokens(4) };
        for done in complete_all(&mut self.frontend, name, 6, 4) {
            assert_eq!(done.tokens, expected, "{name} on rank {}", done.rank);
            assert_eq!(done.finish, Some(1));
        }
    }
}

#[test]
fn an_update_reaches_all_ranks_and_stamps_the_version() {
    for moe in [false, true] {
        let mut rig = rig(moe, "");
        rig.assert_serves("old", "before");
        let said = rig.update(&rig.new.path.clone(), &["--version", "v2"]);
        assert_eq!(said.code, 0, "{}", said.text());
        assert_eq!(said.json()["status"], "committed");
        rig.assert_serves("new", "after");
        let status = rig.sidecar.await_admitted();
        assert_eq!(status["weights"]["version"], "v2");
        assert_eq!(weight_versions(&status), ["v2", "v2"]);
        let request = NewRequest::new("stamped", 2);
        let done = rig.frontend.server().complete(&request, SOON).unwrap();
        assert_eq!(done.versions, BTreeSet::from(["v2".to_owned()]));
    }
}

#[test]
fn labels_are_short_printable_and_not_that_of_a_fresh_engine() {
    let rig = rig(false, "");
    let wrong = [
        ("default", "what vLLM says of the weights"),
        ("", "1 to 128"),
        ("v\n2", "1 to 128"),
        (&"v".repeat(129), "1 to 128"),
    ];
    for (label, says) in wrong {
        let said = rig.update(&rig.new.path, &["--version", label]);
        assert_eq!(said.code, 2, "{label}: {}", said.text());
        assert!(said.stderr.contains(says), "{label}: {}", said.text());
    }
    let status = rig.sidecar.await_admitted();
    assert_eq!(status["weights"]["version"], "default");
    let longest = "ü".repeat(128);
    let said = rig.update(&rig.new.path, &["--version", &longest]);
    assert_eq!(said.code, 0, "{}", said.text());
    assert_eq!(weight_versions(&rig.sidecar.await_admitted()), [longest.as_str(); 2]);

    // Made of the directory's name, which may be longer.
    let long = model(rig.directory.path(), &"m".repeat(200), 3, false);
    let said = rig.update(&long.path, &["--id", "0123456789"]);
    assert_eq!(said.code, 0, "{}", said.text());
    let made = format!("{}@01234567", "m".repeat(119));
    assert_eq!(weight_versions(&rig.sidecar.await_admitted()), [made.as_str(); 2]);
}

#[test]
fn an_update_under_load_mixes_no_versions_and_loses_no_request() {
    for (moe, mode) in [(false, "wait"), (true, "wait"), (false, "abort")] {
        let mut rig = rig(moe, "");
        let mut number = 0;
        let mut send = |rig: &mut Rig| {
            let request = NewRequest::new(format!("load-{number}"), 25);
            rig.frontend.server().add(&request).unwrap();
            number += 1;
        };
        for _ in 0..8 {
            send(&mut rig);
        }
        let mut update = rig.sidecar.begin_update(&rig.new.path, &["--version", "v2", "--mode", mode]);
        let mut after = 0;
        while after < 16 {
            rig.frontend.server().pump_for(std::time::Duration::from_millis(3)).unwrap();
            let open =
                rig.frontend.server().requests().values().filter(|request| request.finish.is_none()).count();
            if open < 8 {
                send(&mut rig);
                after += u32::from(update.ended().is_some());
            }
        }
        let said = update.wait();
        assert_eq!(said.code, 0, "{mode}: {}", said.text());
        for at in 0..number {
            let id = format!("load-{at}");
            let done = rig.frontend.server().await_request(&id, SOON).unwrap();
            assert!(done.versions.len() <= 1, "{id} mixes {:?}", done.versions);
            let tokens = done.tokens.len();
            let count = u32::try_from(tokens).unwrap();
            let expected =
                if done.versions.contains("v2") { rig.new.tokens(count) } else { rig.old.tokens(count) };
            assert_eq!(done.tokens, expected, "{id} {:?}", done.versions);
            match done.finish {
                Some(1) => assert_eq!(tokens, 25, "{id}"),
                Some(2) => assert_eq!(mode, "abort", "{id} aborted"),
                other => panic!("{id}: {other:?}"),
            }
        }
        rig.assert_serves("new", "after");
    }
}

#[test]
fn a_bad_directory_touches_no_engine() {
    let mut rig = rig(false, "");
    let make = |name: &str| model(rig.directory.path(), name, 3, false).path;
    let missing_tensor = make("missing-tensor");
    weights::write_checkpoint(
        &missing_tensor.join("model.safetensors"),
        &[("lm_head.weight", &[320, 8], 3), ("model.embed_tokens.weight", &[320, 8], 3)],
    )
    .unwrap();
    let wrong_shape = make("wrong-shape");
    weights::write_checkpoint(
        &wrong_shape.join("model.safetensors"),
        &[
            ("lm_head.weight", &[320, 9], 3),
            ("model.embed_tokens.weight", &[320, 8], 3),
            ("model.norm.weight", &[8], 3),
        ],
    )
    .unwrap();
    let truncated = make("truncated");
    let file = truncated.join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 100]).unwrap();
    let absent = rig.directory.path().join("absent");
    let empty = rig.directory.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    for (path, word) in [
        (&missing_tensor, "model.norm.weight"),
        (&wrong_shape, "lm_head.weight"),
        (&truncated, "model.safetensors"),
        (&absent, "absent"),
        (&empty, "empty"),
    ] {
        let said = rig.update(path, &["--version", "bad"]);
        assert_eq!(said.code, 10, "{}: {}", path.display(), said.text());
        assert!(said.text().contains(word), "{word}: {}", said.text());
    }
    let status = rig.sidecar.await_admitted();
    assert_eq!(weight_versions(&status).len(), 2);
    assert!(!weight_versions(&status).contains(&"bad".to_owned()));
    rig.assert_serves("old", "still");
}

#[test]
fn a_load_that_fails_on_one_rank_brings_all_back_to_the_previous_weights() {
    for moe in [false, true] {
        let mut rig = rig(moe, "1@load-fails:restored-meta,1@load-times:1");
        let said = rig.update(&rig.new.path.clone(), &["--version", "v2"]);
        assert_eq!(said.code, 11, "{}", said.text());
        let report = said.json();
        assert_eq!(report["status"], "rolled_back");
        assert!(report["reason"].as_str().unwrap().contains("rank 1"), "{report}");
        let status = rig.sidecar.await_admitted();
        assert!(!weight_versions(&status).contains(&"v2".to_owned()));
        rig.assert_serves("old", "after the rollback");
        // And the same directory can be loaded now.
        let said = rig.update(&rig.new.path.clone(), &["--version", "v2"]);
        assert_eq!(said.code, 0, "{}", said.text());
        rig.assert_serves("new", "after the second try");
    }
}

#[test]
fn a_rollback_loads_the_files_that_vllm_served() {
    let directory = directory();
    let mut old = model(directory.path(), "old", 1, false);
    // Mistral's form of the weights beside the one of Hugging Face: vLLM loads it, and no other file.
    let other = model(directory.path(), "other", 3, false);
    std::fs::copy(other.path.join("model.safetensors"), old.path.join("consolidated.safetensors")).unwrap();
    old.digest = other.digest;
    let new = model(directory.path(), "new", 2, false);
    let mut frontend = frontend(2, |_| {});
    let sidecar = Setup::spawning(2, &old).faults("1@load-fails:restored-meta,1@load-times:1");
    let sidecar = sidecar.frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    assert_eq!(sidecar.await_admitted()["weights"]["updates"], "possible");
    let mut rig = Rig { directory, old, new, frontend, sidecar };
    rig.assert_serves("old", "at the start");
    let said = rig.update(&rig.new.path.clone(), &["--version", "v2"]);
    assert_eq!(said.code, 11, "{}", said.text());
    rig.assert_serves("old", "after the rollback");
    let said = rig.update(&rig.new.path.clone(), &["--version", "v2"]);
    assert_eq!(said.code, 0, "{}", said.text());
    rig.assert_serves("new", "after the update");
}

#[test]
fn a_rank_that_cannot_be_brought_back_is_fenced_and_said_so() {
    let mut rig = rig(false, "1@load-fails:mixed");
    let said = rig.update(&rig.new.path.clone(), &["--version", "v2"]);
    assert_eq!(said.code, 12, "{}", said.text());
    let report = said.json();
    assert_eq!(report["status"], "degraded");
    assert_eq!(report["fenced"], serde_json::json!([1]));
    // Rank 0 serves the old weights; nothing of rank 1 is ever served torn.
    let done = rig.frontend.server().complete(&NewRequest::new("on 0", 4).to(0), SOON).unwrap();
    assert_eq!(done.tokens, rig.old.tokens(4));
}

#[test]
fn a_digest_that_differs_on_one_rank_is_not_committed() {
    let mut rig = rig(false, "0@load-wrong-digest");
    let said = rig.update(&rig.new.path.clone(), &["--version", "v2"]);
    // The weights before are reported with a wrong digest, too: it cannot be brought back.
    assert_eq!(said.code, 12, "{}", said.text());
    assert_eq!(said.json()["fenced"], serde_json::json!([0]), "{}", said.text());
    assert!(said.text().contains("rank 0"), "{}", said.text());
    let status = rig.sidecar.status().unwrap();
    assert!(!weight_versions(&status).contains(&"v2".to_owned()));
    let done = rig.frontend.server().complete(&NewRequest::new("on 1", 4).to(1), SOON).unwrap();
    assert_eq!(done.tokens, rig.old.tokens(4));
}

#[test]
fn an_engine_that_dies_while_it_loads_ends_with_one_version_everywhere() {
    let mut rig = rig(false, "");
    rig.sidecar.set_faults(1, "load-hangs");
    let mut update = rig.sidecar.begin_update(&rig.new.path, &["--version", "v2"]);
    rig.sidecar.await_update("loading");
    rig.sidecar.set_faults(1, "die:now");
    update.wait();
    rig.sidecar.set_faults(1, "");
    let status = rig.sidecar.await_status("both admitted, one version", |status| {
        let versions: BTreeSet<String> = weight_versions(status).into_iter().collect();
        states(status) == ["admitted", "admitted"] && versions.len() == 1
    });
    let which = if status["weights"]["version"] == "v2" { "new" } else { "old" };
    rig.assert_serves(which, "after");
}

#[test]
fn a_restarted_engine_holds_the_committed_weights_before_it_serves() {
    let mut rig = rig(false, "");
    let said = rig.update(&rig.new.path.clone(), &["--version", "v2"]);
    assert_eq!(said.code, 0, "{}", said.text());
    // It comes up with the command line's checkpoint, which is the old one.
    rig.sidecar.set_faults(0, "die:now");
    rig.sidecar.await_status("rank 0 down", |status| states(status)[0] != "admitted");
    rig.sidecar.set_faults(0, "");
    let status = rig.sidecar.await_admitted();
    assert_eq!(weight_versions(&status), ["v2", "v2"]);
    let done = rig.frontend.server().complete(&NewRequest::new("on 0", 4).to(0), SOON).unwrap();
    assert_eq!(done.tokens, rig.new.tokens(4));
    rig.assert_serves("new", "after");
}

#[test]
fn requests_that_run_too_long_are_aborted_at_the_pause_deadline() {
    let mut rig = rig(false, "");
    for at in 0..2 {
        let request = NewRequest::new(format!("long-{at}"), 1_000_000).to(at);
        rig.frontend.server().add(&request).unwrap();
    }
    rig.frontend
        .server()
        .until("tokens of both", SOON, |server| {
            server.requests().values().all(|request| !request.tokens.is_empty())
        })
        .unwrap();
    let path = rig.new.path.clone();
    let said = rig.update(&path, &["--version", "v2", "--pause-deadline", "300ms"]);
    assert_eq!(said.code, 0, "{}", said.text());
    for at in 0..2 {
        let done = rig.frontend.server().await_request(&format!("long-{at}"), SOON).unwrap();
        assert_eq!(done.finish, Some(2));
        assert!(!done.versions.contains("v2"), "{:?}", done.versions);
    }
    rig.assert_serves("new", "after");
}

#[test]
fn a_sidecar_that_is_started_again_restores_the_committed_weights() {
    let mut rig = rig(false, "");
    let said = rig.update(&rig.new.path.clone(), &["--version", "v2"]);
    assert_eq!(said.code, 0, "{}", said.text());
    rig.sidecar.signal(nix::sys::signal::Signal::SIGKILL);
    rig.sidecar.await_end();
    // Its frontend is told that its engines are dead, or sees it; it is started again, too.
    let address = rig.frontend.address().to_owned();
    rig.frontend = frontend(2, |_| {});
    drop(address);
    rig.sidecar.start_again();
    rig.sidecar.await_admitted();
    let host_port = rig.frontend.host_port().to_owned();
    let said = rig.sidecar.command(&["frontend", "add", &host_port]);
    assert_eq!(said.code, 0, "{}", said.text());
    rig.frontend.startup(SOON).unwrap();
    let status = rig.sidecar.await_admitted();
    assert_eq!(status["weights"]["version"], "v2");
    rig.assert_serves("new", "after the restart");
}

#[test]
fn committed_weights_outlive_a_planned_stop_until_they_are_to_be_forgotten() {
    let mut rig = rig(false, "");
    let said = rig.update(&rig.new.path.clone(), &["--version", "v2"]);
    assert_eq!(said.code, 0, "{}", said.text());
    for (args, version, weights) in
        [(&[][..], "v2", "new"), (&["--forget-committed"][..], "default", "old"), (&[][..], "default", "old")]
    {
        assert!(exited_with(rig.sidecar.stop(), 0));
        rig.frontend = frontend(2, |_| {});
        rig.sidecar.start_again_with(args);
        let status = rig.sidecar.await_admitted();
        assert_eq!(status["weights"]["version"], version, "{args:?}");
        let host_port = rig.frontend.host_port().to_owned();
        let said = rig.sidecar.command(&["frontend", "add", &host_port]);
        assert_eq!(said.code, 0, "{}", said.text());
        rig.frontend.startup(SOON).unwrap();
        rig.assert_serves(weights, "after a planned stop");
    }
}

#[test]
fn a_committed_directory_is_found_again_as_vllm_reads_it() {
    let mut rig = rig(false, "");
    // vLLM takes names of files from an index, and does not mind a tensor that none of them has.
    let index = r#"{"weight_map": {"a": "model.safetensors", "lm_head.weight": "model.safetensors"}}"#;
    std::fs::write(rig.new.path.join("model.safetensors.index.json"), index).unwrap();
    let said = rig.update(&rig.new.path.clone(), &["--version", "v2", "--retain", "disk"]);
    assert_eq!(said.code, 0, "{}", said.text());
    assert!(exited_with(rig.sidecar.stop(), 0));
    rig.frontend = frontend(2, |_| {});
    rig.sidecar.start_again();
    assert_eq!(rig.sidecar.await_admitted()["weights"]["version"], "v2");
}

#[test]
fn a_sidecar_killed_while_it_updates_leaves_one_version_when_it_is_back() {
    let mut rig = rig(false, "");
    rig.sidecar.set_faults(1, "load-hangs");
    let mut update = rig.sidecar.begin_update(&rig.new.path, &["--version", "v2"]);
    rig.sidecar.await_update("loading");
    rig.sidecar.signal(nix::sys::signal::Signal::SIGKILL);
    rig.sidecar.await_end();
    let said = update.wait();
    assert_ne!(said.code, 0, "{}", said.text());
    rig.sidecar.set_faults(1, "");
    rig.frontend = frontend(2, |_| {});
    rig.sidecar.start_again();
    rig.sidecar.await_admitted();
    let host_port = rig.frontend.host_port().to_owned();
    rig.sidecar.command(&["frontend", "add", &host_port]);
    rig.frontend.startup(SOON).unwrap();
    rig.assert_serves("old", "after the restart");
}

#[test]
fn a_second_update_and_a_wrong_precondition_are_refused() {
    let rig = rig(false, "");
    let said = rig.update(&rig.new.path, &["--version", "v2", "--from-version", "v7"]);
    assert_eq!(said.code, 10, "{}", said.text());
    assert!(said.text().contains("v7"), "{}", said.text());

    rig.sidecar.set_faults(1, "load-hangs");
    let mut first = rig.sidecar.begin_update(&rig.new.path, &["--version", "v2", "--id", "first"]);
    rig.sidecar.await_update("loading");
    let second = rig.update(&rig.new.path, &["--version", "v3", "--id", "second"]);
    assert_eq!(second.code, 13, "{}", second.text());
    assert!(second.text().contains("first"), "{}", second.text());
    assert_eq!(first.ended(), None, "the first goes on");
    rig.sidecar.set_faults(1, "die:now");
    first.wait();
    rig.sidecar.set_faults(1, "");
    let status = rig.sidecar.await_admitted();
    assert!(!weight_versions(&status).contains(&"v3".to_owned()), "{status:#}");
}

#[test]
fn keep_goes_on_with_running_requests_and_says_that_they_mix() {
    let mut rig = rig(false, "");
    rig.frontend.server().add(&NewRequest::new("frozen", 400).to(0)).unwrap();
    rig.frontend
        .server()
        .until("first token", SOON, |server| !server.request("frozen").unwrap().tokens.is_empty())
        .unwrap();
    let said = rig.update(&rig.new.path.clone(), &["--version", "v2", "--mode", "keep"]);
    assert_eq!(said.code, 0, "{}", said.text());
    let warnings = said.json()["warnings"].to_string();
    assert!(warnings.contains("both versions"), "{}", said.text());
    let done = rig.frontend.server().await_request("frozen", SOON).unwrap();
    assert_eq!((done.tokens.len(), done.finish), (400, Some(1)));
    assert_eq!(done.versions.len(), 2, "{:?}", done.versions);
    // Old tokens, then new ones, nothing else.
    let (old, new) = (rig.old.tokens(400), rig.new.tokens(400));
    let switch = (0..400).find(|at| done.tokens[*at] != old[*at]).unwrap();
    assert_eq!(done.tokens[switch..], new[switch..]);
}

#[test]
fn a_frontend_that_loads_weights_itself_is_heard_and_the_version_is_unknown_then() {
    let mut rig = rig(false, "");
    let kwargs = rmpv::Value::Map(vec![(
        rmpv::Value::from("weights_path"),
        rmpv::Value::from(rig.new.path.display().to_string()),
    )]);
    let args =
        [rmpv::Value::from("reload_weights"), rmpv::Value::Nil, rmpv::Value::Array(Vec::new()), kwargs];
    rig.frontend.server().call_all("collective_rpc", &args, SOON).unwrap();
    rig.assert_serves("new", "after");
    // Outputs are stamped as before: that label is not asked.
    assert_eq!(weight_versions(&rig.sidecar.await_admitted()), ["unknown"; 2]);
    assert_eq!(rig.sidecar.command(&["version", "--json"]).json()["running"]["weights"], "unknown");
    // The next update cannot roll back to what nobody here knows, and must not pretend to.
    let said = rig.update(&rig.new.path.clone(), &["--version", "v3", "--from-version", "default"]);
    assert_eq!(said.code, 10, "{}", said.text());
    let said = rig.update(&rig.new.path.clone(), &["--version", "v3"]);
    assert_eq!(said.code, 0, "{}", said.text());
    rig.assert_serves("new", "after the update");
}

#[test]
fn a_cache_reset_that_says_no_is_told_with_its_rank() {
    let rig = rig(false, "0@reset-false");
    let said = rig.update(&rig.new.path, &["--version", "v2"]);
    let report = said.json();
    let told = format!("{} {}", report["warnings"], report["reason"]);
    assert!(told.contains("rank 0") && told.contains("cache"), "exit {}: {report}", said.code);
}
