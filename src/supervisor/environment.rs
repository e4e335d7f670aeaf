//! The environment of the vLLM processes: the sidecar's own, without what would mislead vLLM.

use std::collections::BTreeMap;

use super::procfs::{CHILD_MARKER, KEEPER_MARKER, RUN_MARKER};

/// Ranks of whatever launched the sidecar. torch would take them for its own.
const LAUNCHER_VARIABLES: &[&str] = &[
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
];
const LAUNCHER_PREFIXES: &[&str] = &["ROLE_", "TORCHELASTIC_"];
/// Offline data parallelism. vLLM reads these even without `--data-parallel-size`, so stale values
/// turn data parallelism on (`vllm/config/parallel.py` 0.32.0).
const OFFLINE_DP_PREFIX: &str = "VLLM_DP_";
/// Name of the shim among vLLM's plugins.
const PLUGIN: &str = "dp_sidecar";
/// Our own variables are no business of vLLM's.
const OWN_PREFIX: &str = "SIDECAR_";

/// The cleaned environment, and what became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CleanEnvironment {
    /// What vLLM gets.
    pub variables: BTreeMap<String, String>,
    /// What it does not get, and that somebody may miss.
    pub removed: Vec<String>,
    /// What `VLLM_PLUGINS` was, if the shim had to be added to it.
    pub plugins: Option<String>,
}

impl CleanEnvironment {
    /// What differs from the environment that was given, for people.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        let plugins = self.plugins.as_ref().map(|plugins| {
            format!(
                "VLLM_PLUGINS={plugins:?} leaves out {PLUGIN}, without which weights cannot be updated: added for engines \
                 and frontend"
            )
        });
        let removed =
            (!self.removed.is_empty()).then(|| format!("not passed on to vLLM: {}", self.removed.join(", ")));
        plugins.into_iter().chain(removed)
    }
}

pub fn clean(variables: impl IntoIterator<Item = (String, String)>) -> CleanEnvironment {
    let mut clean = CleanEnvironment::default();
    for (name, value) in variables {
        let own = name.starts_with(OWN_PREFIX)
            || [RUN_MARKER, CHILD_MARKER, KEEPER_MARKER].contains(&name.as_str());
        let misleading = LAUNCHER_VARIABLES.contains(&name.as_str())
            || LAUNCHER_PREFIXES
                .iter()
                .any(|prefix| name.starts_with(prefix))
            || name.starts_with(OFFLINE_DP_PREFIX)
            // Kubernetes makes VLLM_PORT=tcp://... for a service named `vllm`; vLLM refuses it.
            || (name == "VLLM_PORT" && value.contains("://"));
        if misleading {
            clean.removed.push(name);
        } else if !own {
            clean.variables.insert(name, value);
        }
    }
    clean.removed.sort();
    clean.plugins = add_plugin(&mut clean.variables);
    clean
}

/// Adds the shim to the plugins that vLLM is to load, if the list is given and leaves it out; gives what it was.
fn add_plugin(variables: &mut BTreeMap<String, String>) -> Option<String> {
    let plugins = variables.get_mut("VLLM_PLUGINS")?;
    // vLLM takes the names as they are between the commas.
    if plugins.split(',').any(|plugin| plugin == PLUGIN) {
        return None;
    }
    let separator = if plugins.is_empty() { "" } else { "," };
    let all = format!("{plugins}{separator}{PLUGIN}");
    Some(std::mem::replace(plugins, all))
}

/// The environment of this process. Variables that are not UTF-8 are left out.
pub fn own() -> Vec<(String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_mislead_vllm_is_taken_out_and_the_rest_passes() {
        let clean = clean(
            [
                ("PATH", "/bin"),
                ("VLLM_LOGGING_LEVEL", "DEBUG"),
                ("NCCL_DEBUG", "INFO"),
                ("VLLM_DP_RANK", "3"),
                ("VLLM_PORT", "tcp://10.0.0.1:8000"),
                ("RANK", "0"),
                ("TORCHELASTIC_RUN_ID", "x"),
                ("ROLE_RANK", "0"),
                ("SIDECAR_DP_RANK", "0"),
                ("DP_SIDECAR_RUN_ID", "old"),
                ("DP_SIDECAR_KEEPER", "1:2:/old"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        let kept: Vec<&str> = clean.variables.keys().map(String::as_str).collect();
        assert_eq!(kept, ["NCCL_DEBUG", "PATH", "VLLM_LOGGING_LEVEL"]);
        assert_eq!(clean.removed, ["RANK", "ROLE_RANK", "TORCHELASTIC_RUN_ID", "VLLM_DP_RANK", "VLLM_PORT"]);
    }

    #[test]
    fn a_numeric_vllm_port_passes() {
        let clean = clean([("VLLM_PORT".to_owned(), "9000".to_owned())]);
        assert_eq!(clean.variables["VLLM_PORT"], "9000");
    }
}
