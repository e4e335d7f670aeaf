//! Frontends over the death of the sidecar: their data path is in another process and goes on.

use dp_sidecar_testkit::frontend::{FrontendError, NewRequest};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::harness::{
    Model, SOON, Setup, Sidecar, complete_all, directory, free_port, frontend, frontend_state, model, until,
};

/// The engines live on for a minute without a sidecar.
fn lasting(size: u16, model: &Model) -> Setup {
    Setup::spawning(size, model).args(&["--orphan-grace", "60s"])
}

fn kill_9(sidecar: &mut Sidecar) {
    sidecar.signal(Signal::SIGKILL);
    sidecar.await_end();
}

/// Pids of the engines, by rank.
fn pids(status: &Value) -> Vec<i64> {
    let engines = status["engines"].as_array().unwrap();
    engines.iter().map(|engine| engine["pid"].as_i64().unwrap()).collect()
}

fn attachment(status: &Value, address: &str) -> Value {
    let all = status["frontends"].as_array().unwrap();
    let one = all.iter().find(|frontend| frontend["attachment"]["address"] == address);
    one.map(|frontend| frontend["attachment"].clone()).unwrap_or_default()
}

/// The relay process of a sidecar.
fn relay(sidecar: &Sidecar) -> Pid {
    let is_relay = |pid: &i32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.split(|byte| *byte == 0).nth(1) == Some(b"relay")
    };
    Pid::from_raw(sidecar.processes().into_iter().find(is_relay).expect("no relay process"))
}

#[test]
fn a_frontend_under_load_does_not_notice_that_the_sidecar_is_killed_and_started_again() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut frontend = frontend(2, |options| options.api_servers = 2);
    let address = frontend.host_port().to_owned();
    let mut sidecar = lasting(2, &model).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    let before = sidecar.await_attached(&address);
    for round in 0..3 {
        let long: Vec<String> = (0..4).map(|at| format!("long-{round}-{at}")).collect();
        for (at, id) in long.iter().enumerate() {
            let request = NewRequest::new(id, 400).to(u16::try_from(at % 2).unwrap());
            frontend.servers[at / 2].add(&request).unwrap();
        }
        frontend
            .server()
            .until("first tokens", SOON, |server| server.request(&long[0]).unwrap().tokens.len() > 3)
            .unwrap();
        kill_9(&mut sidecar);
        // Nobody is there; requests are served all the same.
        for done in complete_all(&mut frontend, &format!("away-{round}"), 4, 5) {
            assert_eq!(done.tokens, model.tokens(5));
        }
        sidecar.start_again();
        sidecar.await_attached(&address);
        let after = sidecar.await_admitted();
        let (was, is) = (attachment(&before, &address), attachment(&after, &address));
        assert_eq!((&is["id"], &is["api_servers"]), (&was["id"], &was["api_servers"]), "{after:#}");
        assert_eq!(pids(&after), pids(&before), "an engine was started again");
        for (at, id) in long.iter().enumerate() {
            let done = frontend.servers[at / 2].await_request(id, SOON).unwrap();
            assert_eq!((done.tokens.len(), done.finish), (400, Some(1)), "{id}");
        }
        for done in complete_all(&mut frontend, &format!("back-{round}"), 4, 5) {
            assert_eq!(done.tokens, model.tokens(5));
        }
    }
    let state = frontend.coordinator.as_ref().unwrap().state();
    assert_eq!(state.died, None);
    // The successor knows it as its own: an end of the frontend is noticed ...
    drop(frontend);
    sidecar.await_status("the frontend is gone", |status| {
        frontend_state(status, &address).as_deref() == Some("waiting")
    });
    sidecar.stop();
    sidecar.await_nothing_left();
}

#[test]
fn a_lockstep_group_goes_on_with_its_wave_and_no_request_is_stranded() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, true);
    let mut frontend = frontend(2, |options| options.moe = true);
    let address = frontend.host_port().to_owned();
    let mut sidecar = lasting(2, &model).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    sidecar.await_attached(&address);
    let mut wave = 0;
    for round in 0..3 {
        complete_all(&mut frontend, &format!("r{round}"), 3, 5);
        frontend
            .server()
            .until("end of the wave", SOON, |server| server.wave().0 > wave && !server.wave().1)
            .unwrap();
        kill_9(&mut sidecar);
        // To an idle group, with nobody there to wake the other engine.
        let asleep = format!("asleep-{round}");
        frontend.server().add(&NewRequest::new(&asleep, 5).to(1)).unwrap();
        sidecar.start_again();
        let done = frontend.server().await_request(&asleep, SOON).unwrap();
        assert_eq!(done.tokens, model.tokens(5));
        sidecar.await_admitted();
        let status = sidecar.await_attached(&address);
        let now = status["coordinator"]["wave"].as_u64().unwrap();
        assert!(now > wave, "the wave went back from {wave} to {now}");
        wave = now;
        // Waves and load reach the frontend's own DP coordinator again.
        frontend
            .server()
            .until("the wave", SOON, |server| server.wave().0 >= wave && !server.wave().1)
            .unwrap();
    }
    let loads = frontend.server().stats_messages().to_vec();
    complete_all(&mut frontend, "last", 8, 20);
    frontend.server().until("loads", SOON, |server| server.stats_messages() != loads).unwrap();
    let state = frontend.coordinator.as_ref().unwrap().state();
    assert_eq!(state.died, None);
}

