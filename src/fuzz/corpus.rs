//! Writes `fuzz/corpus` from vLLM's captures and from what the sidecar itself encodes: `scripts/fuzz --corpus`.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use dp_sidecar_protocol::EngineIndex;
use dp_sidecar_protocol::positional::Scanner;

use super::tests::folder;
use crate::driver::handles::{Call, NodeAsk, NodeEvent, encode};
use crate::link::wire::{FromNode, LINK_VERSION, ToNode};
use crate::peer::hello::{LeaderAnswer, NodeHello};
use crate::supervisor::keeper::wire as keeper;
use crate::transport::zmtp;

/// Longest entry that is taken: small ones are mutated better.
const LONGEST: usize = 1500;

type Corpus = BTreeMap<&'static str, Vec<Vec<u8>>>;

/// Messages of a capture, frame by frame.
fn captured(version: &str, file: &str) -> Vec<Vec<Bytes>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("protocol/golden");
    let data = std::fs::read(root.join(format!("vllm-{version}/{file}.frames"))).unwrap();
    let mut scanner = Scanner::new(&data);
    let messages = scanner.array().unwrap();
    let mut frames = || {
        let count = scanner.array().unwrap();
        (0..count).map(|_| Bytes::copy_from_slice(scanner.bin().unwrap())).collect()
    };
    (0..messages).map(|_| frames()).collect()
}

fn from_vllm(corpus: &mut Corpus) {
    // By the order of `LAYOUTS`.
    for (at, version) in ["0.11.0", "0.17.1", "0.22.1", "0.32.0", "0.33.0"].into_iter().enumerate() {
        let mut add = |name, entry: Vec<u8>| corpus.entry(name).or_default().push(entry);
        for message in captured(version, "input") {
            let mut entry = vec![u8::try_from(at).unwrap()];
            let mut stream = BytesMut::new();
            for (nth, frame) in message.iter().enumerate() {
                entry.extend(u16::try_from(frame.len()).unwrap_or(u16::MAX).to_be_bytes());
                entry.extend_from_slice(frame);
                zmtp::encode_header(frame.len(), nth + 1 < message.len(), &mut stream);
                stream.extend_from_slice(frame);
            }
            if let Some(payload) = message.get(1) {
                add("scan", payload.to_vec());
            }
            add("frontend", entry);
            add("zmtp", stream.to_vec());
        }
        for (file, target) in
            [("output", "engine"), ("handshake", "handshake"), ("coordinator", "coordinator")]
        {
            for frame in captured(version, file).into_iter().flatten() {
                add(target, frame.to_vec());
            }
        }
    }
}

fn of_the_link(corpus: &mut Corpus) {
    let to = |message: &ToNode| rmp_serde::to_vec_named(message).unwrap();
    let from = |message: &FromNode| rmp_serde::to_vec_named(message).unwrap();
    let value =
        rmpv::Value::Array(vec![rmpv::Value::Nil, rmpv::Value::from(3), rmpv::Value::Binary(vec![1])]);
    let call = Call {
        key: uuid::Uuid::from_u128(7),
        method: "pause_scheduler".to_owned(),
        args: vec![value.clone()],
        timeout: std::time::Duration::from_millis(500),
    };
    corpus.entry("link").or_default().extend([
        to(&ToNode::Hello { version: LINK_VERSION, session: uuid::Uuid::from_u128(9) }),
        to(&ToNode::Ping),
        to(&ToNode::Ask { id: 1, ask: NodeAsk::Rank(EngineIndex(1), call.into()) }),
        from(&FromNode::Hello { version: LINK_VERSION }),
        from(&FromNode::Pong),
        from(&FromNode::Answer { id: 1, result: encode(&value) }),
        from(&FromNode::Answer { id: 2, result: Err("no such rank".to_owned()) }),
        from(&FromNode::Event(NodeEvent::Wake(EngineIndex(1)))),
    ]);
}

fn between_nodes(corpus: &mut Corpus) {
    let framed = |body: Vec<u8>| [u32::try_from(body.len()).unwrap().to_be_bytes().to_vec(), body].concat();
    let hello = NodeHello {
        start_rank: 2,
        size_local: 2,
        run_id: "3f".to_owned(),
        epoch: 1_764_500_000_000,
        host: "node1".to_owned(),
        pid: 42,
        address: Some([10, 0, 0, 2].into()),
        values: [("model".to_owned(), "m".to_owned())].into(),
        unknown: ["vllm".to_owned()].into(),
    };
    let waiting = LeaderAnswer::Waiting { missing: vec![(2, 2)] };
    corpus.entry("peer").or_default().extend([
        framed(rmp_serde::to_vec_named(&hello).unwrap()),
        framed(rmp_serde::to_vec_named(&NodeHello::default()).unwrap()),
        framed(rmp_serde::to_vec_named(&waiting).unwrap()),
    ]);
    for role in *b"FLSR" {
        let mut opening = [&b"DPSCPEER"[..], &LINK_VERSION.to_be_bytes(), &[role], &[7; 32]].concat();
        corpus.entry("auth").or_default().push(opening.clone());
        // The answer to a proof, and a proof.
        opening.extend([1; 33]);
        corpus.entry("auth").or_default().push(opening);
    }
    corpus.entry("transfer").or_default().extend(crate::staging::transfer_corpus());
}

