//! Messages between the sidecar and its keeper: a 4-byte big-endian length, a version byte, and a
//! tagged msgpack map.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::msgpack;

/// Version byte of every frame. A keeper of another version is stopped and replaced.
pub const KEEPER_PROTOCOL: u8 = 2;

/// Longest accepted frame after the length, in bytes. The largest message is a spawn with the whole
/// environment.
pub const MAX_FRAME: usize = 4 * 1024 * 1024;

/// A process to be started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpawnSpec {
    /// Names the child: `engine-0`, `frontend`. Letters, digits, `-`, `_` and `.`; it becomes the
    /// name of the log file.
    pub name: String,
    /// Which life of the child this is.
    pub incarnation: u64,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment of the child; the markers are added by the keeper.
    pub env: BTreeMap<String, String>,
    /// Working directory; the keeper's own (the state directory) if absent.
    pub cwd: Option<PathBuf>,
    /// When everything is stopped, children with a lower number are stopped first.
    pub stop_order: u32,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum ExitStatus {
    /// It exited.
    Code { code: i32 },
    /// A signal ended it.
    Signal { signal: i32 },
    /// Not known: the keeper that had to reap it is dead.
    Unknown,
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code { code } => write!(f, "exit code {code}"),
            Self::Signal { signal } => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(name) => write!(f, "signal {signal} ({name})"),
                Err(_) => write!(f, "signal {signal}"),
            },
            Self::Unknown => f.write_str("unknown exit status (its keeper is gone)"),
        }
    }
}

/// The end of a child. Sent when the process *and everything it left behind* is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    /// Which child.
    pub name: String,
    pub incarnation: u64,
    /// Pid of its main process.
    pub pid: u32,
    /// How the main process ended.
    pub status: ExitStatus,
    /// It was told to stop.
    pub requested: bool,
    /// Last lines it wrote to stdout and stderr, oldest first.
    pub last_lines: Vec<String>,
    /// Processes it left behind that had to be killed.
    pub strays_killed: u32,
    /// Pids that could not be ended in time. Empty unless something is very wrong.
    pub left: Vec<u32>,
}

/// A child as the keeper sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildInfo {
    pub name: String,
    pub incarnation: u64,
    /// Pid of its main process.
    pub pid: u32,
    /// Stop was asked for, or the main process has ended and its remains are being removed.
    pub stopping: bool,
    /// Its log file.
    pub log_path: PathBuf,
}

/// What the sidecar asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// First message of the owner. An earlier owner's connection is closed.
    Own,
    /// First message of an owner that goes on with what an earlier one has left; answered by
    /// [`Answer::Inventory`]. Refused while everything is being stopped. `orphan_grace_ms`: how long everything is
    /// kept without an owner, from now on; `kill_grace_ms`: between SIGTERM and SIGKILL when the keeper stops children
    /// on its own.
    TakeOver { orphan_grace_ms: u64, kill_grace_ms: u64 },
    /// Start a child.
    Spawn { spec: SpawnSpec },
    /// Stop a child: SIGTERM to its main process, after the grace SIGKILL to all of it. Answered at
    /// once; the end comes as [`KeeperEvent::Exited`].
    Stop { name: String, grace_ms: u64 },
    /// All children.
    List,
    /// Stop all children in their order, each stage of it within the grace, then end. Answered when all are gone.
    Shutdown { grace_ms: u64 },
}

/// What the keeper answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// To all other requests.
    Done,
    /// To [`Request::Spawn`], with the pid of the main process, which is also its session and process group.
    Spawned { pid: u32 },
    /// To [`Request::List`]: living children.
    Children { children: Vec<ChildInfo> },
    /// To [`Request::Own`]: pid of the keeper, and run id of the state directory.
    Keeper { pid: u32, run_id: String },
    /// To [`Request::TakeOver`]: as [`Answer::Keeper`], with the living children, and how those ended that were not
    /// started again since.
    Inventory { pid: u32, run_id: String, children: Vec<ChildInfo>, exits: Vec<ExitReport> },
    /// Refused or failed.
    Failed { error: String },
}

/// What the keeper reports to its owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum KeeperEvent {
    /// A child was started; with the pid of its main process.
    Spawned { name: String, incarnation: u64, pid: u32 },
    /// A child is gone.
    Exited(ExitReport),
    /// The keeper itself died and was replaced by one with this pid; all children that it had are gone (each was
    /// reported as [`KeeperEvent::Exited`] before).
    Replaced { pid: u32 },
    /// The keeper died and no new one could be started: nothing can be spawned any more.
    Failed { error: String },
}

