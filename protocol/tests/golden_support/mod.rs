//! Reads the captures: what vLLM wrote, and what it decodes from it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::positional::Scanner;
use serde_json::Value as Json;
use sha2::{Digest, Sha256};

pub(crate) struct Message {
    pub(crate) name: String,
    pub(crate) frames: Vec<Bytes>,
    pub(crate) expect: Json,
}

pub(crate) struct Golden {
    pub(crate) layout: Layout,
    pub(crate) fields: Json,
    pub(crate) files: BTreeMap<String, Vec<Message>>,
}

pub(crate) fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden")
}

pub(crate) fn read_json(path: PathBuf) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// All captured versions. The bytes are checked against the manifest's digests.
pub(crate) fn captures() -> Vec<Golden> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_dir() {
            continue;
        }
        let manifest = read_json(path.join("manifest.json"));
        let version = manifest["vllm_version"].as_str().unwrap();
        let mut files = BTreeMap::new();
        for (name, file) in manifest["files"].as_object().unwrap() {
            let data = std::fs::read(path.join(name)).unwrap();
            let digest: String = Sha256::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(digest, file["sha256"], "{version} {name}");
            let names = file["messages"].as_array().unwrap();
            let messages = frames(&data);
            assert_eq!(messages.len(), names.len(), "{version} {name}");
            let messages = messages
                .into_iter()
                .zip(names)
                .map(|(frames, entry)| Message {
                    name: entry["name"].as_str().unwrap().to_owned(),
                    frames,
                    expect: entry["expect"].clone(),
                })
                .collect();
            files.insert(name.trim_end_matches(".frames").to_owned(), messages);
        }
        found.push(Golden {
            layout: Layout::for_version(version.parse().unwrap()).unwrap(),
            fields: manifest["struct_fields"].clone(),
            files,
        });
    }
    assert!(!found.is_empty(), "no captures in {}", folder().display());
    found
}

pub(crate) fn frames(data: &[u8]) -> Vec<Vec<Bytes>> {
    let mut scanner = Scanner::new(data);
    let messages = (0..scanner.array().unwrap())
        .map(|_| {
            (0..scanner.array().unwrap()).map(|_| Bytes::copy_from_slice(scanner.bin().unwrap())).collect()
        })
        .collect();
    scanner.finish().unwrap();
    messages
}

/// Calls `check` with each message of a file, in each version; returns how many there were.
pub(crate) fn each(file: &str, mut check: impl FnMut(&Layout, &str, &Message)) -> usize {
    let mut count = 0;
    for golden in captures() {
        for message in &golden.files[file] {
            let label = format!("{} {}", golden.layout.version, message.name);
            check(&golden.layout, &label, message);
            count += 1;
        }
    }
    count
}

pub(crate) fn json(value: &rmpv::Value) -> Json {
    match value {
        rmpv::Value::Binary(bytes) => {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            serde_json::json!({ "bytes": hex })
        }
        rmpv::Value::Array(items) => items.iter().map(json).collect(),
        rmpv::Value::Map(pairs) => pairs
            .iter()
            .map(|(key, value)| (key.as_str().unwrap().to_owned(), json(value)))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        other => serde_json::to_value(other).unwrap(),
    }
}

pub(crate) fn strings(value: &Json) -> Vec<&str> {
    let items = value.as_array().unwrap();
    items.iter().map(|item| item.as_str().unwrap()).collect()
}

pub(crate) fn rmpv_value(value: &Json) -> rmpv::Value {
    match value {
        Json::Array(items) => rmpv::Value::Array(items.iter().map(rmpv_value).collect()),
        Json::Object(map) => match map.get("bytes").and_then(Json::as_str) {
            Some(hex) => rmpv::Value::Binary(
                (0..hex.len())
                    .step_by(2)
                    .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
                    .collect(),
            ),
            None => rmpv::Value::Map(
                map.iter().map(|(key, value)| (key.as_str().into(), rmpv_value(value))).collect(),
            ),
        },
        other => rmpv::ext::to_value(other).unwrap(),
    }
}