fn of_the_keeper(corpus: &mut Corpus) {
    let spec = keeper::SpawnSpec {
        name: "engine-0".to_owned(),
        incarnation: 3,
        argv: vec!["vllm".to_owned(), "serve".to_owned()],
        env: [("A".to_owned(), "b".to_owned())].into(),
        cwd: Some("/x".into()),
        stop_order: 1,
    };
    let exit = keeper::ExitReport {
        name: "engine-0".to_owned(),
        incarnation: 3,
        pid: 42,
        status: keeper::ExitStatus::Signal { signal: 9 },
        requested: false,
        last_lines: vec!["boom".to_owned()],
        strays_killed: 1,
        left: vec![7],
    };
    let answer =
        keeper::Answer::Inventory { pid: 1, run_id: "r".to_owned(), children: vec![], exits: vec![exit] };
    corpus.entry("keeper").or_default().extend([
        keeper::encode(&keeper::ToKeeper { seq: 1, request: keeper::Request::Spawn { spec } }).unwrap(),
        keeper::encode(&keeper::ToKeeper { seq: 2, request: keeper::Request::Own }).unwrap(),
        keeper::encode(&keeper::FromKeeper::Answer { seq: 3, answer }).unwrap(),
    ]);
}

fn of_checkpoints_and_http(corpus: &mut Corpus) {
    for text in [
        r#"{"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}"#,
        r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#,
        r#"{"a":{"dtype":"I64","shape":[18446744073709551615,2],"data_offsets":[0,0]}}"#,
        "{}",
    ] {
        corpus
            .entry("manifest")
            .or_default()
            .push([&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat());
    }
    corpus.entry("index").or_default().extend([
        br#"{"metadata":{"total_size":16},"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}"#.to_vec(),
        br#"{"weight_map":{"a":"model.safetensors"}}"#.to_vec(),
        br#"{"weight_map":{"a":"../model.safetensors"}}"#.to_vec(),
    ]);
    for request in [
        "POST /v1/weights/uploads HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 63\r\n\r\n{\"id\": \"s7\", \"files\": [{\"name\": \"model.safetensors\", \"size\": 9}]}",
        "PUT /v1/weights/uploads/s7/model.safetensors HTTP/1.1\r\nHost: h\r\nContent-Range: bytes 0-3/9\r\nContent-Length: 4\r\n\r\nabcd",
        "PUT /v1/weights/uploads/s7/m HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n",
        "POST /v1/weights/updates HTTP/1.1\r\nHost: h\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\nContent-Length: 31\r\n\r\n{\"path\": \"/m\", \"version\": \"v2\"}",
        "GET /v1/weights/updates?limit=3 HTTP/1.1\r\nHost: h\r\n\r\n",
        "GET /v1/weights/updates/events?id=u HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer x\r\n\r\n",
        "bytes 0-3/12",
    ] {
        corpus.entry("http").or_default().push(request.as_bytes().to_vec());
    }
}

#[test]
fn the_corpus_is_written_when_that_is_asked_for() {
    if std::env::var_os("DP_SIDECAR_FUZZ_CORPUS").is_none() {
        return;
    }
    let mut corpus = Corpus::new();
    from_vllm(&mut corpus);
    of_the_link(&mut corpus);
    between_nodes(&mut corpus);
    of_the_keeper(&mut corpus);
    of_checkpoints_and_http(&mut corpus);
    for (name, mut entries) in corpus {
        std::fs::create_dir_all(folder(name)).unwrap();
        entries.retain(|entry| entry.len() <= LONGEST);
        entries.sort();
        entries.dedup();
        // Some of each length: versions differ little.
        entries.sort_by_key(Vec::len);
        let step = entries.len().div_ceil(24);
        for entry in entries.iter().step_by(step) {
            let hash = blake3::hash(entry).to_hex();
            std::fs::write(folder(name).join(&hash[..16]), entry).unwrap();
        }
    }
}
