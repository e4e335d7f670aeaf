//! What an engine's memory holds, as the calls that it was sent and their answers say.
//!
//! `sleep` of level 1 keeps the weights in the host's memory, level 2 discards them, and both give up the KV cache. It
//! pauses the scheduler first. `wake_up` brings parts back, by tags or all of them; when no part sleeps any more, vLLM
//! resumes the scheduler by itself. Weights that were discarded come back as memory of undefined content, and nothing in
//! vLLM says so (`vllm/v1/engine/core.py`, `vllm/v1/executor/abstract.py`, 0.32.0).
//!
//! Each rank's virtual engine, which survives the sidecar, follows its engine; the control machine does the same for
//! what it decides. Where it cannot be known, the worse is assumed.

use rmpv::Value;
use serde::{Deserialize, Serialize};

use super::mutation::{Mutation, mutated};
use super::policy::{Effect, Policy, Wake};

/// Whose weights they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weights {
    /// Those that the sidecar has brought, or that the engine has started with.
    #[default]
    Known,
    /// A frontend has changed them.
    External,
    /// Discarded, and nothing was loaded since: what the engine would answer is garbage.
    Gone,
}

/// Of one engine, in one life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    pub weights: Weights,
    /// The memory of the weights is given up: nothing can be loaded into it.
    pub weights_sleep: bool,
    /// The memory of the KV cache is given up: nothing can be computed.
    pub cache_sleeps: bool,
}

impl Memory {
    /// A part of it sleeps.
    pub const fn sleeps(&self) -> bool {
        self.weights_sleep || self.cache_sleeps
    }

    /// Nothing must be computed: a request would be answered with garbage.
    pub fn is_empty(&self) -> bool {
        self.weights == Weights::Gone && !mutated(Mutation::ServeWithoutWeights)
    }

    /// What it becomes by a wake that succeeds. vLLM ignores one that names a part which does not sleep.
    #[must_use]
    pub const fn woken(mut self, wake: Wake) -> Self {
        match wake {
            Wake::All => (self.weights_sleep, self.cache_sleeps) = (false, false),
            Wake::Only { weights, cache } => {
                if (self.weights_sleep || !weights) && (self.cache_sleeps || !cache) {
                    self.weights_sleep &= !weights;
                    self.cache_sleeps &= !cache;
                }
            }
        }
        self
    }

    /// A call is about to reach the engine.
    pub fn sent(&mut self, effect: Effect) {
        match effect {
            // Ignored by vLLM while the weights sleep; but a wake-up may be on its way.
            Effect::Sleep { discards } => {
                (self.weights_sleep, self.cache_sleeps) = (true, true);
                if discards {
                    self.weights = Weights::Gone;
                }
            }
            Effect::Weights { .. } | Effect::Stamp if self.weights == Weights::Known => {
                self.weights = Weights::External;
            }
            _ => {}
        }
    }

    /// The engine has answered a call of a frontend, or one of the sidecar that is not a load.
    pub fn answered(&mut self, effect: Effect, result: &Result<Value, String>) {
        if matches!(effect, Effect::Sleep { .. }) {
            // Answers to what was sent before it may have come meanwhile.
            return self.sent(effect);
        }
        let Ok(answer) = result else {
            return; // what it has done before it failed is unknown
        };
        match effect {
            // False: a part still sleeps. Older than 0.32.0: no answer.
            Effect::WakeUp(_) if *answer == Value::Boolean(true) => {
                (self.weights_sleep, self.cache_sleeps) = (false, false);
            }
            Effect::WakeUp(wake) => {
                let woken = self.woken(wake);
                // A part still sleeps, so that the call was ignored: less slept than was assumed.
                if woken.sleeps() || *answer != Value::Boolean(false) {
                    *self = woken;
                }
            }
            Effect::ReleaseCache => self.cache_sleeps = true,
            Effect::Weights { loads: true } if self.weights == Weights::Gone && !self.weights_sleep => {
                self.weights = Weights::External;
            }
            _ => {}
        }
    }

    /// The shim has answered to a load of the sidecar: one report for each worker.
    pub fn loaded(&mut self, answer: &Value) {
        let workers = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        let says = |worker: &Value, key: &str| {
            let entry = worker.as_map()?.iter().find(|(name, _)| name.as_str() == Some(key));
            entry.map(|(_, value)| value.clone())
        };
        let all =
            |key: &str, value: Value| workers.iter().all(|worker| says(worker, key).as_ref() == Some(&value));
        if !workers.is_empty() && all("ok", Value::Boolean(true)) {
            self.weights = Weights::Known;
        } else if workers.is_empty() || !all("state", Value::from("unchanged")) {
            // Half of them, or real tensors of undefined content.
            self.weights = Weights::Gone;
        }
    }
}

/// What a call of the sidecar's own does to an engine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnCall {
    /// Brings weights through the shim.
    Load,
    /// The same as the call of a frontend.
    Other(Effect),
}

