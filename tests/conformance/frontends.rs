//! Frontends: several at once, coming and going, good and bad.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::time::Duration;

use dp_sidecar_testkit::VllmVersion;
use dp_sidecar_testkit::frontend::NewRequest;
use rmpv::Value;

use super::harness::{
    PROMPT, SOON, Setup, complete_all, complete_on_all_ranks, directory, engine, frontend, frontend_state,
    model, until,
};

#[test]
fn a_frontend_gets_its_answers_through_the_sidecar_from_both_ranks() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, false);
    let mut frontend = frontend(2, |_| {});
    let sidecar = Setup::spawning(2, &model).frontend(&frontend).start();
    let engines = frontend.startup(SOON).unwrap();
    assert_eq!(engines.len(), 2);
    for completion in complete_on_all_ranks(&mut frontend, "r", 12, 6) {
        assert_eq!(completion.tokens, model.tokens(6));
        assert_eq!(completion.finish, Some(1));
        assert_eq!(completion.versions.len(), 1);
    }
    sidecar.await_attached(frontend.host_port());
}

#[test]
fn two_frontends_with_two_api_servers_each_get_only_their_own_answers() {
    let sidecar_side = Setup::waiting(2, false);
    let mut a = frontend(2, |options| options.api_servers = 2);
    let mut b = frontend(2, |options| options.api_servers = 2);
    let sidecar = sidecar_side.frontend(&a).frontend(&b).start();
    let engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |_| {})).collect();
    a.startup(SOON).unwrap();
    b.startup(SOON).unwrap();
    for (name, frontend) in [("a", &mut a), ("b", &mut b)] {
        for completion in complete_all(frontend, name, 16, 5) {
            assert_eq!(completion.tokens.len(), 5);
        }
    }
    for frontend in [&a, &b] {
        assert_eq!(frontend.reporter().count("unknown_request"), 0);
    }
    // Four API servers, four slots besides the sidecar's own: on the engines' wire no request of
    // one frontend carries an index of another.
    let slots = |prefix: &str| {
        engines
            .iter()
            .flat_map(|engine| engine.reporter().events())
            .filter(|event| event["event"] == "add")
            .filter(|event| event["id"].as_str().unwrap().starts_with(prefix))
            .map(|event| event["client_index"].as_u64().unwrap())
            .collect::<std::collections::BTreeSet<u64>>()
    };
    let (of_a, of_b) = (slots("a-"), slots("b-"));
    assert_eq!((of_a.len(), of_b.len()), (2, 2), "{of_a:?} {of_b:?}");
    assert!(of_a.is_disjoint(&of_b) && !of_a.contains(&0) && !of_b.contains(&0));
}

#[test]
fn versions_on_both_sides_are_served_with_their_own_layouts() {
    for version in
        [VllmVersion(0, 19, 1), VllmVersion(0, 23, 0), VllmVersion(0, 28, 0), VllmVersion(0, 33, 0)]
    {
        let mut frontend = frontend(2, |options| options.version = version);
        let sidecar = Setup::waiting(2, false).frontend(&frontend).start();
        let _engines: Vec<_> =
            (0..2).map(|rank| engine(&sidecar, rank, |options| options.version = version)).collect();
        frontend.startup(SOON).unwrap();
        for completion in complete_all(&mut frontend, "r", 4, 3) {
            assert_eq!(completion.tokens.len(), 3, "{version}");
        }
    }
}

#[test]
fn a_frontend_may_be_there_before_or_after_the_engines_or_be_added_later() {
    let mut before = frontend(1, |_| {});
    let sidecar = Setup::waiting(1, false).frontend(&before).start();
    sidecar.await_status("answers", |_| true);
    let _engine = engine(&sidecar, 0, |_| {});
    before.startup(SOON).unwrap();
    let mut after = frontend(1, |_| {});
    let said = sidecar.command(&["frontend", "add", after.host_port()]);
    assert_eq!(said.code, 0, "{}", said.text());
    after.startup(SOON).unwrap();
    for frontend in [&mut before, &mut after] {
        assert_eq!(complete_all(frontend, "r", 1, 3)[0].tokens.len(), 3);
    }
    let said = sidecar.command(&["frontend", "remove", after.host_port()]);
    assert_eq!(said.code, 0, "{}", said.text());
    sidecar.await_status("one frontend left", |status| status["frontends"].as_array().unwrap().len() == 1);
    assert_eq!(complete_all(&mut before, "s", 1, 3)[0].tokens.len(), 3);
}

