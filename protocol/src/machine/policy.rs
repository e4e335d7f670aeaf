//! Which calls a frontend may make, which of them must be serialised with those of others, and what
//! those do to the engines.
//!
//! What is known to read is passed on. A worker method that nobody here knows (trainers bring their own:
//! `update_weights_from_ipc`, `skyrl_start_weight_update` ...) counts as one that changes weights.
//! `protocol/tests/worker_methods.txt` says it for each public worker method of vLLM.

use rmpv::Value;

/// What to do with a frontend's call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Pass it on: it reads, or resets a cache.
    Forward,
    /// It changes weights, schedule or memory of the engine: there is one controller at a time.
    Control(Effect),
    /// The engine, or its output thread, would not survive it, or it does what a frontend must not.
    /// Why, and what to call instead.
    Refuse(String),
}

/// What a control call does, when it succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Level 0 of `sleep` is one, too.
    Pause,
    Resume,
    Sleep {
        /// From level 2 on: the weights are gone, and `wake_up` brings back memory without them.
        discards: bool,
    },
    WakeUp(Wake),
    /// The memory of the KV cache sleeps afterwards.
    ReleaseCache,
    /// Afterwards nobody but the caller knows which weights the engines hold.
    Weights {
        /// It may have brought all of them, so that it counts as a load where there were none.
        loads: bool,
    },
    /// As `Weights`, but of the label alone.
    Stamp,
    /// Nothing of this, but one controller at a time makes it.
    Other,
}

impl Effect {
    /// Of a call that is made, by whomever.
    pub fn of(method: &str, args: &[Value]) -> Self {
        match Policy::of(method, args) {
            Policy::Control(effect) => effect,
            Policy::Forward | Policy::Refuse(_) => Self::Other,
        }
    }
}

/// What a `wake_up` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Whatever sleeps.
    All,
    /// These parts. None of them: it resumes the scheduler, if nothing sleeps; a tag that means nothing counts as none,
    /// since vLLM ignores a call that has one.
    Only { weights: bool, cache: bool },
}

impl Wake {
    /// The KV cache is asked for.
    pub const fn asks_for_cache(self) -> bool {
        matches!(self, Self::All | Self::Only { cache: true, .. })
    }

    /// The tags of its arguments (`EngineCore.wake_up(tags)`, vllm/v1/engine/core.py).
    pub fn of(args: &[Value]) -> Self {
        let Some(tags) = args.first().filter(|tags| !tags.is_nil()) else {
            return Self::All;
        };
        let names = tags.as_array().map(Vec::as_slice).unwrap_or_default();
        let names: Vec<&str> = names.iter().map(|tag| tag.as_str().unwrap_or_default()).collect();
        let known = names.iter().all(|name| ["weights", "kv_cache", "scheduling"].contains(name));
        Self::Only {
            weights: known && names.contains(&"weights"),
            cache: known && names.contains(&"kv_cache"),
        }
    }
}

/// Methods of the engine core that read, or drop caches (protocol of vLLM 0.11.0 to 0.33.0).
const READS: [&str; 11] = [
    "compute_weight_checksums",
    "get_kv_cache_group_metadata",
    "get_supported_tasks",
    "get_weight_version",
    "is_scheduler_paused",
    "is_sleeping",
    "list_loras",
    "profile",
    "reset_encoder_cache",
    "reset_mm_cache",
    "reset_prefix_cache",
];

/// Methods of the engine core that only one controller may call at a time.
const CONTROLS: [(&str, Effect); 11] = [
    ("add_lora", Effect::Other),
    ("commit_prepared_elastic_ep", Effect::Other),
    // Enters the collectives of a lockstep group: on one rank alone it hangs.
    ("execute_dummy_batch", Effect::Other),
    ("pause_generation", Effect::Pause),
    ("pause_scheduler", Effect::Pause),
    ("pin_lora", Effect::Other),
    ("reinitialize_distributed", Effect::Other),
    ("release_kv_cache_memory", Effect::ReleaseCache),
    ("remove_lora", Effect::Other),
    ("resume_scheduler", Effect::Resume),
    ("set_weight_version", Effect::Stamp),
];

/// Worker methods that read, or drop caches, and whose results msgpack can hold.
const WORKER_READS: [&str; 14] = [
    "check_health",
    "compute_weight_checksums",
    "dp_sidecar_info",
    "get_cache_block_size_bytes",
    "get_compilation_match_table",
    "get_encoder_timing_stats",
    "get_model_inspection",
    "get_supported_tasks",
    "list_loras",
    "profile",
    "reset_encoder_cache",
    "reset_mm_cache",
    "supports_draft_weight_updates",
    "synchronize_device",
];

