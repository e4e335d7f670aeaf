//! Weights that a trainer pushes over HTTP, on fake engines that really read them.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;

use dp_sidecar_testkit::frontend::FakeFrontend;
use serde_json::{Value, json};

use super::checkpoints::{EMBEDDING, HEAD, MTP, NORM, filled, made};
use super::harness::{SOON, Setup, Sidecar, complete_all, directory, free_port, frontend, model, until};
use super::models::Model;

/// Where a sidecar listens, and its token.
#[derive(Clone)]
struct Http {
    port: u16,
    token: String,
}

/// One request on a connection of its own; the answer's status and body.
fn ask(http: &Http, request: &str, headers: &str, body: &[u8]) -> (u16, String) {
    let Http { port, token } = http;
    let mut head = format!("{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}");
    write!(head, "Authorization: Bearer {token}\r\n").unwrap();
    if !headers.contains("Content-Length") {
        write!(head, "Content-Length: {}\r\n", body.len()).unwrap();
    }
    let mut stream = TcpStream::connect(("127.0.0.1", *port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(format!("{head}\r\n").as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    if headers.contains("Content-Length") {
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.split(' ').nth(1).map_or(0, |status| status.parse().unwrap()), body.to_owned())
}

fn post(http: &Http, path: &str, body: &Value) -> (u16, Value) {
    let headers = "Content-Type: application/json\r\n";
    let (status, answer) = ask(http, &format!("POST {path}"), headers, body.to_string().as_bytes());
    (status, serde_json::from_str(&answer).unwrap_or(Value::Null))
}

/// Names and contents of the files that count.
fn files(path: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    let names = entries.map(|entry| entry.file_name().into_string().unwrap());
    names
        .filter(|name| name.ends_with(".safetensors"))
        .map(|name| {
            let bytes = std::fs::read(path.join(&name)).unwrap();
            (name, bytes)
        })
        .collect()
}

/// Two engines with a frontend, and where trainers reach them.
fn serving(old: &Model) -> (FakeFrontend, Sidecar, Http) {
    let mut frontend = frontend(2, |options| options.moe = false);
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let sidecar = Setup::spawning(2, old).args(&["--http", &address]).frontend(&frontend).start();
    frontend.startup(SOON).unwrap();
    sidecar.await_admitted();
    let token = std::fs::read_to_string(sidecar.state_dir().join("http-token")).unwrap();
    (frontend, sidecar, Http { port, token })
}

#[test]
fn a_trainer_that_dies_in_the_middle_of_an_upload_can_go_on_and_the_update_commits() {
    let directory = directory();
    let old = model(directory.path(), "old", 1, false);
    let new = model(directory.path(), "new", 2, false);
    let (mut frontend, sidecar, http) = serving(&old);
    assert_eq!(
        ask(&Http { token: "x".repeat(64), ..http.clone() }, "GET /v1/weights/version", "", b"").0,
        401
    );

    let files = files(&new.path);
    let sizes: Vec<Value> =
        files.iter().map(|(name, bytes)| json!({"name": name, "size": bytes.len()})).collect();
    let (status, answer) = post(&http, "/v1/weights/uploads", &json!({"id": "t1", "files": sizes}));
    assert_eq!(status, 200, "{answer}");
    // The first trainer dies in the middle of the last file.
    let (last, rest) = files.split_last().unwrap();
    for (name, bytes) in rest {
        assert_eq!(ask(&http, &format!("PUT /v1/weights/uploads/t1/{name}"), "", bytes).0, 200);
    }
    let (name, bytes) = last;
    let half = bytes.len() / 2;
    let put = format!("PUT /v1/weights/uploads/t1/{name}");
    ask(&http, &put, &format!("Content-Length: {}\r\n", bytes.len()), &bytes[..half]);
    // The update is begun while bytes are missing.
    let own = http.clone();
    let updating = std::thread::spawn(move || {
        let headers = "Content-Type: application/json\r\nAccept: text/event-stream\r\n";
        let body = json!({"upload": "t1", "version": "v2"}).to_string();
        ask(&own, "POST /v1/weights/updates", headers, body.as_bytes())
    });
    until("the update to be staging", SOON, || sidecar.log().contains("staging begins").then_some(()));
    let (_, there) = ask(&http, "GET /v1/weights/uploads/t1", "", b"");
    let there: Value = serde_json::from_str(&there).unwrap();
    assert_eq!(there["complete"], false, "{there}");
    let range = format!("Content-Range: bytes {half}-{}/*\r\n", bytes.len() - 1);
    let (status, answer) = ask(&http, &put, &range, &bytes[half..]);
    assert_eq!(status, 200, "{answer}");
    let (status, events) = updating.join().unwrap();
    assert_eq!(status, 200, "{events}");
    assert!(events.contains("event: progress") && events.contains("\"status\":\"committed\""), "{events}");
    for done in complete_all(&mut frontend, "after", 6, 4) {
        assert_eq!(done.tokens, new.tokens(4), "rank {}", done.rank);
    }
    assert_eq!(sidecar.await_admitted()["weights"]["version"], "v2");
}

#[test]
fn http_beyond_loopback_needs_a_token_of_its_own() {
    let directory = directory();
    let old = model(directory.path(), "old", 1, false);
    let token = directory.path().join("token");
    std::fs::write(&token, "the secret of the nodes").unwrap();
    let token = token.display().to_string();
    let nodes = ["--leader", "127.0.0.1:1", "--auth-token-file", &token];
    for (args, expected) in [
        (&nodes[..], "without --http-token-file only a loopback address is allowed"),
        (&[&nodes[..], &["--http-token-file", &token]].concat(), "it holds the secret of --auth-token-file"),
    ] {
        let setup = Setup::spawning(2, &old).args(&["--data-parallel-size-local", "1"]);
        let mut sidecar = setup.args(&["--http", "0.0.0.0:0"]).args(args).start();
        assert_eq!(sidecar.await_end().code(), Some(2));
        let said = sidecar.log();
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn an_upload_may_lack_what_vllm_does_not_load_and_nothing_else() {
    let directory = directory();
    let config = [("num_nextn_predict_layers", json!(1))];
    let old = made(directory.path(), "old", &[HEAD, EMBEDDING, NORM, MTP], &config);
    let needed = [filled(HEAD, 2), filled(EMBEDDING, 2), filled(NORM, 2)];
    let new = made(directory.path(), "new", &needed, &[]);
    let lacks = made(directory.path(), "lacks", &needed[1..], &[]);
    let (mut frontend, _sidecar, http) = serving(&old);
    let mut update = |id: &str, from: &Path, serves: &[u32]| {
        let [(name, bytes)] = &files(from)[..] else { panic!("one file") };
        let sizes = json!([{"name": name, "size": bytes.len()}]);
        post(&http, "/v1/weights/uploads", &json!({"id": id, "files": sizes}));
        assert_eq!(ask(&http, &format!("PUT /v1/weights/uploads/{id}/{name}"), "", bytes).0, 200);
        let (status, answer) = post(&http, "/v1/weights/updates", &json!({"upload": id, "version": id}));
        for done in complete_all(&mut frontend, id, 6, 4) {
            assert_eq!(done.tokens, serves, "rank {}: {answer}", done.rank);
        }
        (status, answer)
    };
    let (status, answer) = update("lacks", &lacks.path, &old.tokens(4));
    assert_eq!(status, 422, "{answer}");
    let reason = answer["reason"].as_str().unwrap();
    assert!(reason.ends_with("1 tensor fault: missing lm_head.weight"), "{reason}");
    let (status, answer) = update("new", &new.path, &new.tokens(4));
    assert_eq!(status, 200, "{answer}");
}
