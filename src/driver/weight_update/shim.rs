//! Calls of the shim in an engine's workers, see `protocol/docs/weight-update.md`.

use std::collections::BTreeSet;
use std::time::Duration;

use dp_sidecar_protocol::layout::{Layout, VllmVersion};
use dp_sidecar_protocol::machine::weight_update::{Checkpoint, OddTensor, WorkerReport};
use dp_sidecar_protocol::{UpdateId, WeightVersion};
use rmpv::Value;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::super::engine_calls::worker_call;
use super::super::handles::{CheckpointDir, HandleError, RankHandle};

/// Version of the contract. 2: segments and adapters. 3: the sidecar compares an adapter's shapes and sends its
/// configuration. 4: vLLM's loader is asked for files. 5: and for the tensors that it passes over. 6: drafts and KV
/// connectors.
pub(super) const PROTOCOL: u64 = 6;
/// Methods of speculative decoding that have no weights (`SpeculativeConfig.method`, vllm/config/speculative.py).
const WITHOUT_WEIGHTS: [&str; 4] = ["ngram", "[ngram]", "ngram_gpu", "suffix"];

/// What an engine says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct EngineInfo {
    /// Directory of the command line's checkpoint.
    pub(super) model_path: String,
    pub(super) vllm_version: String,
    pub(super) shim_version: String,
    /// `--load-format`.
    pub(super) load_format: String,
    /// Names of the files that its loader reads there; `None`: it is not vLLM's default loader.
    pub(super) files: Option<Vec<String>>,
    /// Highest rank of an adapter that the engine takes; `None`: it was started without `--enable-lora`.
    pub(super) max_lora_rank: Option<u64>,
    /// Parameters that are one tensor: a copy, and what it is a copy of.
    pub(super) tied: Vec<(String, String)>,
    /// Of the tensors that it was asked about, those that its loader passes over, in every worker.
    pub(super) ignored: BTreeSet<String>,
    /// Method of speculative decoding.
    pub(super) draft: Option<String>,
    /// KV connectors that cannot drop what they keep.
    pub(super) kv_connectors: Vec<String>,
}

impl EngineInfo {
    /// The checkpoint of the command line.
    pub(super) fn model(&self) -> CheckpointDir {
        CheckpointDir { path: self.model_path.clone(), files: self.files.clone() }
    }

    /// Why the engine does not hold the checkpoint of the command line, although nothing else was loaded.
    pub(super) fn holds_other(&self) -> Option<String> {
        let dummy = self.load_format == "dummy";
        dummy.then(|| {
            "with --load-format dummy it has started with random weights, which no file holds".to_owned()
        })
    }

    /// Why its weights cannot be updated.
    pub(super) fn refuses(&self) -> Option<String> {
        let other = self.files.iter().flatten().find(|file| !file.ends_with(".safetensors"))?;
        Some(format!(
            "its model was loaded from {other} in {}: only safetensors can be compared",
            self.model_path
        ))
    }

    /// Why requests may be answered from KV blocks of the weights before, after an update.
    pub(super) fn keeps_kv(&self) -> Option<String> {
        let names = self.kv_connectors.join(" and ");
        (!names.is_empty()).then(|| {
            format!(
                "its KV connector {names} cannot drop the blocks that it keeps (it has no reset_cache), so requests could \
                 go on from those of the old weights"
            )
        })
    }

    /// What an update does not change: vLLM's loader brings the weights of the model alone.
    pub(super) fn keeps_draft(&self) -> Option<String> {
        let method = self.draft.as_ref().filter(|method| !WITHOUT_WEIGHTS.contains(&method.as_str()))?;
        Some(format!(
            "the weights that draft for it ({method}) stay those of its start: answers are right, and fewer drafts are \
             accepted; start the engines again to change them"
        ))
    }

    /// `reset_prefix_cache` tells a connector that is not there from one that failed, since 0.32.0.
    pub(super) fn connector_answers(&self) -> bool {
        self.vllm_version.parse().is_ok_and(|version: VllmVersion| version >= VllmVersion::new(0, 32, 0))
    }

    /// `set_weight_version` exists. Of a version that cannot be read that is assumed.
    pub(super) fn has_weight_version(&self) -> bool {
        let version: Result<VllmVersion, _> = self.vllm_version.parse();
        version.map_or(true, |version| Layout::closest(version).has_weight_version())
    }
}

/// Asks all workers of a rank who they are. The error says what to do about it.
pub(super) async fn info(rank: &RankHandle, limit: Duration) -> Result<EngineInfo, String> {
    info_with(rank, Vec::new(), limit).await
}

/// Which of these tensors vLLM's loader in a rank passes over.
pub(super) async fn ignored(
    rank: &RankHandle,
    tensors: &[OddTensor],
    limit: Duration,
) -> Result<BTreeSet<String>, String> {
    let entry = |OddTensor { name, dtype, shape, .. }: &OddTensor| {
        let shape = shape.iter().map(|dimension| (*dimension).into()).collect();
        Value::Array(vec![name.as_str().into(), dtype.as_str().into(), Value::Array(shape)])
    };
    let tensors = Value::Array(tensors.iter().map(entry).collect());
    info_with(rank, vec![("tensors", tensors)], limit).await.map(|info| info.ignored)
}

