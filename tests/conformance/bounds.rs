//! What is held while engines take no requests: how much, for how long, and what is said of it.

use std::time::Duration;

use dp_sidecar_testkit::frontend::NewRequest;

use super::harness::{SOON, Setup, directory, frontend, model, until};

/// Sends so many requests while two engines load new weights for that long; each is answered, and by the new weights.
fn nothing_is_lost_during_a_load(requests: u32, load: Duration) {
    let directory = directory();
    let (old, new) = (model(directory.path(), "old", 1, false), model(directory.path(), "new", 2, false));
    let mut frontend = frontend(2, |_| {});
    let sidecar = Setup::spawning(2, &old)
        .env("FAKE_VLLM_LOAD_MS", load.as_millis().to_string())
        .args(&["--hold-timeout", "90s"])
        .frontend(&frontend)
        .start();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    let mut update = sidecar.begin_update(&new.path, &["--id", "u"]);
    sidecar.await_update("load");
    for number in 0..requests {
        frontend.server().add(&NewRequest::new(format!("r{number}"), 2)).unwrap();
    }
    let of_all = |status: &serde_json::Value, name: &str| -> u64 {
        status["engines"].as_array().unwrap().iter().map(|engine| engine[name].as_u64().unwrap()).sum()
    };
    let status = sidecar.await_status("all held", |status| of_all(status, "held") == u64::from(requests));
    assert_eq!(update.ended(), None, "the load is over before all requests were there");
    // Said, and what the memory is bounded by: at most 2 KiB for each of these small ones.
    let bytes = of_all(&status, "held_bytes");
    assert!((512..2048).contains(&(bytes / u64::from(requests))), "{bytes} bytes for {requests} requests");
    let relay = status["sidecar"]["relay_pid"].as_u64().unwrap();
    let text = std::fs::read_to_string(format!("/proc/{relay}/status")).unwrap();
    let peak = text.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak * 1024 < bytes + (128 << 20), "the relay process took {peak} KiB to hold {bytes} bytes");
    let ended = until("end of the update", load + SOON, || update.ended());
    assert_eq!(ended, 0, "{}", update.wait().text());
    frontend
        .server()
        .until("all answers", load + SOON, |server| {
            server.requests().values().all(|request| request.finish.is_some())
        })
        .unwrap();
    for (id, done) in frontend.server().requests() {
        assert_eq!((&done.tokens, done.finish), (&new.tokens(2), Some(1)), "{id}");
    }
    let status = sidecar.await_status("nothing held", |status| of_all(status, "held_bytes") == 0);
    assert_eq!(of_all(&status, "refused"), 0, "{status:#}");
}

#[test]
fn thousands_of_requests_during_a_load_are_held_and_none_is_lost() {
    // More on each rank than it held in earlier versions.
    nothing_is_lost_during_a_load(9_000, Duration::from_secs(6));
}

#[test]
#[ignore = "takes a minute: scripts/test full runs it"]
fn twenty_thousand_requests_during_a_load_of_30_seconds_are_held_and_none_is_lost() {
    nothing_is_lost_during_a_load(20_000, Duration::from_secs(30));
}

#[test]
fn a_request_beyond_a_bound_is_refused_and_status_names_the_flag_and_a_restart_changes_the_bound() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut frontend = frontend(1, |_| {});
    let mut sidecar = Setup::spawning(1, &model)
        .args(&["--keep-engines"])
        .env("SIDECAR_MAX_HELD_BYTES", "1")
        .frontend(&frontend)
        .start();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    assert_eq!(sidecar.command(&["drain"]).code, 0);
    for id in ["fits", "beyond"] {
        frontend.server().add(&NewRequest::new(id, 2)).unwrap();
    }
    let done = frontend.server().await_request("beyond", SOON).unwrap();
    assert!(matches!(done.finish, Some(3)), "{done:?}");
    let status = sidecar.await_status("a refusal", |status| status["engines"][0]["refused"] == 1);
    let why = status["engines"][0]["last_refusal"].as_str().unwrap();
    assert!(why.contains("(--max-held-bytes)"), "{why}");
    let shown = sidecar.command(&["status"]).text();
    assert!(
        shown.contains("1 messages of frontends refused") && shown.contains("--max-held-bytes"),
        "{shown}"
    );
    // The relay process lives on, with the bounds of the sidecar that took it over.
    let life = status["sidecar"]["relay_pid"].clone();
    assert!(sidecar.stop().success());
    sidecar.start_again_with(&["--max-held-bytes", "1MiB"]);
    let done = frontend.server().await_request("fits", SOON).unwrap();
    assert_eq!(done.finish, Some(1), "{done:?}");
    assert_eq!(sidecar.await_admitted()["sidecar"]["relay_pid"], life);
    assert_eq!(sidecar.command(&["drain"]).code, 0);
    for id in ["one", "two"] {
        frontend.server().add(&NewRequest::new(id, 2)).unwrap();
    }
    sidecar.await_status("both held", |status| status["engines"][0]["held"] == 2);
    assert_eq!(sidecar.command(&["resume"]).code, 0);
    for id in ["one", "two"] {
        assert_eq!(frontend.server().await_request(id, SOON).unwrap().finish, Some(1), "{id}");
    }
}
