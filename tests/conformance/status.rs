//! What tests read out of `sidecar status --json`.

use serde_json::Value;

/// A text of each engine, by rank.
fn of_engines(status: &Value, what: &str) -> Vec<String> {
    let engines = status["engines"].as_array().map(Vec::as_slice).unwrap_or_default();
    engines.iter().map(|engine| engine[what].as_str().unwrap_or_default().to_owned()).collect()
}

/// State of each engine, by rank.
pub(crate) fn states(status: &Value) -> Vec<String> {
    of_engines(status, "state")
}

/// State of a frontend's attachment.
pub(crate) fn frontend_state(status: &Value, address: &str) -> Option<String> {
    status["frontends"]
        .as_array()?
        .iter()
        .find(|frontend| frontend["attachment"]["address"] == address)
        .and_then(|frontend| frontend["attachment"]["state"].as_str())
        .map(str::to_owned)
}

/// Weight version of each engine, by rank.
pub(crate) fn weight_versions(status: &Value) -> Vec<String> {
    of_engines(status, "weight_version")
}