#[test]
fn a_frontend_with_more_api_servers_than_slots_is_refused_when_it_is_added() {
    let large = frontend(1, |options| options.api_servers = 9);
    let sidecar = Setup::waiting(1, false).start();
    sidecar.await_status("answers", |_| true);
    let _engine = engine(&sidecar, 0, |_| {});
    sidecar.await_admitted();
    let address = large.host_port().to_owned();
    let starting = std::thread::spawn(move || {
        let mut large = large;
        // It gets HELLO, and then nothing.
        drop(large.startup(std::time::Duration::from_secs(5)));
        large
    });
    let said = sidecar.command(&["frontend", "add", &address]);
    assert_eq!(said.code, 15, "{}", said.text());
    for part in ["9 API servers", "--api-server-count 8", "--frontend-slots 9"] {
        assert!(said.stderr.contains(part), "{part}: {}", said.text());
    }
    let status = sidecar.await_status("answers", |_| true);
    assert_eq!(status["frontends"].as_array().unwrap().len(), 0, "{status:#}");
    drop(starting.join().unwrap());
}

#[test]
fn a_frontend_killed_under_load_costs_only_its_own_requests_and_comes_back() {
    let mut victim = frontend(2, |_| {});
    let mut other = frontend(2, |_| {});
    let sidecar = Setup::waiting(2, false).frontend(&victim).frontend(&other).start();
    let engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |_| {})).collect();
    victim.startup(SOON).unwrap();
    other.startup(SOON).unwrap();
    for at in 0..6 {
        victim.server().add(&NewRequest::new(format!("victim-{at}"), 1_000_000)).unwrap();
        other.server().add(&NewRequest::new(format!("other-{at}"), 400)).unwrap();
    }
    victim
        .server()
        .until("tokens of all", SOON, |server| {
            server.requests().values().all(|request| !request.tokens.is_empty())
        })
        .unwrap();
    let address = victim.address().to_owned();
    let host_port = victim.host_port().to_owned();
    drop(victim);
    // Its requests are aborted on the engines ...
    until("abort of the victim's requests", SOON, || {
        let aborted: u64 = engines
            .iter()
            .flat_map(|engine| engine.reporter().events())
            .filter(|event| event["event"] == "abort")
            .map(|event| event["found"].as_u64().unwrap())
            .sum();
        (aborted == 6).then_some(())
    });
    // ... the other's go on to their end ...
    for at in 0..6 {
        let done = other.server().await_request(&format!("other-{at}"), SOON).unwrap();
        assert_eq!((done.tokens.len(), done.finish), (400, Some(1)));
    }
    // ... and a new frontend at the same address is attached and served, by the same engines.
    let mut again = frontend(2, |options| options.address = address);
    again.startup(SOON).unwrap();
    assert_eq!(complete_all(&mut again, "again", 4, 5).len(), 4);
    sidecar.await_attached(&host_port);
    assert!(engines.iter().all(|engine| engine.reporter().count("hello") == 1));
}

#[test]
fn a_frontend_that_stops_reading_slows_nobody() {
    let mut deaf = frontend(1, |_| {});
    let mut other = frontend(1, |_| {});
    let sidecar = Setup::waiting(1, false).frontend(&deaf).frontend(&other).start();
    let _engine = engine(&sidecar, 0, |options| {
        options.step = Duration::from_millis(1);
        // 16 tokens a step make the messages to the deaf one pile up fast.
        options.tokens_per_step = 16;
    });
    deaf.startup(SOON).unwrap();
    other.startup(SOON).unwrap();
    for at in 0..32 {
        deaf.server().add(&NewRequest::new(format!("deaf-{at}"), 10_000_000)).unwrap();
    }
    // From here on nobody reads the deaf one's output socket.
    let mut slowest = Duration::ZERO;
    for round in 0..60 {
        let start = std::time::Instant::now();
        let done = other.server().complete(&NewRequest::new(format!("other-{round}"), 64), SOON).unwrap();
        assert_eq!(done.tokens.len(), 64);
        slowest = slowest.max(start.elapsed());
    }
    assert!(slowest < Duration::from_secs(3), "a round trip took {slowest:?}");
    assert!(sidecar.status().is_some());
}

