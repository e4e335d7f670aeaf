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
    /// First message of a connection.
    Hello {
        /// [`LINK_VERSION`].
        version: u32,
        /// Names the asking process. The same one after a reconnect may ask again with ids it has used: a command
        /// that still runs, or was answered lately, is not begun a second time.
        session: Uuid,
    },
    /// Do something; answered by [`FromNode::Answer`] with the same id.
    Ask {
        /// Unique in this session, in the order in which commands are to be handed on.
        id: u64,
        ask: NodeAsk,
    },
    /// Are you there? Sent when nothing else was for a while.
    Ping,
}

/// From the serving side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromNode {
    /// Answer to [`ToNode::Hello`].
    Hello {
        /// [`LINK_VERSION`].
        version: u32,
    },
    /// Answer to a command.
    Answer {
        /// Of the command.
        id: u64,
        /// Its [`Answer`](crate::driver::handles::Ask::Answer), encoded, or the text of an error.
        result: Result<Bytes, String>,
    },
    Event(NodeEvent),
    /// Answer to [`ToNode::Ping`].
    Pong,
}
