//! What travels over a link: frames of `u32` length (big endian) and one msgpack value with named fields.
//!
//! The asking side sends [`ToNode`], the serving side [`FromNode`]. Commands are answered in any order. Everything
//! the serving side knows is told by [`GetState`](crate::driver::handles::GetState) after each (re)connection; events
//! that happened while nobody was connected are not repeated, the state says what came of them.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use crate::driver::handles::LINK_VERSION;
use crate::driver::handles::{NodeAsk, NodeEvent};

/// Longest frame, in bytes. Weights do not travel on the link.
pub const MAX_FRAME: usize = 16 << 20;

/// From the asking side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToNode {
    /// First message of a connection, with [`LINK_VERSION`]. The session names the asking process. The same one after a
    /// reconnect may ask again with ids it has used: a command that still runs, or was answered lately, is not begun a
    /// second time.
    Hello { version: u32, session: Uuid },
    /// Do something; answered by [`FromNode::Answer`] with the same id: unique in this session, in the order in which
    /// commands are to be handed on.
    Ask { id: u64, ask: NodeAsk },
    /// Are you there? Sent when nothing else was for a while.
    Ping,
}

/// From the serving side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromNode {
    /// Answer to [`ToNode::Hello`], with [`LINK_VERSION`].
    Hello { version: u32 },
    /// Answer to the command with this id: its [`Answer`](crate::driver::handles::Ask::Answer), encoded, or the text
    /// of an error.
    Answer { id: u64, result: Result<Bytes, String> },
    /// It is told as it happens.
    Event(NodeEvent),
    /// Answer to [`ToNode::Ping`].
    Pong,
}
