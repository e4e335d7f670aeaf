//! What a model needs of a checkpoint, and what vLLM's loader does with names that it does not need
//! (`AutoWeightsLoader`, `reload_weights`, `maybe_untie_word_embeddings`, 0.32.0).

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::weights::{Content, Loaded};

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// The parameters of a model, by the checkpoint that it was started from.
#[derive(Debug)]
pub(crate) struct Parameters {
    shapes: BTreeMap<String, String>,
    /// The head is the embedding, whether the checkpoint has a copy of it or not.
    tied: bool,
    /// The model skips the layers that predict further tokens.
    skips_mtp: bool,
}

impl Parameters {
    pub(crate) fn new(directory: &Path, loaded: &Loaded) -> Self {
        let text = std::fs::read(directory.join("config.json")).unwrap_or_default();
        let config: Value = serde_json::from_slice(&text).unwrap_or_default();
        let content = |name: &str| loaded.contents.get(name);
        let differs = content(HEAD).is_some_and(|head| Some(head) != content(EMBEDDING));
        let mut this = Self {
            shapes: BTreeMap::new(),
            tied: config["tie_word_embeddings"] == true && !differs,
            skips_mtp: config["num_nextn_predict_layers"].as_u64() > Some(0),
        };
        let shapes = loaded.contents.iter().map(|(name, content)| (name.clone(), content.shape.clone()));
        this.shapes = shapes.filter(|(name, _)| !this.ignores(name)).collect();
        this
    }

    /// The loader passes over a tensor of this name.
    pub(crate) fn ignores(&self, name: &str) -> bool {
        name.ends_with("rotary_emb.inv_freq") || (self.skips_mtp && name.starts_with("mtp."))
    }

    /// Parameters that are one tensor: a copy, and what it is a copy of.
    pub(crate) fn tied(&self) -> Option<[&'static str; 2]> {
        self.tied.then_some([HEAD, EMBEDDING])
    }

    /// Why the loader raises. It casts every element type.
    pub(crate) fn refuses(&self, contents: &BTreeMap<String, Content>) -> Option<String> {
        contents.iter().find_map(|(name, Content { shape, .. })| {
            let wanted = self.shapes.get(name).or_else(|| {
                let copy = self.tied && name == HEAD;
                self.shapes.get(EMBEDDING).filter(|_| copy)
            });
            match wanted {
                _ if self.ignores(name) => None,
                None => Some(format!("ValueError: There is no module or parameter named '{name}'")),
                Some(wanted) if wanted != shape => Some(format!(
                    "AssertionError: Attempted to load weight ([{shape}]) into parameter ([{wanted}])"
                )),
                Some(_) => None,
            }
        })
    }

    /// Something of the weights before stays, which the loader does not mind.
    pub(crate) fn keeps_some(&self, contents: &BTreeMap<String, Content>) -> bool {
        let there = |name: &String| contents.contains_key(name) || (self.tied && name == HEAD);
        !self.shapes.keys().all(there)
    }
}
