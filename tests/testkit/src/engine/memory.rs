//! What `sleep` and `wake_up` do to an engine's memory, as vLLM 0.32.0 does it.
//!
//! The executor knows which tags sleep (`vllm/v1/executor/abstract.py`), the worker's allocator what memory is there
//! (`vllm/device_allocator/cumem.py`); a worker method that is called directly changes the second without the first.

use std::collections::BTreeSet;

use rmpv::Value;

use super::EngineEnd;
use super::core::Engine;
use crate::msg;

const TAGS: [&str; 2] = ["weights", "kv_cache"];

#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// `Executor.sleeping_tags`.
    sleeping: BTreeSet<&'static str>,
    /// Memory that is not there.
    unmapped: BTreeSet<&'static str>,
    /// How often weights were discarded: no two pieces of garbage are alike.
    discarded: u32,
}

impl Memory {
    /// `Executor.is_sleeping`.
    pub(crate) fn is_sleeping(&self) -> bool {
        !self.sleeping.is_empty()
    }

    /// `Executor.wake_up`. The tags that are woken up.
    fn wake(&mut self, tags: Option<&[String]>) -> Vec<&'static str> {
        let wanted = |tag: &&'static str| tags.is_none_or(|tags| tags.iter().any(|wanted| wanted == tag));
        let unknown = |tags: &[String]| tags.iter().any(|tag| !self.sleeping.contains(tag.as_str()));
        if !self.is_sleeping() || tags.is_some_and(unknown) {
            return Vec::new(); // a warning in vLLM's log
        }
        let woken: Vec<&'static str> = TAGS.into_iter().filter(wanted).collect();
        self.sleeping.retain(|tag| !woken.contains(tag));
        woken
    }
}

/// The tags of `wake_up(tags)`; none: all.
pub(crate) fn tags(value: Option<&Value>) -> Option<Vec<String>> {
    let tags = value.and_then(Value::as_array)?;
    Some(tags.iter().filter_map(|tag| tag.as_str().map(str::to_owned)).collect())
}

impl Engine {
    /// `Executor.sleep`.
    pub(crate) fn fall_asleep(&mut self, level: u64) {
        if self.memory.sleeping.contains("weights") {
            return; // "Executor is already sleeping."
        }
        self.worker_sleep(level);
        self.memory.sleeping.extend(TAGS);
    }

    /// `Worker.sleep`.
    pub(crate) fn worker_sleep(&mut self, level: u64) {
        self.memory.unmapped.extend(TAGS);
        if level > 1 {
            self.memory.discarded += 1;
            let garbage = format!("garbage {} of rank {}", self.memory.discarded, self.options.rank);
            self.set_digest(garbage);
        }
    }

    /// `EngineCore.wake_up`, without the resume: whether all memory is there again, as the executor knows.
    pub(crate) fn wake(&mut self, tags: Option<Vec<String>>) -> bool {
        let tags = tags.map(|tags| tags.into_iter().filter(|tag| tag != "scheduling").collect::<Vec<_>>());
        if tags.as_ref().is_none_or(|tags| !tags.is_empty()) {
            for woken in self.memory.wake(tags.as_deref()) {
                self.memory.unmapped.remove(woken);
            }
        }
        !self.memory.is_sleeping()
    }

    /// `Worker.wake_up`.
    pub(crate) fn worker_wake(&mut self, tags: Option<Vec<String>>) {
        self.memory
            .unmapped
            .retain(|tag| tags.as_ref().is_some_and(|tags| !tags.iter().any(|woken| woken == tag)));
    }

    /// `EngineCore.release_kv_cache_memory`.
    pub(crate) fn release_cache(&mut self, paused: bool) -> Result<Value, String> {
        if !paused || self.scheduler.has_requests() {
            return Err("release_kv_cache_memory() requires a completed pause first".to_owned());
        }
        if self.memory.is_sleeping() {
            return Err("release_kv_cache_memory() requires all memory to be resident".to_owned());
        }
        self.memory.sleeping.insert("kv_cache");
        self.memory.unmapped.insert("kv_cache");
        Ok(Value::Nil)
    }

    /// Whoever touches memory that is not there ends the worker, and it the engine.
    pub(crate) fn touch(&self, what: &str, tags: &[&str]) -> Result<(), EngineEnd> {
        match tags.iter().find(|tag| self.memory.unmapped.contains(**tag)) {
            Some(tag) => Err(EngineEnd::Core(format!(
                "CUDA error: an illegal memory access was encountered ({what} while {tag} sleeps)"
            ))),
            None => Ok(()),
        }
    }

    /// A call of a worker method of this name that changes memory; none: another method.
    pub(crate) fn worker_memory(&mut self, method: &str, args: Option<&Value>, kwargs: &Value) -> bool {
        let first = args.and_then(Value::as_array).and_then(|args| args.first());
        match method {
            "sleep" => {
                let level = msg::get(kwargs, "level").or(first).and_then(Value::as_u64);
                self.worker_sleep(level.unwrap_or(1));
            }
            "wake_up" => self.worker_wake(tags(msg::get(kwargs, "tags").or(first))),
            _ => return false,
        }
        true
    }
}