/// Client to keeper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToKeeper {
    /// Correlates the answer.
    pub seq: u64,
    pub request: Request,
}

/// Keeper to client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum FromKeeper {
    /// Answer to the request with this number.
    Answer { seq: u64, answer: Answer },
    /// Unasked for.
    Event { event: KeeperEvent },
}

/// A frame broke the rules.
#[derive(Debug, Error)]
pub enum WireError {
    /// Longer than [`MAX_FRAME`], or empty.
    #[error("frame of {0} bytes, expected 1 to {MAX_FRAME}")]
    Length(usize),
    /// Another protocol version.
    #[error("protocol version {0}, expected {KEEPER_PROTOCOL}")]
    Version(u8),
    /// Not the expected message.
    #[error("undecodable message: {0}")]
    Decode(#[from] rmp_serde::decode::Error),
    /// Cannot be encoded.
    #[error("unencodable message: {0}")]
    Encode(#[from] rmp_serde::encode::Error),
}

/// Encodes a message with its length and version.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![0, 0, 0, 0, KEEPER_PROTOCOL];
    rmp_serde::encode::write_named(&mut frame, message)?;
    let length = frame.len() - 4;
    let prefix =
        u32::try_from(length).ok().filter(|_| length <= MAX_FRAME).ok_or(WireError::Length(length))?;
    frame[..4].copy_from_slice(&prefix.to_be_bytes());
    Ok(frame)
}

/// Takes the first complete message off `buffer`; `None` if more bytes are needed.
pub fn decode<T: DeserializeOwned>(buffer: &mut Vec<u8>) -> Result<Option<T>, WireError> {
    let Some(prefix) = buffer.first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(*prefix) as usize;
    if length == 0 || length > MAX_FRAME {
        return Err(WireError::Length(length));
    }
    if buffer.len() < 4 + length {
        return Ok(None);
    }
    let frame: Vec<u8> = buffer.drain(..4 + length).skip(4).collect();
    match frame.split_first() {
        Some((&KEEPER_PROTOCOL, body)) => Ok(Some(msgpack::decode(body)?)),
        Some((&version, _)) => Err(WireError::Version(version)),
        None => Err(WireError::Length(0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spawn() -> ToKeeper {
        ToKeeper {
            seq: 7,
            request: Request::Spawn {
                spec: SpawnSpec {
                    name: "engine-0".to_owned(),
                    incarnation: 3,
                    argv: vec!["vllm".to_owned(), "serve".to_owned()],
                    env: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
                    cwd: Some("/x".into()),
                    stop_order: 1,
                },
            },
        }
    }

    #[test]
    fn a_message_survives_the_wire_byte_by_byte() {
        let bytes = encode(&spawn()).unwrap();
        let mut buffer = Vec::new();
        for (position, byte) in bytes.iter().enumerate() {
            assert_eq!(decode::<ToKeeper>(&mut buffer).unwrap(), None, "{position}");
            buffer.push(*byte);
        }
        assert_eq!(decode::<ToKeeper>(&mut buffer).unwrap(), Some(spawn()));
        assert!(buffer.is_empty());
    }

    #[test]
    fn events_and_answers_survive_the_wire() {
        let report = ExitReport {
            name: "engine-1".to_owned(),
            incarnation: 1,
            pid: 42,
            status: ExitStatus::Signal { signal: 9 },
            requested: false,
            last_lines: vec!["boom".to_owned()],
            strays_killed: 2,
            left: vec![],
        };
        for message in [
            FromKeeper::Event { event: KeeperEvent::Exited(report) },
            FromKeeper::Answer { seq: 1, answer: Answer::Children { children: vec![] } },
            FromKeeper::Answer { seq: 2, answer: Answer::Done },
        ] {
            let mut bytes = encode(&message).unwrap();
            assert_eq!(decode::<FromKeeper>(&mut bytes).unwrap(), Some(message));
        }
    }

    #[test]
    fn a_frame_of_another_version_or_size_is_refused() {
        let mut other = encode(&spawn()).unwrap();
        other[4] = 9;
        assert!(matches!(decode::<ToKeeper>(&mut other), Err(WireError::Version(9))));
        let mut long = vec![0xff; 8];
        assert!(matches!(decode::<ToKeeper>(&mut long), Err(WireError::Length(_))));
        let mut empty = vec![0; 4];
        assert!(matches!(decode::<ToKeeper>(&mut empty), Err(WireError::Length(0))));
    }
}