/// Asks vLLM's loader in a rank which files of a directory count.
pub(super) async fn directory(
    rank: &RankHandle,
    path: &str,
    limit: Duration,
) -> Result<CheckpointDir, String> {
    let EngineInfo { files, .. } = info_with(rank, vec![("path", path.into())], limit).await?;
    Ok(CheckpointDir { path: path.to_owned(), files })
}

async fn info_with(
    rank: &RankHandle,
    asked: Vec<(&str, Value)>,
    limit: Duration,
) -> Result<EngineInfo, String> {
    let answer = match worker_call(rank, "dp_sidecar_info", map(asked), limit).await {
        Ok(answer) => answer,
        Err(HandleError::Failed(text)) if text.contains("dp_sidecar_info") => {
            return Err(
                "the shim is not in the engine's Python environment: install it there (pip install dp-sidecar-shim), see that \
                 VLLM_PLUGINS, if the engine has it, names dp_sidecar, and start the engine again"
                    .to_owned(),
            );
        }
        Err(error) => return Err(error.to_string()),
    };
    let mut found: Option<EngineInfo> = None;
    let workers = answer.as_array().map_or(&[][..], Vec::as_slice);
    for (at, worker) in workers.iter().enumerate() {
        let text = |key: &str| worker[key].as_str().unwrap_or_default().to_owned();
        let list = |key: &str| worker[key].as_array().map_or(&[][..], Vec::as_slice);
        let text_of = |value: &Value| value.as_str().map(str::to_owned);
        let protocol = worker["protocol"].as_u64();
        if protocol != Some(PROTOCOL) {
            let actual = protocol.map_or_else(|| "none".to_owned(), |p| p.to_string());
            return Err(format!(
                "worker {at}: the shim (version {}) speaks protocol {actual}, expected {PROTOCOL}: install the dp-sidecar-shim that belongs to this sidecar ({}) and start the engine again",
                text("shim_version"),
                env!("CARGO_PKG_VERSION"),
            ));
        }
        if worker["ok"].as_bool() != Some(true) {
            return Err(format!("worker {at}: shim failed: {}", text("error")));
        }
        let info = EngineInfo {
            model_path: text("model_path"),
            vllm_version: text("vllm_version"),
            shim_version: text("shim_version"),
            load_format: text("load_format"),
            files: worker["files"]
                .as_array()
                .map(|files| files.iter().filter_map(Value::as_str).map(str::to_owned).collect()),
            max_lora_rank: worker["max_lora_rank"].as_u64(),
            tied: list("tied")
                .iter()
                .filter_map(|pair| Some((text_of(&pair[0])?, text_of(&pair[1])?)))
                .collect(),
            ignored: list("ignored").iter().filter_map(text_of).collect(),
            draft: text_of(&worker["draft"]),
            kv_connectors: list("kv_connectors").iter().filter_map(text_of).collect(),
        };
        match &mut found {
            // A worker has a part of the model, and passes over what another one needs.
            Some(found) => {
                found.tied.extend(info.tied);
                found.ignored.retain(|name| info.ignored.contains(name));
            }
            None => found = Some(info),
        }
    }
    found.ok_or_else(|| "no worker answered to dp_sidecar_info".to_owned())
}

/// Loads a checkpoint in all workers of a rank: from a directory, or from this node's segment. The bytes of a
/// segment were verified by the node, so the workers count and do not hash again.
pub(super) async fn load(
    rank: &RankHandle,
    id: &UpdateId,
    checkpoint: &Checkpoint,
    limit: Duration,
) -> Result<Vec<WorkerReport>, String> {
    let kwargs = map(vec![("request", load_request(id, checkpoint))]);
    let answer =
        worker_call(rank, "dp_sidecar_load", kwargs, limit).await.map_err(|error| error.to_string())?;
    Ok(reports(&answer))
}

/// Request map of `dp_sidecar_load`.
fn load_request(id: &UpdateId, checkpoint: &Checkpoint) -> Value {
    let mut entries = vec![("protocol", PROTOCOL.into()), ("update_id", id.0.as_str().into())];
    entries.extend(source(checkpoint));
    if !checkpoint.rename.is_empty() {
        let pairs = checkpoint.rename.iter().map(|(from, to)| Value::Array(vec![from.into(), to.into()]));
        entries.push(("rename", Value::Array(pairs.collect())));
    }
    map(entries)
}

