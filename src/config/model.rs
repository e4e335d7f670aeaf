//! Whether a model is a mixture of experts, judged as vLLM does: by the number of experts in its
//! configuration (`ModelConfig.is_moe` in `vllm/config/model.py`, `get_num_experts` in
//! `vllm/transformers_utils/model_arch_config_convertor.py`, 0.32.0).

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

use dp_sidecar_protocol::GroupKind;

use crate::files;

/// Keys that may hold the number of experts; the first that is present counts, even if it is null.
const EXPERT_KEYS: &[&str] = &["num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts"];

/// Where multimodal models keep the configuration of their language model.
const TEXT_CONFIG_KEYS: &[&str] =
    &["text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator"];

/// The kind of a model cannot be told.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ModelError {
    /// Neither a directory nor the name of a model in the cache.
    #[error(
        "model {model}: no such directory, and not in the Hugging Face cache {}; \
         give --model-kind dense or --model-kind moe", cache.display()
    )]
    NotFound { model: String, cache: PathBuf },
    /// Nor can it be fetched.
    #[error(
        "model {model}: no such directory, not in the Hugging Face cache {}, and its configuration cannot be \
         fetched: {reason}; is the name right, and does HF_TOKEN give access? Or give --model-kind dense or \
         --model-kind moe", cache.display()
    )]
    NotFetched { model: String, cache: PathBuf, reason: String },
    /// The directory has no readable configuration.
    #[error(
        "model {model}: {}: {detail}; give --model-kind dense or --model-kind moe", file.display()
    )]
    Unreadable { model: String, file: PathBuf, detail: String },
    /// Its type says mixture of experts, its figures do not.
    #[error(
        "model {model}: its model_type {model_type:?} suggests a mixture of experts, but its \
         config.json gives no number of experts; give --model-kind dense or --model-kind moe"
    )]
    Doubtful { model: String, model_type: String },
}

/// Finds the kind of a model: a directory, or a name in the Hugging Face cache.
pub fn kind_of(model: &str, revision: Option<&str>, cache: &Path) -> Result<GroupKind, ModelError> {
    let directory = directory_of(model, revision, cache)
        .ok_or_else(|| ModelError::NotFound { model: model.to_owned(), cache: cache.to_owned() })?;
    let file = directory.join("config.json");
    // Mistral's own format has no config.json.
    let mistral = directory.join("params.json");
    let (file, mistral) = if !file.exists() && mistral.exists() { (mistral, true) } else { (file, false) };
    let unreadable =
        |detail: String| ModelError::Unreadable { model: model.to_owned(), file: file.clone(), detail };
    let text = files::read_regular(&file).map_err(|error| unreadable(error.to_string()))?;
    let config: Value = serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string()))?;
    if !config.is_object() {
        return Err(unreadable("expected an object".to_owned()));
    }
    if mistral {
        let has_experts = config.get("moe").is_some_and(|moe| !moe.is_null());
        return Ok(GroupKind::of(has_experts));
    }
    let text_config = text_config(&config);
    match experts(text_config) {
        Some(count) => Ok(GroupKind::of(count > 0)),
        None => {
            let model_type = |config: &Value| {
                config.get("model_type").and_then(Value::as_str).unwrap_or_default().to_owned()
            };
            let doubtful =
                [model_type(text_config), model_type(&config)].into_iter().find(|name| name.contains("moe"));
            match doubtful {
                Some(model_type) => Err(ModelError::Doubtful { model: model.to_owned(), model_type }),
                None => Ok(GroupKind::Independent),
            }
        }
    }
}

/// Where a model's files are: its directory, or that of the name in the Hugging Face cache.
pub fn directory_of(model: &str, revision: Option<&str>, cache: &Path) -> Option<PathBuf> {
    let directory = Path::new(model);
    if directory.is_dir() { Some(directory.to_owned()) } else { snapshot(model, revision, cache) }
}

/// The language model's part of a configuration.
fn text_config(config: &Value) -> &Value {
    TEXT_CONFIG_KEYS
        .iter()
        .find_map(|key| config.get(key).filter(|part| part.is_object()))
        .map_or(config, text_config)
}

/// Number of experts; `None` if the configuration does not speak of experts at all.
fn experts(config: &Value) -> Option<u64> {
    let named = EXPERT_KEYS.iter().find_map(|key| config.get(key));
    let count = match named {
        // One number per layer; vLLM takes the first.
        Some(Value::Array(counts)) => counts.first().and_then(Value::as_u64).unwrap_or(0),
        Some(value) => value.as_u64().unwrap_or(0),
        None => 0,
    };
    if count > 0 {
        return Some(count);
    }
    let blocks = config.get("block_configs").and_then(Value::as_array);
    let in_blocks = blocks.and_then(|blocks| {
        blocks
            .iter()
            .filter(|block| block.get("block_type").and_then(Value::as_str) == Some("moe"))
            .filter_map(|block| block.get("n_routed_experts")?.as_u64())
            .max()
    });
    in_blocks.or_else(|| named.map(|_| 0))
}

