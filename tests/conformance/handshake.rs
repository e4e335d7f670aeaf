//! Engines that somebody else starts: the handshake port, and what bad input on it gets.

use std::io::Write;
use std::net::{TcpListener, TcpStream};

use dp_sidecar_testkit::engine::EngineEnd;
use dp_sidecar_testkit::{VllmVersion, msg, sockets};

use super::harness::{self, SOON, Setup, engine, exited_with, states};

#[test]
fn engines_are_accepted_in_any_order() {
    let sidecar = Setup::waiting(3, false).start();
    let _late: Vec<_> = [2, 0, 1].map(|rank| engine(&sidecar, rank, |_| {})).into_iter().collect();
    let status = sidecar.await_admitted();
    assert_eq!(status["engines"][2]["rank"], 2);
    assert_eq!(status["engines"][2]["vllm_version"], "0.32.0");
}

#[test]
fn a_lockstep_group_that_somebody_else_starts_is_accepted() {
    let sidecar = Setup::waiting(2, true).start();
    let engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |options| options.moe = true)).collect();
    sidecar.await_admitted();
    for engine in &engines {
        assert_eq!(engine.reporter().count("coordinator_ready"), 1);
    }
}

#[test]
fn an_engine_of_a_rank_that_does_not_exist_is_refused_and_the_others_go_on() {
    let sidecar = Setup::waiting(2, false).start();
    let _stranger = engine(&sidecar, 9, |options| options.size = 10);
    sidecar.await_log(&["refused", "rank 9"]);
    let _engines: Vec<_> = (0..2).map(|rank| engine(&sidecar, rank, |_| {})).collect();
    sidecar.await_admitted();
}

#[test]
fn a_second_hello_is_refused_by_name_and_the_others_go_on() {
    let sidecar = Setup::waiting(2, false).start();
    let _first = engine(&sidecar, 1, |options| {
        options.faults.hello_twice = true;
    });
    sidecar.await_log(&["HELLO", "rank 1"]);
    let _other = engine(&sidecar, 0, |_| {});
    sidecar.await_status("rank 0 admitted", |status| states(status)[0] == "admitted");
}

#[test]
fn ready_before_hello_is_refused_by_name() {
    let sidecar = Setup::waiting(2, false).start();
    let _engine = engine(&sidecar, 0, |options| options.faults.ready_first = true);
    sidecar.await_log(&["READY", "rank 0"]);
    let _other = engine(&sidecar, 1, |_| {});
    sidecar.await_status("rank 1 admitted", |status| states(status)[1] == "admitted");
}

#[test]
fn two_engines_with_one_rank_are_told_apart_and_the_first_goes_on() {
    let mut sidecar = Setup::waiting(2, false).start();
    let first = engine(&sidecar, 0, |_| {});
    let _second = engine(&sidecar, 1, |_| {});
    let before = sidecar.await_admitted();
    let _impostor = engine(&sidecar, 0, |_| {});
    sidecar.await_log(&["refused", "HELLO", "rank 0"]);
    let after = sidecar.await_admitted();
    assert_eq!(before["engines"][0]["incarnation"], after["engines"][0]["incarnation"]);
    assert!(!first.ended());
    assert!(!sidecar.has_ended());
}

#[test]
fn differing_parallel_flags_are_named_with_both_hashes() {
    let sidecar = Setup::waiting(2, true).start();
    let _engines: Vec<_> = (0..2)
        .map(|rank| {
            engine(&sidecar, rank, |options| {
                options.moe = true;
                options.faults.wrong_hash = rank == 1;
            })
        })
        .collect();
    // Either may be the second one, which is refused.
    sidecar.await_log(&["parallel_config_hash of rank", "another-parallel-config", "fake-parallel-config"]);
}

#[test]
fn an_unknown_vllm_version_is_refused_unless_allowed() {
    let future = VllmVersion(0, 99, 0);
    let sidecar = Setup::waiting(1, false).start();
    let _engine = engine(&sidecar, 0, |options| options.version = future);
    sidecar.await_log(&["rank 0", "0.99.0", "allow-untested-vllm"]);

    let sidecar = Setup::waiting(1, false).args(&["--allow-untested-vllm"]).start();
    let _engine = engine(&sidecar, 0, |options| options.version = future);
    sidecar.await_admitted();
}

