//! LoRA adapters of engines, through the shim: `dp_sidecar_lora` of `protocol/docs/weight-update.md`.

use std::fmt;
use std::time::Duration;

use dp_sidecar_protocol::UpdateId;
use dp_sidecar_protocol::machine::weight_update::Adapter;
use rmpv::Value;
use serde::{Deserialize, Serialize};

use super::super::engine_calls::worker_call;
use super::super::handles::{HandleError, RankHandle};
use super::shim::{PROTOCOL, map, reports, source};

/// What is done with an adapter. Each of them may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum LoraOp {
    /// Read it and see whether this engine could load it. Nothing is touched; generation may go on, the engine
    /// stands still while it reads.
    Check,
    /// Load it, in place of the one of that name, or of the one that frontends brought under that name.
    Replace,
    /// Forget the name. One that is not there is fine.
    Remove,
    /// Take back what this update did to the name: from memory, without reading a file.
    Undo,
    /// Which adapters are there.
    List,
}

impl LoraOp {
    /// Does it bring weights?
    pub(super) const fn loads(self) -> bool {
        matches!(self, Self::Check | Self::Replace)
    }
}

/// Spelling of the contract.
impl fmt::Display for LoraOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// What all workers of a rank are asked to do.
#[derive(Clone, Copy, Debug)]
pub(super) struct LoraRequest<'a> {
    pub id: &'a UpdateId,
    pub op: LoraOp,
    /// Name that requests of frontends use as `model`. Not looked at by `List`.
    pub name: &'a str,
    /// Where [`LoraOp::loads`].
    pub adapter: Option<&'a Adapter>,
}

impl<'a> LoraRequest<'a> {
    /// What is to be loaded.
    fn source(&self) -> Option<&'a Adapter> {
        self.adapter.filter(|_| self.op.loads())
    }
}

/// Number under which engines load an adapter that no frontend has asked for yet. Made from the name, so that it
/// is the same on all ranks; far above the numbers that frontends count up from 1.
pub(super) fn adapter_id(name: &str) -> u64 {
    let hash = blake3::hash(name.as_bytes());
    let [a, b, c, d, ..] = *hash.as_bytes();
    u64::from(u32::from_le_bytes([a, b, c, d]) & 0x3fff_ffff | 0x4000_0000)
}

/// What a worker holds under the name afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum LoraState {
    /// What was asked for.
    Applied,
    /// What it held before.
    Unchanged,
    /// Neither for certain; the worker may still serve other adapters and the base model. Also what is assumed
    /// when it does not say.
    #[default]
    Mixed,
}

/// An adapter in a worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct LoraAdapter {
    pub name: String,
}

/// Answer of one worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(super) struct LoraReport {
    /// Worker rank within its DP rank.
    pub rank: u32,
    /// Done as asked.
    pub ok: bool,
    pub state: LoraState,
    /// Tensors in the file.
    pub tensors: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Whole digest, if it was computed.
    pub digest: Option<String>,
    pub error: Option<String>,
    /// `error_kind` of the shim.
    pub error_kind: Option<String>,
    /// Answer to [`LoraOp::List`].
    pub adapters: Vec<LoraAdapter>,
}

impl LoraReport {
    /// Why this is not the answer that proves the request was carried out; `None` if it is.
    pub(super) fn fault(&self, request: &LoraRequest<'_>) -> Option<String> {
        let who = format!("worker {}: adapter {}: {}", self.rank, request.name, request.op);
        if !self.ok || self.state != LoraState::Applied {
            let kind = self.error_kind.as_deref().unwrap_or("unknown");
            let error = self.error.as_deref().unwrap_or("no reason given");
            return Some(format!("{who} failed ({kind}): {error}"));
        }
        let wanted = &request.source()?.checkpoint;
        if (self.tensors, self.bytes) != (wanted.tensors, wanted.bytes) {
            return Some(format!(
                "{who}: read {} tensors of {} bytes, expected {} of {}",
                self.tensors, self.bytes, wanted.tensors, wanted.bytes
            ));
        }
        match (&self.digest, &wanted.digest) {
            (Some(actual), Some(expected)) if actual != expected => {
                Some(format!("{who}: digest of what was read is {actual}, expected {expected}"))
            }
            _ => None,
        }
    }
}

