//! The fakes against each other, without the sidecar: what they say is consistent, and each dies of
//! what kills the real one.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use dp_sidecar_testkit::engine::{EngineEnd, EngineOptions, FakeEngine, Faults, Stage, weights};
use dp_sidecar_testkit::frontend::{FakeFrontend, FrontendError, FrontendOptions, NewRequest};
use dp_sidecar_testkit::{Reporter, VllmVersion};
use rmpv::Value;

const SOON: Duration = Duration::from_secs(10);

struct Rig {
    frontend: FakeFrontend,
    engines: Vec<FakeEngine>,
}

fn bind(options: FrontendOptions) -> FakeFrontend {
    FakeFrontend::bind(options, Reporter::memory()).unwrap()
}

fn engine(frontend: &FakeFrontend, rank: u16, change: impl Fn(&mut EngineOptions)) -> FakeEngine {
    let mut options = EngineOptions {
        rank,
        size: frontend.options().size,
        moe: frontend.options().moe,
        version: frontend.options().version,
        handshake: frontend.address().to_owned(),
        ..EngineOptions::default()
    };
    change(&mut options);
    FakeEngine::spawn(options, Reporter::memory()).unwrap()
}

fn rig(options: FrontendOptions) -> Rig {
    let mut frontend = bind(options);
    let engines = (0..frontend.options().size).map(|rank| engine(&frontend, rank, |_| {})).collect();
    frontend.startup(SOON).unwrap();
    Rig { frontend, engines }
}

fn dense() -> Rig {
    rig(FrontendOptions::default())
}

#[test]
fn dense_engines_of_many_versions_answer_alike() {
    for version in ["0.19.1", "0.20.2", "0.22.1", "0.25.1", "0.28.0", "0.32.0", "0.33.0"] {
        let mut rig = rig(FrontendOptions {
            version: version.parse().unwrap(),
            api_servers: 2,
            ..FrontendOptions::default()
        });
        for (at, server) in rig.frontend.servers.iter_mut().enumerate() {
            let done = server.complete(&NewRequest::new(format!("r{at}"), 5), SOON).unwrap();
            assert_eq!(done.tokens, weights::tokens("made-up", &[1, 2, 3], 5), "{version}");
            assert_eq!(done.finish, Some(1), "{version}");
            let stamped = rig.engines[0].reporter().count("add") + rig.engines[1].reporter().count("add");
            assert!(stamped > 0, "{version}");
        }
    }
}

#[test]
fn a_lockstep_group_starts_a_wave_for_a_request_and_ends_it() {
    let mut rig = rig(FrontendOptions { moe: true, size: 3, ..FrontendOptions::default() });
    for round in 0..3 {
        let request = NewRequest::new(format!("r{round}"), 8).to(1);
        let done = rig.frontend.server().complete(&request, SOON).unwrap();
        assert_eq!(done.tokens.len(), 8);
        let wave = round + 1;
        rig.frontend
            .server()
            .until("end of the wave", SOON, |server| server.wave() == (wave, false))
            .unwrap();
    }
    pause_and_resume_all(&mut rig);
    resume_of_one_rank_blocks_it(&mut rig);
}

/// Two-phase pause: no rank answers before all were asked.
fn pause_and_resume_all(rig: &mut Rig) {
    let server = rig.frontend.server();
    let first = server.start_call(0, "pause_scheduler", vec![Value::from("wait")]).unwrap();
    server.pump_for(Duration::from_millis(100)).unwrap();
    assert!(server.result(first).is_none(), "rank 0 paused alone");
    let others: Vec<u64> = (1..3)
        .map(|rank| server.start_call(rank, "pause_scheduler", vec![Value::from("wait")]).unwrap())
        .collect();
    for call in std::iter::once(first).chain(others) {
        server.await_call(call, SOON).unwrap();
    }
    // Not answered while paused, and not lost either.
    server.add(&NewRequest::new("held", 4).to(2)).unwrap();
    server.pump_for(Duration::from_millis(100)).unwrap();
    assert_eq!(server.request("held").unwrap().tokens.len(), 0);
    server.call_all("resume_scheduler", &[], SOON).unwrap();
    assert_eq!(server.await_request("held", SOON).unwrap().tokens.len(), 4);
}

fn resume_of_one_rank_blocks_it(rig: &mut Rig) {
    let server = rig.frontend.server();
    server.call_all("pause_scheduler", &[Value::from("abort")], SOON).unwrap();
    let alone = server.start_call(0, "resume_scheduler", vec![]).unwrap();
    let after = server.start_call(0, "is_scheduler_paused", vec![]).unwrap();
    server.pump_for(Duration::from_millis(100)).unwrap();
    assert!(server.result(alone).is_none() && server.result(after).is_none());
    for rank in 1..3 {
        server.start_call(rank, "resume_scheduler", vec![]).unwrap();
    }
    server.await_call(alone, SOON).unwrap();
    assert_eq!(server.await_call(after, SOON).unwrap(), Value::from(false));
}