#[test]
fn a_registration_that_is_not_msgpack_is_refused_by_name() {
    let sidecar = Setup::waiting(2, false).start();
    let _engine = engine(&sidecar, 1, |options| {
        options.faults.garbage_registration = true;
    });
    sidecar.await_log(&["rank 1", "registration"]);
    let _other = engine(&sidecar, 0, |_| {});
    sidecar.await_status("rank 0 admitted", |status| states(status)[0] == "admitted");
}

#[test]
fn garbage_on_the_handshake_port_names_the_peer_and_hurts_nobody() {
    let sidecar = Setup::waiting(1, false).start();
    sidecar.await_status("answers", |_| true);
    let address = sidecar.handshake();
    let address = address.trim_start_matches("tcp://");
    let mut huge_frame = Vec::new();
    // A ZMTP 3.0 greeting, then a frame that declares 2^62 bytes.
    huge_frame.extend([0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 0]);
    huge_frame.extend(*b"NULL");
    huge_frame.resize(64, 0);
    huge_frame.push(0x06);
    huge_frame.extend((1_u64 << 62).to_be_bytes());
    let attacks: [&[u8]; 4] = [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", &[0xff; 4096], &huge_frame, b"\xff\x00"];
    let mut open = Vec::new();
    for attack in attacks {
        let mut stream = TcpStream::connect(address).unwrap();
        // It may be closed while it is still writing.
        let _ = stream.write_all(attack);
        open.push(stream);
    }
    sidecar.await_log(&["127.0.0.1"]);
    let _engine = engine(&sidecar, 0, |_| {});
    sidecar.await_admitted();
    assert_eq!(open.len(), 4);
}

#[test]
fn a_message_that_is_no_hello_names_the_sender() {
    let sidecar = Setup::waiting(1, false).start();
    sidecar.await_status("answers", |_| true);
    let context = zmq_context();
    let identity = sockets::identity(0);
    let socket =
        sockets::connect(&context, zmq::SocketType::DEALER, &sidecar.handshake(), Some(&identity)).unwrap();
    socket.send(&b"\xc1 not msgpack"[..], 0).unwrap();
    socket.send(msg::encode(&rmpv::Value::from("HELLO")), 0).unwrap();
    sidecar.await_log(&["rank 0"]);
    drop(socket);
    let _engine = engine(&sidecar, 0, |_| {});
    sidecar.await_admitted();
}

fn zmq_context() -> zmq::Context {
    zmq::Context::new()
}

#[test]
fn an_engine_that_ends_before_ready_may_come_again() {
    let sidecar = Setup::waiting(1, false).start();
    let mut first = engine(&sidecar, 0, |options| {
        options.faults.die = Some(dp_sidecar_testkit::engine::Stage::AfterInit);
    });
    assert!(matches!(first.wait(SOON), Some(EngineEnd::Fault(_))));
    let _second = engine(&sidecar, 0, |_| {});
    sidecar.await_admitted();
}

#[test]
fn a_handshake_port_that_is_taken_is_said_so() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut sidecar = Setup::waiting(1, false).port(port).start();
    let status = sidecar.await_end();
    assert!(exited_with(status, 8), "{status}");
    sidecar.await_log(&[&port.to_string(), "in use"]);
}

#[test]
fn a_state_directory_in_use_is_said_so() {
    let sidecar = Setup::waiting(1, false).start();
    sidecar.await_status("answers", |_| true);
    let port = harness::free_port().to_string();
    let state = sidecar.state_dir().display().to_string();
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_sidecar"))
        .args(["--dp-rank", "0", "--data-parallel-rpc-port", &port])
        .args(["--model-kind", "dense", "--state-dir", &state])
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(8));
    let text = String::from_utf8_lossy(&second.stderr);
    assert!(text.contains(&state) && text.contains("in use"), "{text}");
    assert!(sidecar.status().is_some(), "the first one goes on");
}
