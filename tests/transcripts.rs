//! The same scripted engines against vLLM's own handshake server and DP coordinator, and against the
//! sidecar: what the engines are told is compared.
//!
//! `tests/transcripts/vllm-0.32.0.json` was recorded with vLLM 0.32.0. With `DP_SIDECAR_PYTHON` set
//! to a Python that has vLLM, it is recorded again and compared (`REWRITE=1`: written);
//! that test is ignored unless asked for, as in `cargo test -- --ignored vllm`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Instant;

use dp_sidecar_testkit::{msg, sockets};
use rmpv::Value;
use serde_json::json;
use zmq::{Context, PollEvents, Socket, SocketType};

use crate::conformance::harness::{SOON, Setup};

const RANKS: u16 = 3;
const RECORDED: &str = "tests/transcripts/vllm-0.32.0.json";

/// One scripted engine. It says what the script says, and records what it is told.
struct Peer {
    rank: u16,
    handshake: Socket,
    inputs: Vec<Socket>,
    outputs: Vec<Socket>,
    subscription: Option<Socket>,
    reports: Option<Socket>,
    told: Vec<serde_json::Value>,
}

impl Peer {
    fn new(context: &Context, address: &str, rank: u16) -> Self {
        let identity = sockets::identity(rank);
        Self {
            rank,
            handshake: sockets::connect(context, SocketType::DEALER, address, Some(&identity)).unwrap(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            subscription: None,
            reports: None,
            told: Vec::new(),
        }
    }

    fn say(&self, status: &str, hash: Option<&str>) {
        let mut fields = vec![
            ("status", Value::from(status)),
            ("local", Value::from(false)),
            ("headless", Value::from(true)),
        ];
        if let Some(hash) = hash {
            fields.push(("parallel_config_hash", Value::from(hash)));
        }
        let message = Value::Map(fields.into_iter().map(|(key, value)| (Value::from(key), value)).collect());
        self.handshake.send(msg::encode(&message), 0).unwrap();
    }

    /// HELLO, and INIT.
    fn hello(&mut self, context: &Context) {
        self.say("HELLO", None);
        let frames = receive(&self.handshake, "INIT");
        assert_eq!(frames.len(), 1);
        let init = msg::decode(&frames[0]).unwrap();
        let addresses = msg::get(&init, "addresses").unwrap();
        let identity = sockets::identity(self.rank);
        let inputs = msg::texts(addresses, "inputs").unwrap();
        let outputs = msg::texts(addresses, "outputs").unwrap();
        let open =
            |kind, address: &str, id: Option<&[u8]>| sockets::connect(context, kind, address, id).unwrap();
        for address in &inputs {
            self.inputs.push(open(SocketType::DEALER, address, Some(&identity)));
        }
        for address in &outputs {
            self.outputs.push(open(SocketType::PUSH, address, None));
        }
        let back = |key: &str| msg::text(addresses, key).unwrap();
        self.subscription = Some(open(SocketType::XSUB, &back("coordinator_input"), Some(&identity)));
        self.reports = Some(open(SocketType::PUSH, &back("coordinator_output"), None));
        // Which addresses and ports is each server's own business, and so is how many clients it
        // has; what kind of value is where is not.
        let config = msg::get(&init, "parallel_config").unwrap();
        // The port of a torch store that both do without: 0, or absent, which engines read as 0.
        let store = msg::get(config, "_coord_store_port").map_or(Some(0), Value::as_u64);
        let shape: BTreeMap<String, String> = config
            .as_map()
            .unwrap()
            .iter()
            .filter(|(key, _)| key.as_str() != Some("_coord_store_port"))
            .map(|(key, value)| (key.as_str().unwrap().to_owned(), kind(value)))
            .collect();
        self.told.push(json!({"init": {
            "clients": if inputs.len() == outputs.len() && !inputs.is_empty() { "pairs" } else { "broken" },
            "parallel_config": shape,
            "data_parallel_size": msg::get(config, "data_parallel_size").map(msg::to_json),
            "coord_store": store,
        }}));
    }

    fn subscribe_and_register(&self, size: u16) {
        self.subscription.as_ref().unwrap().send(&b"\x01"[..], 0).unwrap();
        let response = msg::map([
            ("max_model_len", Value::from(256)),
            ("num_gpu_blocks", Value::from(1024)),
            ("dp_stats_address", Value::Nil),
            ("dtype", Value::from("bfloat16")),
            ("block_size", Value::from(16)),
            ("vllm_version", Value::from("0.32.0")),
            ("data_parallel_size", Value::from(size)),
            ("data_parallel_rank", Value::from(self.rank)),
            ("world_size", Value::from(1)),
        ]);
        for input in &self.inputs {
            input.send(msg::encode(&response), 0).unwrap();
        }
    }

    fn report(&self, set: &[(usize, Value)]) {
        let mut fields = vec![Value::Nil; 9];
        fields[0] = Value::from(self.rank);
        fields[1] = Value::Array(Vec::new());
        fields[3] = Value::from(1.5);
        for (at, value) in set {
            fields[*at] = value.clone();
        }
        let reports = self.reports.as_ref().unwrap();
        reports.send(msg::encode(&Value::Array(fields)), 0).unwrap();
    }

    /// Takes what is there on the subscription, and answers utility calls, which only the sidecar
    /// makes.
    fn pump(&mut self) {
        while let Some(frames) = sockets::take(self.subscription.as_ref().unwrap()).unwrap() {
            let told = match frames.as_slice() {
                [ready] if ready == b"READY" => json!("READY"),
                [kind, payload] if kind == b"\x02" => {
                    let payload = msg::decode(payload).unwrap();
                    let parts = payload.as_array().unwrap();
                    assert_eq!(parts.len(), 2);
                    if parts[1].as_u64() == Some(u64::from(self.rank)) {
                        // It is excluded: an engine ignores this, so it may as well not be sent.
                        continue;
                    }
                    json!({"start_dp_wave": parts[0].as_u64().unwrap()})
                }
                other => panic!("rank {} was told {other:?}", self.rank),
            };
            self.told.push(told);
        }
        for at in 0..self.inputs.len() {
            while let Some(frames) = sockets::take(&self.inputs[at]).unwrap() {
                self.answer(&frames);
            }
        }
    }

    fn answer(&self, frames: &[Vec<u8>]) {
        if frames[0] != b"\x03" {
            return;
        }
        let call = msg::decode(&frames[1]).unwrap();
        let [client, id, method, args] = call.as_array().unwrap().as_slice() else {
            panic!("UTILITY {call}");
        };
        let data = match (method.as_str(), args.as_array().unwrap().first().and_then(Value::as_str)) {
            (Some("collective_rpc"), Some("dp_sidecar_info")) => Value::Array(vec![msg::map([
                ("ok", Value::from(true)),
                ("protocol", Value::from(2)),
                ("shim_version", Value::from(env!("CARGO_PKG_VERSION"))),
                ("model_path", Value::Nil),
                ("vllm_version", Value::from("0.32.0")),
                ("is_moe", Value::from(true)),
                ("dp_rank", Value::from(self.rank)),
                ("rank", Value::from(0)),
                ("world_size", Value::from(1)),
                ("error", Value::Nil),
                ("error_kind", Value::Nil),
            ])]),
            (Some("get_weight_version"), _) => Value::from("default"),
            (Some("is_scheduler_paused"), _) => Value::from(false),
            _ => Value::Nil,
        };
        let mut fields = vec![Value::Nil; 9];
        fields[0] = Value::from(self.rank);
        fields[1] = Value::Array(Vec::new());
        fields[3] = Value::from(1.5);
        fields[4] = Value::Array(vec![id.clone(), Value::Nil, Value::Array(vec![Value::Nil, data])]);
        let client = usize::try_from(client.as_u64().unwrap()).unwrap();
        self.outputs[client].send(msg::encode(&Value::Array(fields)), 0).unwrap();
    }
}

fn kind(value: &Value) -> String {
    match value {
        Value::Integer(_) => "int".to_owned(),
        Value::String(_) => "str".to_owned(),
        Value::Array(items) if items.len() >= 2 => "list of at least two int".to_owned(),
        other => format!("{other}"),
    }
}

fn receive(socket: &Socket, what: &str) -> Vec<Vec<u8>> {
    let limit = i64::try_from(SOON.as_millis()).unwrap();
    assert!(socket.poll(PollEvents::POLLIN, limit).unwrap() > 0, "no {what} in {SOON:?}");
    socket.recv_multipart(0).unwrap()
}

/// Plays the whole script against the server at `address`.
fn play(address: &str, hash: &str) -> serde_json::Value {
    let context = Context::new();
    let mut peers: Vec<Peer> = (0..RANKS).map(|rank| Peer::new(&context, address, rank)).collect();
    let order = [2, 0, 1];
    for rank in order {
        peers[rank].hello(&context);
    }
    for rank in order {
        peers[rank].subscribe_and_register(RANKS);
    }
    until(&mut peers, "READY everywhere", |peer| peer.told.len() == 2);
    for rank in order {
        peers[rank].say("READY", Some(hash));
    }
    let wave = |wave: u64| Value::from(wave);
    let starts = |peers: &mut Vec<Peer>, number: u64, but: u16| {
        until(peers, &format!("START_DP_WAVE {number}"), |peer| {
            peer.rank == but || peer.told.contains(&json!({"start_dp_wave": number}))
        });
    };
    // A start that nobody knew of wakes the others; told again it changes nothing.
    peers[0].report(&[(7, wave(0))]);
    peers[0].report(&[(7, wave(0))]);
    starts(&mut peers, 0, 0);
    // The end of the wave; told again it changes nothing.
    peers[0].report(&[(6, wave(0))]);
    peers[0].report(&[(6, wave(0))]);
    peers[0].report(&[(7, wave(1))]);
    starts(&mut peers, 1, 0);
    // In a message with both, the end wins.
    peers[0].report(&[(6, wave(1)), (7, wave(1))]);
    peers[0].report(&[(7, wave(2))]);
    starts(&mut peers, 2, 0);
    // A rank other than 0 is ahead: while the wave runs, and by more than one.
    peers[1].report(&[(7, wave(5))]);
    starts(&mut peers, 5, 1);
    // Load is no news of waves.
    let stats = msg::map([
        ("num_running_reqs", Value::from(3)),
        ("num_waiting_reqs", Value::from(1)),
        ("step_counter", Value::from(4)),
        ("current_wave", Value::from(5)),
        ("kv_cache_usage", Value::from(0.5)),
    ]);
    peers[0].report(&[(2, stats)]);
    peers[0].report(&[(6, wave(5))]);
    // An end of the past does not stop the wave that has begun since.
    peers[0].report(&[(7, wave(6))]);
    peers[0].report(&[(6, wave(3))]);
    peers[0].report(&[(7, wave(6))]);
    peers[0].report(&[(6, wave(6))]);
    peers[0].report(&[(7, wave(7))]);
    starts(&mut peers, 7, 0);
    let told = collect(&mut peers);
    // An engine that runs in a wave which is over: see the test for what that gives.
    peers[0].report(&[(6, wave(7))]);
    peers[0].report(&[(7, wave(3))]);
    peers[0].report(&[(7, wave(8))]);
    starts(&mut peers, 8, 0);
    json!({"told": told, "behind": collect(&mut peers)})
}

/// What each peer was told since the last time.
fn collect(peers: &mut [Peer]) -> serde_json::Value {
    peers
        .iter_mut()
        .map(|peer| (peer.rank.to_string(), json!(std::mem::take(&mut peer.told))))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn until(peers: &mut [Peer], what: &str, done: impl Fn(&Peer) -> bool) {
    let end = Instant::now() + SOON;
    loop {
        for peer in &mut *peers {
            peer.pump();
        }
        if peers.iter().all(&done) {
            return;
        }
        let told: Vec<_> = peers.iter().map(|peer| &peer.told).collect();
        assert!(Instant::now() < end, "no {what} in {SOON:?}; told: {told:?}");
        let mut items: Vec<_> = peers
            .iter()
            .flat_map(|peer| peer.inputs.iter().chain(&peer.subscription))
            .map(|socket| socket.as_poll_item(PollEvents::POLLIN))
            .collect();
        zmq::poll(&mut items, 50).unwrap();
    }
}

fn recorded() -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(RECORDED).unwrap()).unwrap()
}

