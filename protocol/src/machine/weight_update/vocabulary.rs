//! What events, actions and records of an update speak of.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::fit::{OddTensor, Renames};
use crate::{EngineIndex, Incarnation};

/// A node that takes part, numbered by the leader. Bytes are checked once per node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u16);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What happens to running requests when the engines pause (vLLM: `PauseMode`,
/// `vllm/v1/engine/core.py` 0.32.0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PauseMode {
    /// They run to their end, at most for the pause deadline; then [`Self::Abort`].
    #[default]
    Wait,
    /// They end at once with finish reason `abort`.
    Abort,
    /// They freeze and go on with the new weights: such responses mix versions.
    Keep,
}

impl PauseMode {
    /// Every mode, the default first.
    pub const ALL: [Self; 3] = [Self::Wait, Self::Abort, Self::Keep];

    /// vLLM's spelling.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Abort => "abort",
            Self::Keep => "keep",
        }
    }
}

impl fmt::Display for PauseMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for PauseMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|mode| mode.as_str() == text);
        found.ok_or_else(|| format!("pause mode {text:?}: wait, abort or keep expected"))
    }
}

/// Where a file of a checkpoint lies within a segment, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Extent {
    /// From the start of the segment.
    pub offset: u64,
    /// Length of the file.
    pub length: u64,
}

/// A checked checkpoint: what an engine must consume, no more and no less.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Absolute directory; with `extents`: absolute path of the shared memory segment.
    pub path: String,
    /// Files in it, in loading order.
    pub files: Vec<String>,
    /// Where each of `files` lies in the segment; empty for a directory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extents: Vec<Extent>,
    /// Number of tensors in these files.
    pub tensors: u64,
    /// Sum of the tensors' lengths in bytes.
    pub bytes: u64,
    /// Whole digest (`docs/weight-update.md`); `None`: counts only. Of a segment: `xxh3:` and the digest over the
    /// digests of its chunks; workers do not compute it, the node has.
    pub digest: Option<String>,
    /// Under which names its tensors are loaded.
    #[serde(default, skip_serializing_if = "Renames::is_empty")]
    pub rename: Renames,
    /// Tensors that only one of this and the start-up checkpoint has, while it is not decided whether that matters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub odd: Vec<OddTensor>,
}

/// An engine in the update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Participant {
    /// Which life of it. Answers of another life are ignored.
    pub incarnation: Incarnation,
    /// Where it runs.
    pub node: NodeId,
}

/// A call of an update to an engine. The answer names it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub rank: EngineIndex,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// Counts from 1.
    pub attempt: u32,
}

impl Call {
    /// The same once more.
    pub(super) const fn again(self) -> Self {
        Self { attempt: self.attempt + 1, ..self }
    }
}

/// What a worker holds after a load (`state` of `dp_sidecar_load`, `docs/weight-update.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkerState {
    /// The weights that were asked for.
    Loaded,
    /// What it held before.
    Unchanged,
    /// Real tensors of undefined content: may be loaded again, must not serve.
    RestoredMeta,
    /// Torn, and not cleaned up. Also what is assumed when a worker does not say.
    #[default]
    Mixed,
}

/// Answer of one worker of an engine to a load.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerReport {
    /// Worker rank within its DP rank.
    pub rank: u32,
    /// Loaded what was asked for.
    pub ok: bool,
    /// What it holds now.
    pub state: WorkerState,
    /// Tensors consumed.
    pub tensors: u64,
    /// Bytes consumed.
    pub bytes: u64,
    /// Whole digest of what was consumed, if it was computed.
    pub digest: Option<String>,
    /// Milliseconds it took.
    pub ms: f64,
    pub error: Option<String>,
    /// `error_kind` of the shim.
    pub error_kind: Option<String>,
}

impl WorkerReport {
    /// Why this is not the answer that proves `wanted` is loaded; `None` if it is.
    pub fn fault(&self, wanted: &Checkpoint) -> Option<String> {
        let who = format!("worker {}", self.rank);
        if !self.ok || self.state != WorkerState::Loaded {
            let kind = self.error_kind.as_deref().unwrap_or("unknown");
            let error = self.error.as_deref().unwrap_or("no reason given");
            return Some(format!("{who}: load failed ({kind}): {error}"));
        }
        if self.tensors != wanted.tensors || self.bytes != wanted.bytes {
            return Some(format!(
                "{who}: consumed {} tensors of {} bytes, expected {} of {}",
                self.tensors, self.bytes, wanted.tensors, wanted.bytes
            ));
        }
        match (&self.digest, &wanted.digest) {
            (Some(actual), Some(expected)) if actual != expected => {
                Some(format!("{who}: digest of the consumed tensors is {actual}, expected {expected}"))
            }
            _ => None,
        }
    }
}

/// Where an update is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// No update.
    #[default]
    Idle,
    /// Directories are read, checked and hashed. Generation goes on, no engine has been touched.
    Staging,
    /// Checked; admission is being closed.
    Prepared,
    /// All ranks are being paused.
    Pausing,
    /// All ranks load.
    Loading,
    /// What the ranks say they consumed is compared.
    Verifying,
    /// The commit record is written, versions are stamped, caches reset. From the record on only forward.
    Committing,
    /// All ranks are being resumed.
    Resuming,
    /// Touched ranks load the previous checkpoint.
    RollingBack,
}

/// As in records.
impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Where one rank is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RankProgress {
    /// Serving; not touched.
    #[default]
    Serving,
    /// Asked to pause.
    Pausing,
    /// Has paused.
    Paused,
    /// Loads the new weights.
    Loading,
    /// Holds the new weights.
    Loaded,
    LoadFailed,
    /// Loads the previous weights.
    RollingBack,
    /// Holds the previous weights again.
    RolledBack,
    /// Stamped with the version, caches reset.
    Stamped,
    /// Asked to resume.
    Resuming,
    /// Serves again.
    Resumed,
    /// Kept from serving; must be started again.
    Fenced,
    /// Its process is gone.
    Lost,
}

impl RankProgress {
    /// Whether an engine there certainly holds the weights from before the update.
    pub(super) const fn holds_previous(self) -> bool {
        matches!(self, Self::Serving | Self::Pausing | Self::Paused | Self::RolledBack)
    }
}

impl fmt::Display for RankProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Serving => "serving",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Loading => "loading",
            Self::Loaded => "loaded",
            Self::LoadFailed => "load failed",
            Self::RollingBack => "rolling back",
            Self::RolledBack => "rolled back",
            Self::Stamped => "stamped",
            Self::Resuming => "resuming",
            Self::Resumed => "resumed",
            Self::Fenced => "fenced",
            Self::Lost => "lost",
        })
    }
}
