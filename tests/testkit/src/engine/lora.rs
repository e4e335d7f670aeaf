//! LoRA adapters by name, as the shim keeps them (`dp_sidecar_lora` of `protocol/docs/weight-update.md`). What
//! a fake engine answers to a request that names one depends on the adapter's bytes, too.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use rmpv::Value;

use super::core::Engine;
use super::utility::SHIM_PROTOCOL;
use super::weights::{self, Hashing};
use crate::msg;

/// An adapter, and the update that brought it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Adapter {
    update: String,
    path: String,
    digest: String,
    config: String,
    number: u64,
}

/// All adapters of an engine.
#[derive(Debug, Default)]
pub(crate) struct Adapters {
    named: BTreeMap<String, Adapter>,
    /// Name -> update that touched it last, and what was there before.
    ways_back: BTreeMap<String, (String, Option<Adapter>)>,
}

type Refusal = (&'static str, String);

impl Adapters {
    /// What [`weights::tokens`] of a request with this adapter are made from. An adapter that only the
    /// frontend knows counts by its name.
    pub(crate) fn key(&self, name: &str) -> u64 {
        weights::digest_key(self.named.get(name).map_or(name, |adapter| adapter.digest.as_str()))
    }

    fn put(&mut self, name: &str, update: &str, adapter: Option<Adapter>) {
        let before = match adapter {
            Some(adapter) => self.named.insert(name.to_owned(), adapter),
            None => self.named.remove(name),
        };
        if self.ways_back.get(name).is_none_or(|(by, _)| by != update) {
            self.ways_back.insert(name.to_owned(), (update.to_owned(), before));
        }
    }
}

impl Engine {
    /// `dp_sidecar_lora`.
    pub(crate) fn lora(&mut self, request: &Value) -> Value {
        let began = Instant::now();
        let text = |key: &str| msg::text(request, key).unwrap_or_default();
        let (op, name, update) = (text("op"), text("name"), text("update_id"));
        let mut read = None;
        let done = self.change_adapters(request, &op, &name, &update, &mut read);
        let (kind, error) = match &done {
            Ok(()) => (Value::Nil, Value::Nil),
            Err((kind, error)) => (Value::from(*kind), Value::from(error.as_str())),
        };
        let listed = self.adapters.named.iter().filter(|_| op == "list").map(|(name, adapter)| {
            msg::map([
                ("name", Value::from(name.as_str())),
                ("update_id", Value::from(adapter.update.as_str())),
                ("path", Value::from(adapter.path.as_str())),
                ("digest", Value::from(adapter.digest.as_str())),
                ("ids", Value::Array(vec![adapter.number.into()])),
            ])
        });
        let ids = self.adapters.named.get(&name).map(|adapter| Value::from(adapter.number));
        let undo = self.adapters.ways_back.get(&name).is_some_and(|(by, _)| *by == update);
        let hashed = text("digest_kind") == "blake3";
        let loaded = read.as_ref();
        msg::map([
            ("ok", Value::from(done.is_ok())),
            ("protocol", Value::from(SHIM_PROTOCOL)),
            ("update_id", Value::from(update)),
            ("dp_rank", Value::from(self.options.rank)),
            ("rank", Value::from(0)),
            ("op", Value::from(op.as_str())),
            ("name", Value::from(name)),
            ("state", Value::from(if done.is_ok() { "applied" } else { "unchanged" })),
            ("ids", Value::Array(ids.into_iter().collect())),
            ("undo", Value::from(undo)),
            ("adapters", Value::Array(listed.collect())),
            ("tensors", Value::from(loaded.map_or(0, |loaded| loaded.tensors))),
            ("bytes", Value::from(loaded.map_or(0, |loaded| loaded.bytes))),
            ("digest", loaded.filter(|_| hashed).map_or(Value::Nil, |it| it.digest.as_str().into())),
            ("digest_kind", Value::from(if hashed { "blake3" } else { "none" })),
            ("ms", Value::from(began.elapsed().as_secs_f64() * 1000.0)),
            ("error", error),
            ("error_kind", kind),
        ])
    }

    fn change_adapters(
        &mut self,
        request: &Value,
        op: &str,
        name: &str,
        update: &str,
        read: &mut Option<weights::Loaded>,
    ) -> Result<(), Refusal> {
        let number = |key: &str| msg::get(request, key).and_then(Value::as_u64);
        if number("protocol") != Some(SHIM_PROTOCOL) {
            return Err(("protocol", format!("request {request}")));
        }
        if op != "list" && (name.is_empty() || number("id").is_none_or(|id| id == 0)) {
            return Err(("request", format!("request {request}")));
        }
        match op {
            "list" => {}
            "undo" => {
                if self.adapters.ways_back.get(name).is_some_and(|(by, _)| by == update)
                    && let Some((_, before)) = self.adapters.ways_back.remove(name)
                {
                    match before {
                        Some(adapter) => self.adapters.named.insert(name.to_owned(), adapter),
                        None => self.adapters.named.remove(name),
                    };
                }
            }
            "remove" => self.adapters.put(name, update, None),
            "check" | "replace" => {
                let adapter = self.read_adapter(request, update, read)?;
                if op != "check" {
                    self.adapters.put(name, update, Some(adapter));
                }
            }
            _ => return Err(("request", format!("op {op}"))),
        }
        Ok(())
    }

    fn read_adapter(
        &mut self,
        request: &Value,
        update: &str,
        read: &mut Option<weights::Loaded>,
    ) -> Result<Adapter, Refusal> {
        if self.faults.lora_fails {
            return Err(("load", "ordered fault: lora-fails".to_owned()));
        }
        let path = msg::text(request, "path").unwrap_or_default();
        let files = msg::texts(request, "files").unwrap_or_default();
        let config = msg::text(request, "config").ok_or_else(|| ("request", format!("request {request}")))?;
        let parts = weights::parts(Path::new(&path), &files, None);
        let loaded = parts
            .and_then(|parts| self.loader.load(&parts, Hashing::Whole))
            .map_err(|error| (error.kind, error.to_string()))?;
        *read = Some(loaded.clone());
        let number = |key: &str| msg::get(request, key).and_then(Value::as_u64);
        let wanted = msg::text(request, "digest");
        if (number("tensors"), number("bytes")) != (Some(loaded.tensors), Some(loaded.bytes))
            || wanted.is_some_and(|wanted| wanted != loaded.digest)
        {
            return Err((
                "mismatch",
                format!(
                    "read {} tensors of {} bytes, digest {}",
                    loaded.tensors, loaded.bytes, loaded.digest
                ),
            ));
        }
        let number = number("id").unwrap_or_default();
        Ok(Adapter { update: update.to_owned(), path, digest: loaded.digest, config, number })
    }
}