#[test]
fn requests_and_waves_of_a_lockstep_group_work_through_two_frontends() {
    let directory = directory();
    let model = model(directory.path(), "m", 1, true);
    let mut a = frontend(2, |options| options.moe = true);
    let mut b = frontend(2, |options| options.moe = true);
    let sidecar = Setup::spawning(2, &model).frontend(&a).frontend(&b).start();
    a.startup(SOON).unwrap();
    b.startup(SOON).unwrap();
    for round in 0..5 {
        for (name, frontend) in [("a", &mut a), ("b", &mut b)] {
            let done = complete_all(frontend, &format!("{name}{round}"), 3, 7);
            assert!(done.iter().all(|done| done.tokens == model.tokens(7)));
        }
        // Let the wave end, so that the next round starts one.
        for frontend in [&mut a, &mut b] {
            let before = u64::from(round > 0);
            frontend
                .server()
                .until("end of the wave", SOON, |server| server.wave().0 > before && !server.wave().1)
                .unwrap();
        }
    }
    let status = sidecar.await_status("idle", |status| status["coordinator"]["running"] == false);
    assert!(status["coordinator"]["wave"].as_u64().unwrap() >= 5);
    for frontend in [&a, &b] {
        let state = frontend.coordinator.as_ref().unwrap().state();
        assert_eq!(state.died, None);
        assert_eq!(state.subscriptions, 2);
    }
}

#[test]
fn what_only_client_0_gets_reaches_every_frontend() {
    let mut a = frontend(1, |_| {});
    let mut b = frontend(1, |_| {});
    let sidecar = Setup::waiting(1, false).frontend(&a).frontend(&b).start();
    let _engine = engine(&sidecar, 0, |_| {});
    a.startup(SOON).unwrap();
    b.startup(SOON).unwrap();
    // Only `a` sends something; the stats of the idle engine must reach `b` too, or its metrics
    // would show for ever what it saw last.
    complete_all(&mut a, "r", 2, 4);
    for frontend in [&mut a, &mut b] {
        frontend.server().until("idle stats", SOON, |server| server.stats_messages()[0] > 0).unwrap();
    }
}

#[test]
fn load_reaches_the_frontends_coordinators() {
    let mut frontend = frontend(2, |_| {});
    let sidecar = Setup::waiting(2, false).frontend(&frontend).start();
    let _engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |_| {})).collect();
    frontend.startup(SOON).unwrap();
    for at in 0..3 {
        frontend.server().add(&NewRequest::new(format!("r{at}"), 1_000_000).to(1)).unwrap();
    }
    frontend.server().until("load of rank 1", SOON, |server| server.counts()[1] == [0, 3]).unwrap();
    assert_eq!(frontend.server().counts()[0], [0, 0]);
}

#[test]
fn a_client_abort_reaches_the_engine() {
    let mut frontend = frontend(1, |_| {});
    let sidecar = Setup::waiting(1, false).frontend(&frontend).start();
    let engine = engine(&sidecar, 0, |_| {});
    frontend.startup(SOON).unwrap();
    let server = frontend.server();
    server.add(&NewRequest::new("long", 1_000_000)).unwrap();
    server.until("first token", SOON, |server| !server.request("long").unwrap().tokens.is_empty()).unwrap();
    server.abort(&["long"]).unwrap();
    until("abort on the engine", SOON, || (engine.reporter().count("abort") == 1).then_some(()));
    sidecar.await_status("nothing in flight", |status| status["engines"][0]["in_flight"] == 0);
}

