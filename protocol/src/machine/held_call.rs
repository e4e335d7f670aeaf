//! Control calls of frontends, between the machine of the rank that holds them and the one that decides.

use serde::{Deserialize, Serialize};

use crate::{EngineIndex, FrontendId};

/// A control call of a frontend (pause, resume, sleep, weight methods ...), held at one rank until
/// it is decided what becomes of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeldCall {
    /// At which rank.
    pub rank: EngineIndex,
    /// Names this call at that rank.
    pub ticket: u64,
    /// Who calls.
    pub frontend: FrontendId,
    pub api_server: u32,
    /// vLLM's method name.
    pub method: String,
    /// Positional arguments.
    pub args: Vec<rmpv::Value>,
}

/// Decision on a [`HeldCall`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Verdict {
    /// Send it to the engine; the answer goes to the frontend.
    Forward,
    /// Answer it with this value, without asking the engine.
    Answer(rmpv::Value),
    /// Answer it with this failure message.
    Refuse(String),
}