/// What a request says of the files that are to be read.
pub(super) fn source(checkpoint: &Checkpoint) -> Vec<(&'static str, Value)> {
    let files = checkpoint.files.iter().map(|file| file.as_str().into());
    let digest = checkpoint.digest.as_deref().filter(|_| checkpoint.extents.is_empty());
    let mut entries = vec![
        ("path", checkpoint.path.as_str().into()),
        ("files", Value::Array(files.collect())),
        ("tensors", checkpoint.tensors.into()),
        ("bytes", checkpoint.bytes.into()),
        ("digest", digest.map_or(Value::Nil, Value::from)),
        ("digest_kind", digest.map_or("none", |_| "blake3").into()),
    ];
    if !checkpoint.extents.is_empty() {
        let pairs = checkpoint.extents.iter().map(|e| Value::Array(vec![e.offset.into(), e.length.into()]));
        entries.push(("extents", Value::Array(pairs.collect())));
    }
    entries
}

/// Reports of the workers. What one does not say, or says wrongly, is taken for the worst: the default of `T`.
pub(super) fn reports<T: DeserializeOwned + Default>(answer: &Value) -> Vec<T> {
    let workers = answer.as_array().map_or(&[][..], Vec::as_slice);
    workers.iter().enumerate().map(report).collect()
}

fn report<T: DeserializeOwned + Default>((at, worker): (usize, &Value)) -> T {
    let mut told = serde_json::Map::from_iter([("rank".to_owned(), at.into())]);
    let entries = worker.as_map().into_iter().flatten().filter(|(_, value)| !value.is_nil());
    // JSON cannot hold every value of msgpack.
    let read = entries
        .map(|(key, value)| Ok((key.as_str().unwrap_or_default().to_owned(), serde_json::to_value(value)?)))
        .collect::<serde_json::Result<Vec<_>>>()
        .and_then(|entries| {
            told.extend(entries);
            serde_json::from_value(told.into())
        });
    let worst = |error: serde_json::Error| json!({ "rank": at, "error": format!("report: {error}") });
    read.or_else(|error| serde_json::from_value(worst(error))).unwrap_or_default()
}

/// Has an engine put a version on its outputs. False: its vLLM cannot.
pub(super) async fn stamp(
    rank: &RankHandle,
    info: Option<&EngineInfo>,
    version: &WeightVersion,
    limit: Duration,
) -> Result<bool, String> {
    if info.is_some_and(|info| !info.has_weight_version()) {
        return Ok(false);
    }
    let answer = rank.call("set_weight_version", vec![version.0.as_str().into()], limit).await;
    answer.map(|_| true).map_err(|error| error.to_string())
}

pub(super) fn map(entries: Vec<(&str, Value)>) -> Value {
    let entries = entries.into_iter();
    Value::Map(entries.map(|(key, value)| (key.into(), value)).collect())
}

#[cfg(test)]
mod tests {
    use dp_sidecar_protocol::machine::weight_update::{Extent, WorkerState};

    use super::*;

    #[test]
    fn an_answer_that_makes_no_sense_is_taken_for_torn_weights() {
        // JSON has no such key.
        let keyless = map(vec![("ok", true.into()), ("digest", Value::Map(vec![(Value::Nil, 1.into())]))]);
        for nonsense in [
            Value::Nil,
            Value::from(3),
            map(vec![("ok", Value::from("yes")), ("state", Value::from(7))]),
            keyless,
        ] {
            let report: WorkerReport = report((4, &nonsense));
            assert!(!report.ok);
            assert_eq!((report.rank, report.state), (4, WorkerState::Mixed));
            assert!(report.fault(&Checkpoint::default()).is_some());
        }
    }

    #[test]
    fn a_segment_is_asked_for_with_its_extents_and_without_hashing() {
        let mut checkpoint = Checkpoint {
            path: "/dev/shm/segment".to_owned(),
            files: vec!["a.safetensors".to_owned(), "b.safetensors".to_owned()],
            extents: vec![Extent { offset: 4096, length: 100 }, Extent { offset: 8192, length: 50 }],
            tensors: 3,
            bytes: 90,
            digest: Some("xxh3:0123".to_owned()),
            ..Checkpoint::default()
        };
        let request = load_request(&UpdateId("u".to_owned()), &checkpoint);
        let pair = |offset: u64, length: u64| Value::Array(vec![offset.into(), length.into()]);
        assert_eq!(request["extents"], Value::Array(vec![pair(4096, 100), pair(8192, 50)]));
        assert_eq!((&request["digest"], &request["digest_kind"]), (&Value::Nil, &Value::from("none")));
        checkpoint.extents.clear();
        let request = load_request(&UpdateId("u".to_owned()), &checkpoint);
        assert_eq!(request["extents"], Value::Nil);
        assert_eq!(request["digest_kind"], Value::from("blake3"));
    }

    #[test]
    fn the_version_decides_whether_a_connectors_answer_counts() {
        let info = |version: &str| EngineInfo { vllm_version: version.to_owned(), ..EngineInfo::default() };
        for (version, answers) in [
            ("0.32.0", true),
            ("0.32.0+cpu", true),
            ("0.33.1", true),
            ("1.0", true),
            ("0.31.2", false),
            ("0.9", false),
            ("", false),
        ] {
            assert_eq!(info(version).connector_answers(), answers, "{version}");
        }
    }
}