#[test]
fn harmless_utility_calls_pass_through_and_unknown_methods_fail_like_in_vllm() {
    let mut frontend = frontend(2, |_| {});
    let sidecar = Setup::waiting(2, false).frontend(&frontend).start();
    let _engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |_| {})).collect();
    frontend.startup(SOON).unwrap();
    let server = frontend.server();
    let tasks = server.call_all("get_supported_tasks", &[], SOON).unwrap();
    assert_eq!(tasks, vec![Value::Array(vec![Value::from("generate")]); 2]);
    let failed = server.call(1, "no_such_method", vec![], SOON).unwrap_err();
    assert!(failed.to_string().contains("no_such_method"), "{failed}");
    assert_eq!(PROMPT.len(), 3);
}

#[test]
fn a_frontend_of_another_dp_size_is_refused_by_name_and_the_others_go_on() {
    let mut wrong = frontend(3, |options| options.moe = true);
    let mut right = frontend(2, |options| options.moe = true);
    let sidecar = Setup::waiting(2, true).frontend(&wrong).frontend(&right).start();
    let _engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |options| options.moe = true)).collect();
    assert!(wrong.startup(Duration::from_millis(1500)).is_err());
    right.startup(SOON).unwrap();
    let status = sidecar.await_status("the wrong one refused", |status| {
        frontend_state(status, wrong.host_port()).as_deref() != Some("attached")
    });
    let detail = status["frontends"]
        .as_array()
        .unwrap()
        .iter()
        .find(|frontend| frontend["attachment"]["address"] == wrong.host_port())
        .and_then(|frontend| frontend["attachment"]["detail"].as_str().map(str::to_owned));
    let detail = detail.unwrap_or_default();
    assert!(detail.contains('3') && detail.contains('2'), "detail: {detail}");
    assert_eq!(complete_all(&mut right, "r", 2, 3).len(), 2);
}

#[test]
fn a_frontend_that_names_sockets_of_another_host_is_refused_and_nobody_connects_there() {
    // Loopback, but not the address of the handshake.
    let elsewhere = TcpListener::bind("127.0.0.2:0").unwrap();
    elsewhere.set_nonblocking(true).unwrap();
    let named = format!("tcp://{}", elsewhere.local_addr().unwrap());
    let mut wrong = frontend(2, |options| options.named_inputs = Some(vec![named.clone()]));
    let mut right = frontend(2, |_| {});
    let sidecar = Setup::waiting(2, false).frontend(&wrong).frontend(&right).start();
    let _engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |_| {})).collect();
    right.startup(SOON).unwrap();
    assert!(wrong.startup(Duration::from_millis(1500)).is_err());
    let status = sidecar.await_status("the wrong one refused", |status| {
        frontend_state(status, wrong.host_port()).as_deref() == Some("refused")
    });
    let shown = status["frontends"].to_string();
    assert!(shown.contains(&named) && shown.contains("--data-parallel-address"), "{shown}");
    assert_eq!(elsewhere.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(complete_all(&mut right, "r", 2, 3).len(), 2);
}

#[test]
fn a_frontend_with_other_parallel_flags_ends_alone() {
    let mut wrong = frontend(2, |options| {
        options.moe = true;
        options.parallel_config_hash = "flags-of-somebody-else".to_owned();
    });
    let mut right = frontend(2, |options| options.moe = true);
    let sidecar = Setup::waiting(2, true).frontend(&wrong).frontend(&right).start();
    let engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |options| options.moe = true)).collect();
    let error = wrong.startup(SOON).unwrap_err().to_string();
    // vLLM's frontend compares the hashes itself, says so and ends.
    assert!(error.contains("flags-of-somebody-else"), "{error}");
    let address = wrong.host_port().to_owned();
    drop(wrong);
    right.startup(SOON).unwrap();
    assert_eq!(complete_all(&mut right, "r", 2, 3).len(), 2);
    sidecar.await_log(&[&address]);
    assert!(engines.iter().all(|engine| !engine.ended()));
}