impl OwnCall {
    /// None: it leaves the memory as it is.
    pub fn of(method: &str, args: &[Value]) -> Option<Self> {
        if method == "collective_rpc" {
            let load = args.first().and_then(Value::as_str) == Some("dp_sidecar_load");
            return load.then_some(Self::Load);
        }
        match Policy::of(method, args) {
            // The sidecar stamps what it has loaded.
            Policy::Control(Effect::Stamp) => None,
            Policy::Control(effect) => Some(Self::Other(effect)),
            Policy::Forward | Policy::Refuse(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(memory: &mut Memory, method: &str, args: &[Value], answer: Result<Value, String>) {
        let Some(OwnCall::Other(effect)) = OwnCall::of(method, args) else {
            panic!("{method} has no effect")
        };
        memory.sent(effect);
        memory.answered(effect, &answer);
    }

    fn tags(names: &[&str]) -> Vec<Value> {
        vec![Value::Array(names.iter().map(|name| Value::from(*name)).collect())]
    }

    #[test]
    fn level_1_keeps_the_weights_and_level_2_does_not() {
        for (level, weights) in [(1, Weights::Known), (2, Weights::Gone)] {
            let mut memory = Memory::default();
            call(&mut memory, "sleep", &[Value::from(level)], Ok(Value::Nil));
            assert_eq!(memory, Memory { weights, weights_sleep: true, cache_sleeps: true });
            call(&mut memory, "wake_up", &tags(&["weights"]), Ok(Value::from(false)));
            assert_eq!(memory, Memory { weights, weights_sleep: false, cache_sleeps: true });
            call(&mut memory, "wake_up", &tags(&["kv_cache"]), Ok(Value::from(true)));
            assert_eq!(memory, Memory { weights, ..Memory::default() }, "a wake brings no weights");
        }
        let mut memory = Memory::default();
        assert_eq!(OwnCall::of("sleep", &[Value::from(0)]), Some(OwnCall::Other(Effect::Pause)));
        call(&mut memory, "sleep", &[Value::from(0)], Ok(Value::Nil));
        assert_eq!(memory, Memory::default());
    }

    #[test]
    fn answers_to_earlier_calls_do_not_hide_a_later_sleep() {
        let sleep = Effect::Sleep { discards: true };
        let wake = Effect::WakeUp(Wake::Only { weights: true, cache: false });
        let mut memory = Memory::default();
        call(&mut memory, "sleep", &[Value::from(1)], Ok(Value::Nil));
        memory.sent(wake);
        memory.sent(sleep);
        memory.answered(wake, &Ok(Value::from(false)));
        memory.answered(Effect::Weights { loads: true }, &Ok(Value::Nil));
        memory.answered(sleep, &Ok(Value::Nil));
        assert_eq!(memory, Memory { weights: Weights::Gone, weights_sleep: true, cache_sleeps: true });
        memory.answered(sleep, &Err("failed".to_owned()));
        assert_eq!(memory.weights, Weights::Gone, "nobody knows what is left");
    }

    #[test]
    fn a_wake_that_names_what_does_not_sleep_is_ignored_as_vllm_ignores_it() {
        let mut memory = Memory::default();
        call(&mut memory, "sleep", &[], Ok(Value::Nil));
        let asleep = memory;
        for ignored in [tags(&["weights", "kv"]), tags(&["scheduling"]), tags(&[])] {
            call(&mut memory, "wake_up", &ignored, Ok(Value::from(false)));
            assert_eq!(memory, asleep, "{ignored:?}");
        }
        call(&mut memory, "wake_up", &tags(&["kv_cache"]), Ok(Value::from(false)));
        call(&mut memory, "wake_up", &tags(&["weights", "kv_cache"]), Ok(Value::from(false)));
        assert!(memory.weights_sleep && !memory.cache_sleeps);
        // This sleep is ignored, and so is the wake after it, which names the cache.
        call(&mut memory, "sleep", &[], Ok(Value::Nil));
        call(&mut memory, "wake_up", &tags(&["weights", "kv_cache"]), Ok(Value::from(false)));
        assert!(memory.weights_sleep);
    }

    #[test]
    fn only_a_load_into_memory_that_is_awake_brings_weights_back() {
        let reload = [Value::from("reload_weights")];
        let frontends = |memory: &mut Memory, args: &[Value], answer: Result<Value, String>| {
            let Policy::Control(effect) = Policy::of("collective_rpc", args) else { panic!("{args:?}") };
            memory.sent(effect);
            memory.answered(effect, &answer);
        };
        let mut memory = Memory::default();
        call(&mut memory, "sleep", &[Value::from(2)], Ok(Value::Nil));
        frontends(&mut memory, &reload, Ok(Value::Nil));
        assert_eq!(memory.weights, Weights::Gone, "asleep");
        call(&mut memory, "wake_up", &tags(&["weights"]), Ok(Value::from(false)));
        frontends(&mut memory, &reload, Err("no such file".to_owned()));
        frontends(&mut memory, &[Value::from("start_weight_update")], Ok(Value::Nil));
        frontends(&mut memory, &[Value::from("add_lora")], Ok(Value::Nil));
        assert_eq!(memory.weights, Weights::Gone, "nothing was loaded");
        frontends(&mut memory, &reload, Ok(Value::Nil));
        assert_eq!(memory.weights, Weights::External);
    }

    #[test]
    fn the_shims_reports_say_what_a_load_of_the_sidecar_has_left() {
        let report = |ok: bool, state: &str| {
            Value::Map(vec![("ok".into(), ok.into()), ("state".into(), state.into())])
        };
        let gone = Memory { weights: Weights::Gone, ..Memory::default() };
        for (reports, before, after) in [
            (vec![report(true, "loaded"), report(true, "loaded")], gone, Weights::Known),
            (vec![report(true, "loaded"), report(false, "restored-meta")], Memory::default(), Weights::Gone),
            (vec![report(false, "unchanged")], Memory::default(), Weights::Known),
            (vec![report(false, "unchanged")], gone, Weights::Gone),
            (vec![], Memory::default(), Weights::Gone),
        ] {
            let mut memory = before;
            memory.loaded(&Value::Array(reports.clone()));
            assert_eq!(memory.weights, after, "{reports:?}");
        }
    }
}