/// Worker methods that all ranks must enter together, and that leave the weights as they are.
const WORKER_CONTROLS: [&str; 3] =
    ["execute_dummy_batch", "init_weight_transfer_engine", "shutdown_weight_transfer_engine"];

/// Worker methods that change something about the weights, and bring none.
const WORKER_NO_LOADS: [&str; 10] = [
    "add_lora",
    "checkpoint_prepare",
    "pin_lora",
    "randomize_dummy_inputs",
    "remove_lora",
    "reset_weights",
    "start_draft_weight_update",
    "start_weight_update",
    "update_config",
    "vocab_size",
];

const UNSERIALIZABLE: &str = "its result cannot be sent, which ends the engine's output thread; get_model_inspection describes the model";
const START: &str = "it belongs to the engine's start, step or end, which are not a frontend's";
const UNPICKLES: &str =
    "it makes a worker unpickle or run what it is given; call the method itself by its name";
const AROUND: &str = "it goes around the engine, which would compute in memory that is not there; call the engine's \
                      own sleep or wake_up (`POST /sleep`, `POST /wake_up`)";
const WRITES: &str = "it writes files of the engine's host where a frontend says; export from the checkpoint, \
                      whose directory `sidecar status` names";

/// Worker methods that are never passed on, with the reason.
const WORKER_REFUSED: [(&str, &str); 35] = [
    ("adjust_rank", START),
    ("annotate_profile", UNSERIALIZABLE),
    ("apply_model", UNPICKLES),
    ("compile_or_warm_up_model", START),
    ("determine_available_memory", START),
    ("discard", AROUND),
    ("elastic_ep_execute", START),
    ("execute_method", UNPICKLES),
    ("execute_model", START),
    ("execute_model_ray", START),
    ("get_draft_model", UNSERIALIZABLE),
    ("get_kv_cache_spec", UNSERIALIZABLE),
    ("get_kv_connector_handshake_metadata", UNSERIALIZABLE),
    ("get_model", UNSERIALIZABLE),
    ("get_node_and_physical_gpu_ids", START),
    ("get_node_ip", START),
    ("get_supported_kv_cache_layouts", START),
    ("handle_ft_command", START),
    ("init_device", START),
    ("init_worker", START),
    ("initialize_from_config", START),
    ("load_model", "it belongs to the engine's start; reload_weights loads weights into a running engine"),
    ("release_late_interaction_query_cache", START),
    ("sample_tokens", START),
    ("save_sharded_state", WRITES),
    ("save_tensorized_model", WRITES),
    ("set_kv_cache_layout", START),
    ("setup_device_if_necessary", START),
    ("shutdown", START),
    ("sleep", AROUND),
    ("sleep_mode_backend", UNSERIALIZABLE),
    ("take_draft_token_ids", START),
    ("update_environment_variables", START),
    ("update_max_model_len", START),
    ("wake_up", AROUND),
];

impl Policy {
    /// For a call of `method` with these positional arguments.
    pub fn of(method: &str, args: &[Value]) -> Self {
        if method == "collective_rpc" {
            return Self::of_collective_rpc(args);
        }
        if method == "sleep" {
            // `EngineCore.sleep(level=1, mode)`, vllm/v1/engine/core.py.
            let level = args.first().map_or(Some(1), Value::as_i64);
            return Self::Control(match level {
                Some(level) if level < 1 => Effect::Pause,
                level => Effect::Sleep { discards: level.is_none_or(|level| level > 1) },
            });
        }
        if method == "wake_up" {
            return Self::Control(Effect::WakeUp(Wake::of(args)));
        }
        if READS.contains(&method) {
            Self::Forward
        } else if let Some((_, effect)) = CONTROLS.iter().find(|(name, _)| *name == method) {
            Self::Control(*effect)
        } else if method == "save_sharded_state" {
            Self::Refuse(WRITES.to_owned())
        } else {
            Self::Refuse(
                "not a call that frontends make; worker methods are called through collective_rpc".to_owned(),
            )
        }
    }