/// The directory of a model in the Hugging Face cache.
fn snapshot(model: &str, revision: Option<&str>, cache: &Path) -> Option<PathBuf> {
    let folder = cache.join(format!("models--{}", model.replace('/', "--")));
    let revision = revision.unwrap_or("main");
    let commit = fs::read_to_string(folder.join("refs").join(revision))
        .map_or_else(|_| revision.to_owned(), |text| text.trim().to_owned());
    let path = folder.join("snapshots").join(commit);
    path.is_dir().then_some(path)
}

/// Where the Hugging Face cache is, by the variables that `huggingface_hub` reads.
pub fn cache_path(variable: impl Fn(&str) -> Option<String>) -> PathBuf {
    let get = |name: &str| variable(name).filter(|value| !value.is_empty());
    if let Some(hub) = get("HF_HUB_CACHE").or_else(|| get("HUGGINGFACE_HUB_CACHE")) {
        return hub.into();
    }
    if let Some(home) = get("HF_HOME") {
        return Path::new(&home).join("hub");
    }
    let cache = get("XDG_CACHE_HOME").map_or_else(
        || Path::new(&get("HOME").unwrap_or_else(|| "/".to_owned())).join(".cache"),
        PathBuf::from,
    );
    cache.join("huggingface/hub")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(config: &str) -> Result<GroupKind, ModelError> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        kind_of(dir.path().to_str().unwrap(), None, Path::new("/nowhere"))
    }

    #[test]
    fn the_number_of_experts_decides() {
        use GroupKind::{Independent, Lockstep};
        for (config, expected) in [
            (r#"{"model_type":"llama"}"#, Independent),
            (r#"{"model_type":"qwen3_moe","num_experts":4}"#, Lockstep),
            (r#"{"n_routed_experts":64}"#, Lockstep),
            (r#"{"n_routed_experts":null}"#, Independent),
            (r#"{"num_local_experts":8}"#, Lockstep),
            (r#"{"moe_num_experts":[64,64]}"#, Lockstep),
            (r#"{"num_experts":0,"model_type":"granitemoe"}"#, Independent),
            (r#"{"num_local_experts":8,"text_config":{"model_type":"llama"}}"#, Independent),
            (r#"{"model_type":"x_moe","text_config":{"num_experts":128}}"#, Lockstep),
            (r#"{"thinker_config":{"text_config":{"num_experts":128}}}"#, Lockstep),
            (
                r#"{"block_configs":[{"block_type":"attention"},{"block_type":"moe","n_routed_experts":16}]}"#,
                Lockstep,
            ),
        ] {
            assert_eq!(model(config), Ok(expected), "{config}");
        }
    }

    #[test]
    fn what_cannot_be_told_is_not_guessed() {
        assert!(matches!(model(r#"{"model_type":"qwen3_moe"}"#), Err(ModelError::Doubtful { .. })));
        assert!(matches!(model("[]"), Err(ModelError::Unreadable { .. })));
        assert!(matches!(model("{"), Err(ModelError::Unreadable { .. })));
        let error = kind_of("org/unknown", None, Path::new("/nowhere")).unwrap_err();
        assert!(error.to_string().contains("--model-kind dense"), "the way out is named: {error}");
    }

    #[test]
    fn a_model_is_found_in_the_cache_by_branch_and_by_commit() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--org--name");
        fs::create_dir_all(folder.join("refs")).unwrap();
        fs::create_dir_all(folder.join("snapshots/abc")).unwrap();
        fs::write(folder.join("refs/main"), "abc\n").unwrap();
        fs::write(folder.join("snapshots/abc/config.json"), r#"{"num_experts":2}"#).unwrap();
        for revision in [None, Some("main"), Some("abc")] {
            assert_eq!(kind_of("org/name", revision, cache.path()), Ok(GroupKind::Lockstep), "{revision:?}");
        }
        assert!(kind_of("org/name", Some("v2"), cache.path()).is_err());
    }

    #[test]
    fn mistrals_own_format_is_read() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("params.json"), r#"{"dim":1,"moe":{"num_experts":8}}"#).unwrap();
        assert_eq!(
            kind_of(dir.path().to_str().unwrap(), None, Path::new("/nowhere")),
            Ok(GroupKind::Lockstep)
        );
    }

    #[test]
    fn the_cache_is_where_hugging_face_puts_it() {
        let with = |set: &'static [(&'static str, &'static str)]| {
            cache_path(move |name| {
                set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            })
        };
        assert_eq!(with(&[("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b")]), Path::new("/a"));
        assert_eq!(with(&[("HF_HOME", "/b")]), Path::new("/b/hub"));
        assert_eq!(with(&[("HOME", "/h"), ("HF_HOME", "")]), Path::new("/h/.cache/huggingface/hub"));
    }
}