#[test]
fn hazards_kill_an_engine_as_they_kill_the_real_one() {
    let add_for_client_7 = {
        let mut fields = vec![Value::Nil; 22];
        fields[0] = Value::from("x");
        fields[5] = Value::from(0.0);
        fields[13] = Value::from(0);
        fields[15] = Value::from(false);
        fields[19] = Value::from(false);
        fields[11] = Value::from(7);
        fields[12] = Value::from(0);
        dp_sidecar_testkit::msg::encode(&Value::Array(fields))
    };
    let add_with_nil_for_a_boolean = {
        let mut fields = vec![Value::Nil; 22];
        fields[0] = Value::from("x");
        fields[5] = Value::from(0.0);
        fields[11..14].fill(Value::from(0));
        dp_sidecar_testkit::msg::encode(&Value::Array(fields))
    };
    let input: fn(&EngineEnd) -> bool = |end| matches!(end, EngineEnd::InputThread(_));
    let output: fn(&EngineEnd) -> bool = |end| matches!(end, EngineEnd::OutputThread(_));
    let core: fn(&EngineEnd) -> bool = |end| matches!(end, EngineEnd::Core(_));
    let cases: [(&str, Vec<&[u8]>, _); 9] = [
        ("nil for a boolean", vec![b"\x00", &add_with_nil_for_a_boolean], input),
        ("malformed msgpack", vec![b"\x00", b"\x92\xc0"], input),
        ("unknown type byte", vec![b"\x09", b"\x90"], input),
        ("READY on an input socket", vec![b"READY"], input),
        ("a type byte alone", vec![b"\x00"], input),
        ("a short UTILITY", vec![b"\x03", b"\x92\x00\x01"], input),
        ("a client index out of range", vec![b"\x00", &add_for_client_7], output),
        ("EXECUTOR_FAILED", vec![b"\x04", b"\xc0"], core),
        ("a short ADD", vec![b"\x00", b"\x91\xa1x"], input),
    ];
    for (what, frames, expected) in cases {
        let mut rig = dense();
        rig.frontend.server().send_raw(1, &frames).unwrap();
        let end = rig.engines[1].wait(SOON).unwrap();
        assert!(expected(&end), "{what}: {end}");
    }
}

#[test]
fn a_frontend_dies_of_a_second_hello_and_of_a_stranger() {
    for (faults, expected) in [
        ("hello-twice", "unexpected HELLO"),
        ("rank-on-the-wire:9", "unexpected data parallel rank"),
        ("ready-first", "unexpected READY"),
    ] {
        let mut frontend = bind(FrontendOptions::default());
        let _engine = engine(&frontend, 0, |options| {
            options.faults = Faults::for_rank(faults, 0).unwrap();
        });
        let error = frontend.startup(SOON).unwrap_err().to_string();
        assert!(error.contains(expected), "{faults}: {error}");
    }
}

#[test]
fn a_frontend_refuses_other_parallel_flags() {
    let mut frontend = bind(FrontendOptions { moe: true, ..FrontendOptions::default() });
    let _engines: Vec<FakeEngine> =
        (0..2).map(|rank| engine(&frontend, rank, |options| options.faults.wrong_hash = rank == 1)).collect();
    let error = frontend.startup(SOON).unwrap_err();
    assert!(matches!(error, FrontendError::HashMismatch { rank: 1, .. }), "{error}");
}

#[test]
fn engine_core_dead_reaches_every_api_server() {
    let mut rig = rig(FrontendOptions { api_servers: 2, ..FrontendOptions::default() });
    rig.engines[0].set_faults(Faults { dead: Some(Stage::Now), ..Faults::default() });
    for server in &mut rig.frontend.servers {
        let error = server.pump_for(SOON).unwrap_err();
        assert!(matches!(error, FrontendError::EngineDead { .. }), "{error}");
    }
}

#[test]
fn a_dense_pause_in_wait_mode_answers_after_the_running_request() {
    let mut rig = dense();
    let server = rig.frontend.server();
    server.add(&NewRequest::new("running", 30).to(0)).unwrap();
    server
        .until("first token", SOON, |server| !server.request("running").unwrap().tokens.is_empty())
        .unwrap();
    server.call(0, "pause_scheduler", vec![Value::from("wait")], SOON).unwrap();
    assert_eq!(server.request("running").unwrap().finish, Some(1));
    assert_eq!(server.call(0, "is_scheduler_paused", vec![], SOON).unwrap(), Value::from(true));
    server.call(0, "resume_scheduler", vec![], SOON).unwrap();
    let unknown = server.call(0, "no_such_method", vec![], SOON).unwrap_err();
    assert!(unknown.to_string().contains("has no attribute"), "{unknown}");
}

#[test]
fn an_aborting_pause_ends_requests_with_reason_abort() {
    let mut rig = dense();
    let server = rig.frontend.server();
    server.add(&NewRequest::new("running", 1000).to(1)).unwrap();
    server
        .until("first token", SOON, |server| !server.request("running").unwrap().tokens.is_empty())
        .unwrap();
    server.call(1, "pause_scheduler", vec![Value::from("abort")], SOON).unwrap();
    assert_eq!(server.request("running").unwrap().finish, Some(2));
}

#[test]
fn versions_before_the_weight_label_do_not_stamp_outputs() {
    for (version, stamped) in [(VllmVersion(0, 31, 0), false), (VllmVersion(0, 32, 0), true)] {
        let mut rig = rig(FrontendOptions { version, ..FrontendOptions::default() });
        let server = rig.frontend.server();
        server.call_all("set_weight_version", &[Value::from("v2")], SOON).unwrap();
        let done = server.complete(&NewRequest::new("r", 3), SOON).unwrap();
        assert_eq!(done.versions.contains("v2"), stamped, "{version}");
    }
}

#[test]
fn a_fake_frontend_answers_completions_over_http() {
    use std::io::{Read, Write};
    let mut rig = dense();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let client = std::thread::spawn(move || {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        let body = br#"{"prompt": [1, 2, 3], "max_tokens": 4}"#;
        let head = format!("POST /v1/completions HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let stopped = || client.is_finished();
    dp_sidecar_testkit::frontend::http::serve(&mut rig.frontend, listener, "m", &stopped).unwrap();
    let answer = client.join().unwrap();
    let body: serde_json::Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    let tokens = weights::tokens("made-up", &[1, 2, 3], 4);
    assert_eq!(body["choices"][0]["token_ids"], serde_json::json!(tokens));
    assert_eq!(body["weight_versions"], serde_json::json!(["default"]));
}