    fn of_collective_rpc(args: &[Value]) -> Self {
        let Some(name) = args.first().and_then(Value::as_str) else {
            return Self::Refuse("the worker method must be a name".to_owned());
        };
        let refuse = |reason: &str| Self::Refuse(format!("worker method {}: {reason}", shortened(name)));
        if name.starts_with('_') {
            refuse("it is private; call a public one")
        } else if let Some((_, reason)) = WORKER_REFUSED.iter().find(|(refused, _)| *refused == name) {
            refuse(reason)
        } else if args.iter().any(has_binary) {
            // The trainers known (TRL, AReaL, SkyRL, prime-rl) send names, numbers and text, and vLLM's own client
            // sends IPC handles as base64 (`vllm/distributed/weight_transfer/clients.py`, 0.32.0).
            refuse("binary in its arguments, which a worker may unpickle; send text, for example base64")
        } else if WORKER_READS.contains(&name) {
            Self::Forward
        } else if WORKER_CONTROLS.contains(&name) {
            Self::Control(Effect::Other)
        } else {
            Self::Control(Effect::Weights { loads: !WORKER_NO_LOADS.contains(&name) })
        }
    }
}

/// Whether bytes or an extension are in it, at any depth. Nesting has a bound already, set by
/// `check_frontend_message`.
pub fn has_binary(value: &Value) -> bool {
    match value {
        Value::Binary(_) | Value::Ext(..) => true,
        Value::Array(items) => items.iter().any(has_binary),
        Value::Map(entries) => entries.iter().any(|(key, value)| has_binary(key) || has_binary(value)),
        _ => false,
    }
}

fn shortened(name: &str) -> String {
    name.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(name: &str) -> Policy {
        Policy::of("collective_rpc", &[Value::from(name)])
    }

    #[test]
    fn what_changes_weights_or_schedule_is_held_and_what_reads_passes() {
        assert_eq!(Policy::of("get_supported_tasks", &[]), Policy::Forward);
        assert_eq!(Policy::of("reset_mm_cache", &[]), Policy::Forward);
        assert_eq!(Policy::of("pause_scheduler", &[]), Policy::Control(Effect::Pause));
        assert_eq!(Policy::of("wake_up", &[]), Policy::Control(Effect::WakeUp(Wake::All)));
    }

    #[test]
    fn each_public_worker_method_of_vllm_is_as_listed() {
        let mut listed = 0;
        for line in include_str!("../../tests/worker_methods.txt").lines() {
            let Some((name, expected)) = line.split_once(' ').filter(|(name, _)| *name != "#") else {
                continue;
            };
            listed += 1;
            let found = match worker(name) {
                Policy::Forward => "forward",
                Policy::Control(Effect::Weights { .. }) => "weights",
                Policy::Control(_) => "control",
                Policy::Refuse(_) => "refuse",
            };
            assert_eq!(found, expected, "{name}");
        }
        assert!(listed > 60, "{listed}");
    }

    #[test]
    fn a_worker_method_that_nobody_knows_counts_as_one_that_changes_weights() {
        for name in [
            "update_weights_from_ipc",
            "skyrl_start_weight_update",
            "load_lora_from_tensors",
            "areal_injected",
            "receive",
            "dp_sidecar_load",
        ] {
            assert_eq!(worker(name), Policy::Control(Effect::Weights { loads: true }), "{name}");
        }
    }

    #[test]
    fn what_would_end_the_engine_or_write_or_unpickle_is_refused_by_name() {
        for method in ["shutdown", "_send_engine_dead", "barrier", "save_sharded_state"] {
            assert!(matches!(Policy::of(method, &[]), Policy::Refuse(_)), "{method}");
        }
        assert!(matches!(Policy::of("collective_rpc", &[]), Policy::Refuse(_)));
        for name in [
            "get_model",
            "__init__",
            "annotate_profile",
            "execute_method",
            "save_sharded_state",
            "execute_model",
        ] {
            let Policy::Refuse(reason) = worker(name) else { panic!("{name} passes") };
            assert!(reason.contains(name), "{reason}");
        }
    }

    #[test]
    fn binary_in_the_arguments_of_a_worker_method_is_refused_at_any_depth() {
        for binary in [Value::Binary(b"\x80\x04N.".to_vec()), Value::Ext(2, vec![0x80])] {
            let kwargs = Value::Map(vec![(Value::from("info"), Value::Array(vec![binary]))]);
            for name in ["check_health", "update_weights", "own_load"] {
                let args = [Value::from(name), Value::Nil, Value::Array(Vec::new()), kwargs.clone()];
                assert!(matches!(Policy::of("collective_rpc", &args), Policy::Refuse(_)), "{name}");
            }
        }
    }
}
