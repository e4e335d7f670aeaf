//! Handle of a node's staging area.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::machine::weight_update::{Checkpoint, Fit};
use dp_sidecar_protocol::{UpdateId, WeightVersion};

use super::{Ask, Delivery, Handle};
use crate::api::{Retain, StageProgress};
use crate::manifest::{Manifest, ManifestError};

/// A directory with a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CheckpointDir {
    pub path: String,
    /// Names of the files that vLLM's loader reads there; none: nobody has asked it.
    pub files: Option<Vec<String>>,
}

impl CheckpointDir {
    /// Its manifest. Blocks; reads no tensor data.
    ///
    /// # Errors
    /// It cannot be read, or is no checkpoint.
    pub fn manifest(&self) -> Result<Manifest, ManifestError> {
        Manifest::read(Path::new(&self.path), self.files.as_deref())
    }

    /// Whether the files that vLLM's loader names are those that are meant. Blocks.
    ///
    /// # Errors
    /// What else is there, and what to do.
    pub fn meant(&self) -> Result<(), String> {
        let Self { path, files } = self;
        let files = files.as_deref().unwrap_or_default();
        if files.iter().any(|file| file.starts_with("adapter_model.")) {
            return Err(format!("{path} holds a LoRA adapter: --lora NAME={path} adds it"));
        }
        let written =
            |file: &str| Path::new(path).join(file).metadata().and_then(|meta| meta.modified()).ok();
        let newest = files.iter().max_by_key(|file| written(file));
        let others = std::fs::read_dir(path).into_iter().flatten().flatten();
        let newer = others.filter_map(|entry| entry.file_name().into_string().ok()).find(|name| {
            let weights = name.starts_with("pytorch_model") && name.ends_with(".bin");
            weights
                && newest
                    .is_some_and(|newest| newest.ends_with(".safetensors") && written(name) > written(newest))
        });
        match (newer, newest) {
            (Some(newer), Some(newest)) => Err(format!(
                "{path}: vLLM loads {newest}, but {newer} was written later: remove the stale one, or touch {newest} if \
                 it is the right one (only safetensors can be loaded)"
            )),
            _ => Ok(()),
        }
    }
}

/// Where a node takes the bytes of a new checkpoint from.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum StageSource {
    /// A directory that this node can read.
    Directory(CheckpointDir),
    /// The node before it in the chain, which connects to this node's data address.
    Upstream,
    /// What a trainer uploads to the leader.
    Upload(String),
    /// What this node holds as current: it is passed on to a node that lacks it.
    Current,
}

/// The one file with tensors of a LoRA adapter, in its directory.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// One node's part in staging a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StageSpec {
    /// Names the staged bytes; the update's id.
    pub id: UpdateId,
    /// Label of the weights.
    pub version: WeightVersion,
    pub source: StageSource,
    /// Data address of the next node in the chain, which has begun before.
    pub downstream: Option<std::net::SocketAddr>,
    /// What becomes of the version before.
    pub retain: Retain,
    /// The start-up checkpoint on this node: the manifest must fit it. None: not checked here.
    pub model: Option<CheckpointDir>,
    /// How it may differ from that.
    pub fit: Box<Fit>,
}

/// What can be asked of a node's staging area.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum StageRequest {
    /// What is there?
    State,
    /// Can this node read that directory (absolute), and is it the same one? Answered with [`StageState::probed`].
    Probe(CheckpointDir),
    /// Begin to fill the spare segment. Answered when the data address is open (`Upstream`) or the source was
    /// found good; the rest comes as events. The same id again with the bytes already there is done at once.
    Begin(StageSpec),
    /// The staged bytes are the committed version: they become the current segment.
    Commit { id: UpdateId },
    /// Forget the staged bytes (they stay in the spare segment, for a later attempt to reuse).
    Discard { id: UpdateId },
    /// Keep the LoRA adapter with this whole digest of its tensors, which this node may find in the directory `path`
    /// (absolute). Answered with [`StageState::adapter`].
    TakeAdapter { digest: String, path: Option<String> },
    /// The next piece of [`ADAPTER_FILE`], which is `size` bytes long, for a node that lacks it. Answered with
    /// [`StageState::adapter`].
    AdapterPiece { digest: String, offset: u64, size: u64, bytes: Bytes },
    /// Forget all adapters but those with these whole digests.
    KeepAdapters { digests: BTreeSet<String> },
}

/// Whether a node has an adapter.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum AdapterPlace {
    /// It has, in this directory.
    Here { path: String },
    /// It lacks the bytes of [`ADAPTER_FILE`] from this one on.
    Lacks { from: u64 },
}

/// A version of the weights in a segment.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StagedVersion {
    /// The update that brought it.
    pub id: UpdateId,
    /// Its label.
    pub version: WeightVersion,
    /// What engines of this node are told to load.
    pub checkpoint: Checkpoint,
}

/// State of a node's staging area.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StageState {
    /// Where the node before it in the chain connects; set while a [`StageSource::Upstream`] is awaited.
    pub data_address: Option<std::net::SocketAddr>,
    /// Answer to a probe: digest over names, sizes and headers of the directory's files.
    pub probed: Option<String>,
    /// The committed version, if a segment holds it.
    pub current: Option<StagedVersion>,
    /// The version before it, if it is retained.
    pub previous: Option<StagedVersion>,
    /// Complete and verified, but not committed.
    pub staged: Option<StagedVersion>,
    /// What is being staged now, and how far it is.
    #[serde(default)]
    pub running: Option<(UpdateId, StageProgress)>,
    /// Bytes of shared memory in use.
    pub memory: u64,
    /// Answer about an adapter.
    #[serde(default)]
    pub adapter: Option<AdapterPlace>,
}

/// What a node's staging area reports.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum StageEvent {
    /// It goes on; at most a few times a second.
    Progress { id: UpdateId, progress: StageProgress },
    /// All chunks are there and verified, the manifest fits; with what to load.
    Staged { id: UpdateId, checkpoint: Checkpoint, progress: StageProgress },
    /// It failed: who, stage, expected, actual. No engine was touched.
    Failed { id: UpdateId, error: String },
}

/// A node may have to look through a directory.
const STAGE_LIMIT: Duration = Duration::from_secs(300);

impl Ask for StageRequest {
    /// State after it.
    type Answer = StageState;
    const NAME: &'static str = "staging";

    /// An update that lacks a node fails now, and may be tried again; the node must only hear what was committed.
    /// Adapters may be told again and again.
    fn delivery(&self) -> Delivery {
        match self {
            Self::Commit { .. }
            | Self::TakeAdapter { .. }
            | Self::AdapterPiece { .. }
            | Self::KeepAdapters { .. } => Delivery::Repeat,
            Self::State | Self::Probe(_) | Self::Begin(_) | Self::Discard { .. } => Delivery::Once,
        }
    }

    fn limit(&self) -> Duration {
        STAGE_LIMIT
    }
}

/// Handle of a node's staging task.
pub type StageHandle = Handle<StageRequest>;