/// Sends a request to all workers of a rank. The engine's caches are not reset by it.
///
/// # Errors
/// The engine did not answer within `limit`, or has no such method: the shim is missing or too old.
pub(super) async fn lora(
    rank: &RankHandle,
    request: &LoraRequest<'_>,
    limit: Duration,
) -> Result<Vec<LoraReport>, String> {
    let kwargs = map(vec![("request", encode(request))]);
    let answer = match worker_call(rank, "dp_sidecar_lora", kwargs, limit).await {
        Ok(answer) => answer,
        Err(HandleError::Failed(text)) if text.contains("dp_sidecar_lora") => {
            return Err("the shim in the engine's Python environment is missing or knows no adapters: install the dp-sidecar-shim that belongs to this sidecar and start the engine again".to_owned());
        }
        Err(error) => return Err(error.to_string()),
    };
    Ok(reports(&answer))
}

fn encode(request: &LoraRequest<'_>) -> Value {
    let mut entries = vec![
        ("protocol", PROTOCOL.into()),
        ("update_id", request.id.0.as_str().into()),
        ("op", request.op.to_string().into()),
        ("name", request.name.into()),
        ("id", adapter_id(request.name).into()),
    ];
    if let Some(adapter) = request.source() {
        entries.extend(source(&adapter.checkpoint));
        entries.push(("config", adapter.config.as_str().into()));
    }
    map(entries)
}

#[cfg(test)]
mod tests {
    use dp_sidecar_protocol::machine::weight_update::Checkpoint;

    use super::*;

    fn adapter() -> Adapter {
        let checkpoint = Checkpoint {
            path: "/adapters/style".to_owned(),
            files: vec!["adapter_model.safetensors".to_owned()],
            tensors: 4,
            bytes: 64,
            digest: Some("ab".to_owned()),
            ..Checkpoint::default()
        };
        Adapter { update: UpdateId("u".to_owned()), checkpoint, config: "{}".to_owned() }
    }

    fn request(op: LoraOp, adapter: &Adapter) -> LoraRequest<'_> {
        LoraRequest { id: &adapter.update, op, name: "style", adapter: Some(adapter) }
    }

    #[test]
    fn an_adapters_number_depends_on_its_name_alone_and_is_far_from_those_of_frontends() {
        assert_eq!(adapter_id("style"), adapter_id("style"));
        assert_ne!(adapter_id("style"), adapter_id("style2"));
        for name in ["", "a", "style", "a very long name with ümlauts"] {
            assert!((0x4000_0000..0x8000_0000).contains(&adapter_id(name)), "{name}");
        }
    }

    #[test]
    fn only_what_loads_says_what_to_load() {
        for op in [LoraOp::Check, LoraOp::Replace, LoraOp::Remove, LoraOp::Undo, LoraOp::List] {
            let map = encode(&request(op, &adapter()));
            assert_eq!(map["op"], Value::from(op.to_string()));
            assert_eq!(map["path"].as_str().is_some(), op.loads(), "{op:?}");
            assert_eq!(map["config"].as_str(), op.loads().then_some("{}"), "{op:?}");
        }
    }

    #[test]
    fn an_answer_that_makes_no_sense_is_no_success() {
        for nonsense in [
            Value::Nil,
            map(vec![("ok", Value::from(true))]),
            map(vec![("ok", Value::from("yes")), ("state", Value::from("applied"))]),
        ] {
            let report: LoraReport = reports(&Value::Array(vec![Value::Nil, nonsense.clone()])).remove(1);
            assert_eq!(report.rank, 1);
            assert!(report.fault(&request(LoraOp::Remove, &adapter())).is_some(), "{nonsense}");
        }
    }

    #[test]
    fn a_report_is_compared_with_what_was_to_be_loaded() {
        let good = LoraReport {
            ok: true,
            state: LoraState::Applied,
            tensors: 4,
            bytes: 64,
            digest: Some("ab".to_owned()),
            ..LoraReport::default()
        };
        assert_eq!(good.fault(&request(LoraOp::Replace, &adapter())), None);
        for bad in [
            LoraReport { tensors: 3, ..good.clone() },
            LoraReport { bytes: 63, ..good.clone() },
            LoraReport { digest: Some("cd".to_owned()), ..good.clone() },
            LoraReport { state: LoraState::Unchanged, ..good.clone() },
        ] {
            assert!(bad.fault(&request(LoraOp::Replace, &adapter())).is_some(), "{bad:?}");
        }
        let gone = LoraReport { tensors: 0, bytes: 0, digest: None, ..good };
        assert_eq!(gone.fault(&request(LoraOp::Remove, &adapter())), None);
    }
}