#[test]
fn scripted_engines_are_told_the_same_by_the_sidecar_as_by_vllm() {
    let sidecar = Setup::waiting(RANKS, true).start();
    sidecar.await_status("answers", |_| true);
    let told = play(&sidecar.handshake(), "hash");
    let expected = recorded();
    assert_eq!(told["told"], expected["told"]);
    // vLLM ignores an engine that reports the start of a wave which is over, and it runs alone. The
    // sidecar wakes all ranks in the current wave, that engine too.
    assert_eq!(expected["behind"]["0"], json!([]));
    assert_eq!(told["behind"]["0"], json!([{"start_dp_wave": 8}]));
}

/// vLLM's own classes, in a process of their own.
struct Reference {
    child: Child,
    _stdin: ChildStdin,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Reference {
    fn start(python: &str) -> Self {
        let mut child = Command::new(python)
            .args(["tests/transcripts/reference.py", &RANKS.to_string()])
            .env("VLLM_LOGGING_LEVEL", "ERROR")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, _stdin: stdin, lines }
    }

    fn next(&mut self) -> serde_json::Value {
        loop {
            let line = self.lines.next().expect("the reference ended").unwrap();
            if let Ok(value @ serde_json::Value::Object(_)) = serde_json::from_str(&line) {
                return value;
            }
        }
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "needs vLLM: scripts/test runs it"]
fn the_recorded_transcript_is_what_vllm_says() {
    let python = std::env::var("DP_SIDECAR_PYTHON").expect("DP_SIDECAR_PYTHON, see scripts/vllm_env.py");
    let mut reference = Reference::start(&python);
    let hello = reference.next();
    let told = play(hello["handshake"].as_str().unwrap(), hello["hash"].as_str().unwrap());
    assert_eq!(reference.next(), json!({"started": true}));
    if std::env::var_os("REWRITE").is_some() {
        let text = serde_json::to_string_pretty(&told).unwrap();
        std::fs::write(Path::new(RECORDED), text + "\n").unwrap();
    }
    assert_eq!(told, recorded());
}
