//! Multipart messages and the fixed markers of the protocol.

use bytes::Bytes;

/// One multipart message, without the routing id.
pub type Frames = Vec<Bytes>;

/// What the DP coordinator broadcasts once every engine has subscribed, and the engine waits for
/// before it reports READY (`vllm/v1/engine/core.py` 0.32.0, `process_input_sockets`).
pub const COORDINATOR_READY: &[u8] = b"READY";

/// Sent as a single frame on every output socket by an engine that dies of a Python exception
/// (`EngineCoreProc.ENGINE_CORE_DEAD`). Not sent on SIGKILL.
pub const ENGINE_CORE_DEAD: &[u8] = b"ENGINE_CORE_DEAD";

/// A subscription to everything, as it travels on XSUB / XPUB.
pub const SUBSCRIBE_ALL: &[u8] = b"\x01";

/// First frame of every message to an engine (vLLM: `EngineCoreRequestType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RequestType {
    /// A new request.
    Add = 0,
    /// Ids of requests to abort.
    Abort = 1,
    /// The DP coordinator wakes a lockstep group.
    StartDpWave = 2,
    /// A call of a method of the engine core.
    Utility = 3,
    /// Internal to vLLM; from a client it kills the engine.
    ExecutorFailed = 4,
    /// Internal to vLLM, ignored by engines (0.18.1 and later).
    Wakeup = 5,
}

impl RequestType {
    /// Reads the type frame; `None` for anything but one known byte.
    pub fn from_frame(frame: &[u8]) -> Option<Self> {
        match frame {
            [0] => Some(Self::Add),
            [1] => Some(Self::Abort),
            [2] => Some(Self::StartDpWave),
            [3] => Some(Self::Utility),
            [4] => Some(Self::ExecutorFailed),
            [5] => Some(Self::Wakeup),
            _ => None,
        }
    }

    /// The type frame.
    pub fn to_frame(self) -> Bytes {
        const BYTES: [u8; 6] = [0, 1, 2, 3, 4, 5];
        let at = self as usize;
        Bytes::from_static(&BYTES[at..=at])
    }
}
