//! Handle of a node's staging area.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::machine::weight_update::Checkpoint;
use dp_sidecar_protocol::{UpdateId, WeightVersion};

use super::{Ask, Delivery, Handle};
use crate::api::{Retain, StageProgress};

/// Where a node takes the bytes of a new checkpoint from.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum StageSource {
    /// A directory that this node can read.
    Directory(String),
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
    /// Directory of the start-up checkpoint on this node: the manifest must fit it. None: not checked here.
    pub model_path: Option<String>,
}

/// What can be asked of a node's staging area.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum StageRequest {
    State,
    /// Can this node read that directory, and is it the same one? Answered with [`StageState::probed`].
    Probe {
        /// Absolute directory.
        path: String,
    },
    /// Begin to fill the spare segment. Answered when the data address is open (`Upstream`) or the source was
    /// found good; the rest comes as events. The same id again with the bytes already there is done at once.
    Begin(StageSpec),
    /// The staged bytes are the committed version: they become the current segment.
    Commit {
        /// Of the [`StageSpec`].
        id: UpdateId,
    },
    /// Forget the staged bytes (they stay in the spare segment, for a later attempt to reuse).
    Discard {
        /// Of the [`StageSpec`].
        id: UpdateId,
    },
    /// Keep a LoRA adapter on this node. Answered with [`StageState::adapter`].
    TakeAdapter {
        /// Whole digest of its tensors.
        digest: String,
        /// Absolute directory in which this node may find it.
        path: Option<String>,
    },
    /// The next piece of [`ADAPTER_FILE`], for a node that lacks it. Answered with [`StageState::adapter`].
    AdapterPiece {
        /// Of the [`StageRequest::TakeAdapter`].
        digest: String,
        /// Where it belongs.
        offset: u64,
        /// Bytes of the whole file.
        size: u64,
        /// The piece.
        bytes: Bytes,
    },
    /// Forget all adapters but these.
    KeepAdapters {
        /// Whole digests.
        digests: BTreeSet<String>,
    },
}

/// Whether a node has an adapter.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum AdapterPlace {
    /// It has.
    Here {
        /// Directory, on this node.
        path: String,
    },
    /// It lacks the bytes of [`ADAPTER_FILE`] from here on.
    Lacks {
        /// First byte.
        from: u64,
    },
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
    Progress {
        /// Of the [`StageSpec`].
        id: UpdateId,
        progress: StageProgress,
    },
    /// All chunks are there and verified, the manifest fits.
    Staged {
        /// Of the [`StageSpec`].
        id: UpdateId,
        /// What to load.
        checkpoint: Checkpoint,
        progress: StageProgress,
    },
    /// It failed; no engine was touched.
    Failed {
        /// Of the [`StageSpec`].
        id: UpdateId,
        /// Who, stage, expected, actual.
        error: String,
    },
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
            Self::State | Self::Probe { .. } | Self::Begin(_) | Self::Discard { .. } => Delivery::Once,
        }
    }

    fn limit(&self) -> Duration {
        STAGE_LIMIT
    }
}

/// Handle of a node's staging task.
pub type StageHandle = Handle<StageRequest>;
