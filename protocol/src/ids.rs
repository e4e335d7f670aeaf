//! Names of the things the protocol talks about. Each is its own type, so that a rank is never
//! mistaken for a slot.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<$inner> for $name {
            fn from(value: $inner) -> Self {
                Self(value)
            }
        }
    };
}

number!(
    /// Global data parallel rank of an engine (vLLM: `engine_index`).
    EngineIndex(u16)
);
number!(
    /// Position of a client in an engine's address lists, as it travels in ADD and UTILITY messages
    /// (vLLM: `client_index`).
    ClientIndex(u32)
);
number!(
    /// One of the address pairs an engine was given at INIT. Slot 0 is the sidecar's own (control),
    /// slots 1..=K carry one frontend API server each. On the engine's wire a slot *is* a client
    /// index.
    Slot(u32)
);
number!(
    /// A frontend attachment, numbered by the sidecar, never reused within one sidecar process.
    FrontendId(u64)
);
number!(
    /// One life of an engine process. Grows by one each time the rank is started again.
    Incarnation(u64)
);
number!(
    /// Number of a request wave of a lockstep group (vLLM: `current_wave`).
    Wave(u64)
);
number!(
    /// Correlates a utility call with its answer. vLLM draws 64 random bits; -1 and -2 are reserved
    /// by vLLM, hence the signed and wider type.
    CallId(i128)
);

impl Slot {
    /// The sidecar's own slot: client 0 of every hosted engine.
    pub const CONTROL: Self = Self(0);
}

impl EngineIndex {
    /// The ZMQ routing id vLLM gives to this rank's sockets: two bytes, little endian
    /// (`vllm/v1/engine/core.py` 0.32.0, `rank.to_bytes(2, "little")`).
    pub fn identity(self) -> EngineIdentity {
        EngineIdentity(self.0.to_le_bytes())
    }
}

/// ZMQ routing id of an engine, see [`EngineIndex::identity`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EngineIdentity(pub [u8; 2]);

impl EngineIdentity {
    /// The rank behind the identity.
    pub fn index(self) -> EngineIndex {
        EngineIndex(u16::from_le_bytes(self.0))
    }

    /// Reads an identity frame; anything but two bytes is not an engine.
    pub fn from_frame(frame: &[u8]) -> Option<Self> {
        <[u8; 2]>::try_from(frame).ok().map(Self)
    }
}

/// How the ranks of a deployment depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupKind {
    /// Dense models (vLLM 0.14.1 and later): each rank runs, pauses, dies and restarts alone.
    #[default]
    Independent,
    /// MoE models: the ranks step in lockstep, pause by consensus, and live and die together.
    Lockstep,
}

impl GroupKind {
    pub const ALL: [Self; 2] = [Self::Independent, Self::Lockstep];

    /// The kind of ranks that step in lockstep, or do not.
    pub const fn of(lockstep: bool) -> Self {
        if lockstep { Self::Lockstep } else { Self::Independent }
    }

    pub const fn is_lockstep(self) -> bool {
        matches!(self, Self::Lockstep)
    }

    /// The kind of model that has such ranks, as the flag `--model-kind` spells it. Read again by [`FromStr`].
    pub const fn model(self) -> &'static str {
        match self {
            Self::Independent => "dense",
            Self::Lockstep => "moe",
        }
    }
}

/// What the ranks are, as in `independent ranks`.
impl fmt::Display for GroupKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl FromStr for GroupKind {
    type Err = String;

    fn from_str(model: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kind| kind.model() == model);
        found.ok_or_else(|| format!("model kind {model:?}: dense or moe expected"))
    }
}

/// Who has paused the engines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum PausedBy {
    /// A frontend. Its pause ends when somebody resumes, or some time after the frontend is gone.
    Frontend { id: FrontendId },
    /// The operator. Only the operator resumes.
    Operator,
}

impl fmt::Display for PausedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frontend { id } => write!(f, "frontend {id}"),
            Self::Operator => f.write_str("the operator"),
        }
    }
}

/// Names one weight update transaction. Chosen by the caller, or random.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UpdateId(pub String);

impl fmt::Display for UpdateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Label of a set of weights (vLLM: `weight_version`). A fresh engine says `default`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WeightVersion(pub String);

impl WeightVersion {
    /// What is said where nobody but a frontend knows which weights the engines hold.
    pub const UNKNOWN: &str = "unknown";

    pub fn unknown() -> Self {
        Self(Self::UNKNOWN.to_owned())
    }

    /// Characters of a label, at most: it rides on every output.
    pub const LONGEST: usize = 128;

    /// Whether an update may stamp it. `default` would make new weights look like those of a fresh engine.
    ///
    /// # Errors
    /// What was expected, for people.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.0.is_empty() || self.0.chars().count() > Self::LONGEST || self.0.chars().any(char::is_control)
        {
            return Err("version: expected 1 to 128 printable characters");
        }
        if *self == Self::default() {
            return Err(
                "version: `default` is what vLLM says of the weights that an engine was started with",
            );
        }
        Ok(())
    }
}

impl Default for WeightVersion {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl fmt::Display for WeightVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
