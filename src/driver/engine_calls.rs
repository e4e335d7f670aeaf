//! Utility calls of the engine core that the control and update tasks make, with the differences
//! between vLLM versions (method table: `protocol/docs/weight-update.md`).

use std::time::Duration;

use dp_sidecar_protocol::machine::policy::has_binary;
use dp_sidecar_protocol::machine::weight_update::PauseMode;
use rmpv::Value;

use super::handles::{CallResult, HandleError, RankHandle};

/// Methods that the control task and the update task call, besides those of the shim.
const OWN: [&str; 12] = [
    "get_weight_version",
    "is_scheduler_paused",
    "is_sleeping",
    "pause_generation",
    "pause_scheduler",
    "reset_encoder_cache",
    "reset_prefix_cache",
    "resume_generation",
    "resume_scheduler",
    "set_weight_version",
    "sleep",
    "wake_up",
];

/// Whether the sidecar makes such calls. Any other has come over a link from somebody who knows the deployment's secret
/// and is no sidecar: workers of vLLM unpickle bytes, and have methods that run what they are given.
pub(crate) fn is_own(method: &str, args: &[Value]) -> bool {
    if method != "collective_rpc" {
        return OWN.contains(&method);
    }
    let of_shim = args.first().and_then(Value::as_str).is_some_and(|name| name.starts_with("dp_sidecar_"));
    of_shim && !args.iter().any(has_binary)
}

/// vLLM's answer to a method it does not have: `AttributeError` of `getattr(engine_core, method)`
/// (`vllm/v1/engine/core.py` 0.32.0, `_handle_client_request`).
pub(crate) fn is_unknown_method(error: &HandleError) -> bool {
    matches!(error, HandleError::Failed(text) if text.contains("has no attribute"))
}

/// Calls the first of several names of a method that the engine has.
async fn call_any(rank: &RankHandle, methods: &[&str], args: &[Value], limit: Duration) -> CallResult {
    let mut last = HandleError::failed("no method to call");
    for method in methods {
        match rank.call(method, args.to_vec(), limit).await {
            Err(error) if is_unknown_method(&error) => last = error,
            answer => return answer,
        }
    }
    Err(last)
}

/// Pauses one rank: `pause_scheduler` (0.17.1 to 0.32), `pause_generation` (0.33). Of a lockstep group all
/// ranks must be called at the same time.
pub(crate) async fn pause(
    rank: &RankHandle,
    mode: PauseMode,
    clear_cache: bool,
    limit: Duration,
) -> CallResult {
    let args = [Value::from(mode.as_str()), Value::Boolean(clear_cache)];
    call_any(rank, &["pause_scheduler", "pause_generation"], &args, limit).await
}

/// Resumes one rank. Of a lockstep group all ranks must be called at the same time, and only when they
/// are paused.
pub(crate) async fn resume(rank: &RankHandle, limit: Duration) -> CallResult {
    call_any(rank, &["resume_scheduler", "resume_generation"], &[], limit).await
}

/// Puts one rank to sleep that is paused: what it still has is kept. Of a lockstep group all ranks must be called at the
/// same time.
pub(crate) async fn sleep(rank: &RankHandle, level: u8, limit: Duration) -> CallResult {
    let args = [Value::from(level), Value::from(PauseMode::Keep.as_str())];
    match rank.call("sleep", args.to_vec(), limit).await {
        // (level) alone before 0.16.0.
        Err(HandleError::Failed(text)) if is_about_arguments(&text) => {
            rank.call("sleep", args[..1].to_vec(), limit).await
        }
        answer => answer,
    }
}

/// Wakes up one rank. Of a lockstep group all ranks must be called at the same time.
pub(crate) async fn wake_up(rank: &RankHandle, args: &[Value], limit: Duration) -> CallResult {
    rank.call("wake_up", args.to_vec(), limit).await
}

/// Calls a method of the shim in all workers of a rank.
pub(crate) async fn worker_call(
    rank: &RankHandle,
    method: &str,
    kwargs: Value,
    limit: Duration,
) -> CallResult {
    let args = vec![Value::from(method), Value::Nil, Value::Array(Vec::new()), kwargs];
    rank.call("collective_rpc", args, limit).await
}

/// Resets prefix, multi-modal and encoder caches. `Ok(false)`: blocks are in use, or an external KV
/// connector did not reset.
///
/// `connector_answers`: the engine tells a connector that is not there from one that failed (0.32.0 and
/// later); for older ones the prefix cache alone decides when both together say no.
pub(crate) async fn reset_caches(
    rank: &RankHandle,
    reset_running_requests: bool,
    connector_answers: bool,
    limit: Duration,
) -> Result<bool, HandleError> {
    let running = Value::Boolean(reset_running_requests);
    // (running, connector) since 0.13.0, (running) since 0.12.0, () before.
    let all = [running, Value::Boolean(true)];
    let mut answer = Err(HandleError::failed("reset_prefix_cache was not called"));
    for count in [2, 1, 0] {
        if count == 0 && reset_running_requests {
            break;
        }
        answer = rank.call("reset_prefix_cache", all[..count].to_vec(), limit).await;
        match &answer {
            Ok(Value::Boolean(false)) if count == 2 && !connector_answers => {}
            Err(HandleError::Failed(text)) if is_about_arguments(text) => {}
            _ => break,
        }
    }
    if matches!(answer?, Value::Boolean(false)) {
        return Ok(false);
    }
    // Not `reset_mm_cache`: it holds inputs, which no weights are in, and a frontend that mirrors it (`vllm/multimodal/cache`,
    // with one engine) would go on to send hashes alone.
    match rank.call("reset_encoder_cache", Vec::new(), limit).await {
        Err(error) if !is_unknown_method(&error) => Err(error),
        _ => Ok(true),
    }
}

/// Python's complaint, or the assertion `len(args) <= number of parameters` of vLLM, which has no text.
fn is_about_arguments(text: &str) -> bool {
    text.contains("argument") || text.trim_end().ends_with("failed:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_calls_that_the_sidecar_makes_itself_are_its_own() {
        let rpc = |name: &str, kwargs: Value| vec![name.into(), Value::Nil, Value::Array(Vec::new()), kwargs];
        let request = |value: Value| Value::Map(vec![("request".into(), Value::Array(vec![value]))]);
        let bytes = Value::Binary(b"cos\nsystem".to_vec());
        for (method, args, own) in [
            ("pause_scheduler", vec!["keep".into()], true),
            ("collective_rpc", rpc("dp_sidecar_load", request("a".into())), true),
            ("collective_rpc", rpc("dp_sidecar_load", request(bytes.clone())), false),
            ("collective_rpc", rpc("dp_sidecar_load", request(Value::Ext(1, vec![]))), false),
            ("collective_rpc", rpc("execute_method", request("a".into())), false),
            ("collective_rpc", vec![bytes], false),
            ("collective_rpc", Vec::new(), false),
            ("shutdown", Vec::new(), false),
        ] {
            assert_eq!(is_own(method, &args), own, "{method} {args:?}");
        }
    }
}
