//! Which calls a frontend may make, and which of them must be serialised with those of others.

/// What to do with a frontend's call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Pass it on: it reads, or resets a cache.
    Forward,
    /// It changes weights, schedule or memory of the engine: there is one controller at a time.
    Control,
    /// The engine, or its output thread, would not survive it.
    Refuse(&'static str),
}

/// Methods of the engine core that read, or drop caches (protocol of vLLM 0.11.0 to 0.33.0).
const READS: [&str; 12] = [
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
    "save_sharded_state",
];

/// Methods of the engine core that only one controller may call at a time.
const CONTROLS: [&str; 13] = [
    "add_lora",
    "commit_prepared_elastic_ep",
    // Enters the collectives of a lockstep group: on one rank alone it hangs.
    "execute_dummy_batch",
    "pause_generation",
    "pause_scheduler",
    "pin_lora",
    "reinitialize_distributed",
    "release_kv_cache_memory",
    "remove_lora",
    "resume_scheduler",
    "set_weight_version",
    "sleep",
    "wake_up",
];

/// Worker methods whose results no msgpack encoder takes (that ends the engine's output thread), or
/// that belong to the engine's own start and step.
const DEADLY_WORKER_METHODS: [&str; 20] = [
    "apply_model",
    "compile_or_warm_up_model",
    "determine_available_memory",
    "elastic_ep_execute",
    "execute_model",
    "get_draft_model",
    "get_kv_cache_spec",
    "get_kv_connector_handshake_metadata",
    "get_model",
    "get_supported_kv_cache_layouts",
    "handle_ft_command",
    "init_device",
    "init_worker",
    "initialize_from_config",
    "load_model",
    "sample_tokens",
    "shutdown",
    "take_draft_token_ids",
    "update_environment_variables",
    "wait_for_comm",
];

/// Parts of names of worker methods that change what the engine computes with. Trainers bring their
/// own methods (`update_weights_from_ipc`, `skyrl_start_weight_update` ...), hence parts.
const WEIGHTY: [&str; 11] = [
    "checkpoint",
    "config",
    "discard",
    "dp_sidecar_",
    "load",
    "lora",
    "sleep",
    "update",
    "wake",
    "weight",
    "execute_dummy_batch",
];

/// Worker methods that have such a part in their name and only read.
const HARMLESS: [&str; 3] = ["check_preloaded_libs", "compute_weight_checksums", "list_loras"];

impl Policy {
    /// For a call of `method`; `worker_method` is the first argument of `collective_rpc`.
    pub fn of(method: &str, worker_method: Option<&str>) -> Self {
        if method == "collective_rpc" {
            return worker_method
                .map_or(Self::Refuse("the worker method must be a name"), Self::of_worker_method);
        }
        if READS.contains(&method) {
            Self::Forward
        } else if CONTROLS.contains(&method) {
            Self::Control
        } else {
            Self::Refuse("not a call that frontends make")
        }
    }

    fn of_worker_method(name: &str) -> Self {
        if name.starts_with('_') {
            Self::Refuse("a private worker method")
        } else if DEADLY_WORKER_METHODS.contains(&name) {
            Self::Refuse("its result would end the engine's output thread, or it breaks the engine")
        } else if HARMLESS.contains(&name) {
            Self::Forward
        } else if WEIGHTY.iter().any(|part| name.contains(part)) {
            Self::Control
        } else {
            Self::Forward
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_weights_or_schedule_is_held_and_what_reads_passes() {
        for (method, worker_method, expected) in [
            ("get_supported_tasks", None, Policy::Forward),
            ("reset_mm_cache", None, Policy::Forward),
            ("pause_scheduler", None, Policy::Control),
            ("wake_up", None, Policy::Control),
            ("collective_rpc", Some("check_health"), Policy::Forward),
            ("collective_rpc", Some("reload_weights"), Policy::Control),
            ("collective_rpc", Some("update_weights_from_ipc"), Policy::Control),
            ("collective_rpc", Some("skyrl_start_weight_update"), Policy::Control),
            ("collective_rpc", Some("init_weight_transfer_engine"), Policy::Control),
            ("collective_rpc", Some("dp_sidecar_load"), Policy::Control),
            ("collective_rpc", Some("compute_weight_checksums"), Policy::Forward),
        ] {
            assert_eq!(Policy::of(method, worker_method), expected, "{method} {worker_method:?}");
        }
    }

    #[test]
    fn what_would_end_the_engine_is_refused() {
        for (method, worker_method) in [
            ("shutdown", None),
            ("_send_engine_dead", None),
            ("barrier", None),
            ("collective_rpc", Some("get_model")),
            ("collective_rpc", Some("__init__")),
            ("collective_rpc", None),
        ] {
            let policy = Policy::of(method, worker_method);
            assert!(matches!(policy, Policy::Refuse(_)), "{method} {worker_method:?}");
        }
    }
}