#[test]
fn a_frontend_whose_data_path_died_with_the_sidecar_is_told_and_its_successor_is_attached() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut first = frontend(2, |_| {});
    let (zmq, address) = (first.address().to_owned(), first.host_port().to_owned());
    let mut sidecar = lasting(2, &model).frontend(&first).start();
    first.startup(SOON).unwrap();
    let before = sidecar.await_attached(&address);
    let relay = relay(&sidecar);
    kill_9(&mut sidecar);
    kill(relay, Signal::SIGKILL).unwrap();
    sidecar.start_again();
    let told = first.server().until("the end", SOON, |_| false);
    assert!(matches!(told, Err(FrontendError::EngineDead { .. })), "{told:?}");
    drop(first);
    let mut second = frontend(2, |options| options.address = zmq);
    second.startup(SOON).unwrap();
    sidecar.await_attached(&address);
    let after = sidecar.await_admitted();
    let id = |status: &Value| attachment(status, &address)["id"].as_u64().unwrap();
    assert!(id(&after) > id(&before), "a number was given twice");
    for done in complete_all(&mut second, "r", 4, 5) {
        assert_eq!(done.tokens, model.tokens(5));
    }
}

#[test]
fn a_frontend_added_at_runtime_is_wanted_after_a_crash_and_not_after_a_stop() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut added = frontend(1, |_| {});
    let waiting = format!("127.0.0.1:{}", free_port());
    let address = added.host_port().to_owned();
    let mut sidecar = lasting(1, &model).start();
    sidecar.await_admitted();
    for address in [&address, &waiting] {
        let said = sidecar.command(&["frontend", "add", address]);
        assert_eq!(said.code, 0, "{}", said.text());
    }
    added.startup(SOON).unwrap();
    sidecar.await_attached(&address);
    kill_9(&mut sidecar);
    sidecar.start_again();
    let status = sidecar.await_attached(&address);
    assert_eq!(frontend_state(&status, &waiting).as_deref(), Some("waiting"));
    assert_eq!(complete_all(&mut added, "r", 2, 3).len(), 2);
    let again = sidecar.command(&["frontend", "add", &address]);
    assert!(again.text().contains("registered already"), "{}", again.text());
    sidecar.stop();
    let told = added.server().until("the end", SOON, |_| false);
    assert!(matches!(told, Err(FrontendError::EngineDead { .. })), "{told:?}");
    sidecar.start_again();
    let status = sidecar.await_admitted();
    assert_eq!(status["frontends"].as_array().map(Vec::len), Some(0), "{status:#}");
}

#[test]
fn a_pause_of_a_frontend_outlives_a_killed_sidecar() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, true);
    let mut frontend = frontend(2, |options| options.moe = true);
    let mut sidecar = lasting(2, &model).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    let mode = [rmpv::Value::from("abort")];
    frontend.server().call_all("pause_scheduler", &mode, SOON).unwrap();
    let paused = |status: &Value| status["controller"]["paused"] == true;
    sidecar.await_status("paused", paused);
    let ledger = sidecar.state_dir().join("ledger.json");
    until("the pause is on record", SOON, || {
        std::fs::read_to_string(&ledger).ok().filter(|text| text.contains("frontend"))
    });
    for _ in 0..2 {
        kill_9(&mut sidecar);
        sidecar.start_again();
        sidecar.await_admitted();
        sidecar.await_status("still paused", paused);
        let asked = frontend.server().call_all("is_scheduler_paused", &[], SOON).unwrap();
        assert_eq!(asked, vec![rmpv::Value::from(true); 2]);
    }
    frontend.server().call_all("resume_scheduler", &[], SOON).unwrap();
    sidecar.await_status("resumed", |status| !paused(status));
    for done in complete_all(&mut frontend, "after", 4, 5) {
        assert_eq!(done.tokens, model.tokens(5));
    }
    sidecar.stop();
    sidecar.await_nothing_left();
}

#[test]
fn a_frontend_added_at_runtime_may_be_on_the_command_line_of_the_next_sidecar() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut added = frontend(1, |_| {});
    let address = added.host_port().to_owned();
    let mut sidecar = lasting(1, &model).start();
    sidecar.await_admitted();
    assert_eq!(sidecar.command(&["frontend", "add", &address]).code, 0);
    added.startup(SOON).unwrap();
    sidecar.await_attached(&address);
    kill_9(&mut sidecar);
    sidecar.start_again_with(&["--frontend", &address]);
    sidecar.await_admitted();
    sidecar.await_attached(&address);
    // The same attachment: it was told nothing, and goes on.
    assert_eq!(complete_all(&mut added, "r", 2, 3).len(), 2);
    sidecar.stop();
    sidecar.await_nothing_left();
}

#[test]
fn the_served_frontend_lives_on_with_the_engines() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let port = free_port().to_string();
    let mut sidecar = lasting(2, &model).args(&["--serve", "--port", &port, "--host", "127.0.0.1"]).start();
    let attached = |status: &Value| {
        let all = status["frontends"].as_array().unwrap();
        all.len() == 1 && all[0]["attachment"]["state"] == "attached"
    };
    let before = sidecar.await_status("its frontend attached", attached);
    sidecar.await_admitted();
    let mut processes = sidecar.processes();
    kill_9(&mut sidecar);
    sidecar.start_again();
    let after = sidecar.await_status("its frontend attached", attached);
    sidecar.await_admitted();
    assert_eq!(after["frontends"][0]["attachment"]["id"], before["frontends"][0]["attachment"]["id"]);
    let mut now = sidecar.processes();
    processes.sort_unstable();
    now.sort_unstable();
    assert_eq!(now, processes, "something was started again");
    let answer = until("an answer", SOON, || {
        super::processes::http(&port, r#"{"prompt": [1, 2, 3], "max_tokens": 4}"#)
    });
    let body: Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!(body["choices"][0]["token_ids"], serde_json::json!(model.tokens(4)));
    sidecar.stop();
    sidecar.await_nothing_left();
}
