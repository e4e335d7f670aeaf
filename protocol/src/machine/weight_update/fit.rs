//! How a checkpoint may differ from the one that the engines were started from.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// Allowed differences between the tensors of a checkpoint and those of the start-up checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Fit {
    /// Element types must be equal, also those that vLLM's loader casts.
    pub strict_dtype: bool,
    /// Parameters of the model that are one tensor, by vLLM's names: a copy, and what it is a copy of. A checkpoint may
    /// have the copy or not.
    pub tied: Vec<(String, String)>,
    /// Names that the loader of every engine passes over.
    pub ignored: BTreeSet<String>,
    /// Applied to the names of the checkpoint before they are compared.
    pub rename: Renames,
}

/// Prefixes of tensors' names, and what stands there instead at the start. Of several that match, the longest counts.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Renames(BTreeMap<String, String>);

impl Renames {
    /// The name that a tensor of this name is loaded under.
    pub fn apply(&self, name: &str) -> String {
        match self.of(name) {
            Some((from, to)) => format!("{to}{}", &name[from.len()..]),
            None => name.to_owned(),
        }
    }

    fn of(&self, name: &str) -> Option<(&str, &str)> {
        self.iter().find(|(from, _)| name.starts_with(from))
    }

    /// Prefixes that none of these names makes use of.
    pub fn unused<'a>(&'a self, names: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
        let mut unused: BTreeSet<&str> = self.0.keys().map(String::as_str).collect();
        for name in names {
            if unused.is_empty() {
                break;
            }
            if let Some((from, _)) = self.of(name) {
                unused.remove(from);
            }
        }
        unused
    }

    /// The longest first.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let mut all: Vec<(&str, &str)> = self.0.iter().map(|(from, to)| (&from[..], &to[..])).collect();
        all.sort_by_key(|(from, _)| std::cmp::Reverse(from.len()));
        all.into_iter()
    }

    pub fn insert(&mut self, from: String, to: String) {
        self.0.insert(from, to);
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A tensor that only one of the two checkpoints has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OddTensor {
    pub name: String,
    /// In the spelling of a safetensors header.
    pub dtype: String,
    pub shape: Vec<u64>,
    /// Only the start-up checkpoint has it.
    pub missing: bool,
}