#[test]
fn many_engines_and_frontends_are_served() {
    const ENGINES: u16 = 48;
    let mut frontends: Vec<_> =
        (0..2).map(|_| frontend(ENGINES, |options| options.api_servers = 2)).collect();
    // All engines are in this process, which may not have many files.
    let mut setup = Setup::waiting(ENGINES, false).args(&["--frontend-slots", "8"]);
    for frontend in &frontends {
        setup = setup.frontend(frontend);
    }
    let sidecar = setup.start();
    let _engines: Vec<_> = (0..ENGINES).map(|rank| engine(&sidecar, rank, |_| {})).collect();
    for frontend in &mut frontends {
        frontend.startup(SOON).unwrap();
    }
    for (number, frontend) in frontends.iter_mut().enumerate() {
        let done = complete_on_all_ranks(frontend, &format!("f{number}"), 4 * u32::from(ENGINES), 3);
        assert!(done.iter().all(|done| done.tokens.len() == 3));
    }
}

#[test]
fn an_engine_that_stops_reading_costs_the_other_rank_nothing() {
    let mut frontend = frontend(2, |_| {});
    let sidecar = Setup::waiting(2, false).frontend(&frontend).start();
    let engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |_| {})).collect();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    engines[0].set_faults(dp_sidecar_testkit::engine::Faults { stop_reading: true, ..Default::default() });
    for at in 0..3000 {
        frontend.server().add(&NewRequest::new(format!("deaf-{at}"), 3).to(0)).unwrap();
    }
    for at in 0..50 {
        let request = NewRequest::new(format!("r{at}"), 3).to(1);
        let done = frontend.server().complete(&request, SOON).unwrap();
        assert_eq!(done.tokens.len(), 3);
    }
    assert!(sidecar.status().is_some());
    // It reads again, and nothing is lost.
    engines[0].set_faults(dp_sidecar_testkit::engine::Faults::default());
    for at in 0..3000 {
        let done = frontend.server().await_request(&format!("deaf-{at}"), SOON).unwrap();
        assert_eq!(done.tokens.len(), 3, "deaf-{at}");
    }
}

#[test]
fn lockstep_groups_of_other_versions_run_pause_and_update() {
    for version in
        [VllmVersion(0, 19, 1), VllmVersion(0, 25, 1), VllmVersion(0, 28, 0), VllmVersion(0, 33, 0)]
    {
        let directory = directory();
        let old = model(directory.path(), "old", 1, true);
        let new = model(directory.path(), "new", 2, true);
        let mut frontend = frontend(2, |options| {
            options.moe = true;
            options.version = version;
        });
        let sidecar = Setup::spawning(2, &old)
            .env("FAKE_VLLM_VERSION", version.to_string())
            .frontend(&frontend)
            .start();
        frontend.startup(SOON).unwrap();
        sidecar.await_admitted();
        for round in 0..3 {
            for done in complete_all(&mut frontend, &format!("r{round}"), 4, 5) {
                assert_eq!(done.tokens, old.tokens(5), "{version}");
            }
        }
        let path = new.path.display().to_string();
        let said = sidecar.command(&["update", "--path", &path, "--version", "v2"]);
        assert_eq!(said.code, 0, "{version}: {}", said.text());
        for done in complete_all(&mut frontend, "after", 4, 5) {
            assert_eq!(done.tokens, new.tokens(5), "{version}");
        }
    }
}

#[test]
fn a_frontend_without_a_free_slot_waits_and_gets_the_one_that_is_left() {
    let mut first = frontend(1, |_| {});
    let mut second = frontend(1, |_| {});
    let sidecar = Setup::waiting(1, false).args(&["--frontend-slots", "1"]).frontend(&first).start();
    let _engine = engine(&sidecar, 0, |_| {});
    first.startup(SOON).unwrap();
    complete_all(&mut first, "first", 2, 3);
    let said = sidecar.command(&["frontend", "add", second.host_port()]);
    assert_eq!(said.code, 0, "{}", said.text());
    assert!(second.startup(Duration::from_millis(700)).is_err());
    drop(first);
    second.startup(SOON).unwrap();
    assert_eq!(complete_all(&mut second, "second", 2, 3).len(), 2);
}
