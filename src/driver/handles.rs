//! What the tasks of the sidecar say to each other: commands, events and the handles that carry
//! them. All queues are bounded. A handle is cheap to clone.
//!
//! [`RankHandle`], [`EdgeHandle`], [`HandshakeHandle`], [`ProcessHandle`] and [`StageHandle`] are the borders that
//! a link carries: their commands are [`Ask`]s, and for ranks of other nodes (and, the first two, for the relay
//! process of this node) `crate::link` gives the same handles.

mod ask;
mod attachments;
mod coordinator;
mod engines;
mod node;
mod rank;
mod staging;

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

pub use self::ask::*;
pub use attachments::*;
pub use coordinator::*;
pub use dp_sidecar_protocol::GroupKind;
pub use engines::*;
pub use node::*;
pub use rank::*;
pub use staging::*;

/// A task did not do what it was asked to.
#[derive(Clone, Debug, Error)]
pub enum HandleError {
    /// The task has ended; the sidecar is stopping or failed.
    #[error("the {task} task has ended")]
    Gone { task: &'static str },
    /// The task answered with a failure.
    #[error("{0}")]
    Failed(Arc<str>),
    /// No answer in time.
    #[error("{what} took longer than {limit:?}")]
    Deadline {
        /// What was waited for, naming the peer.
        what: String,
        limit: Duration,
    },
}

impl HandleError {
    /// A failure with a text.
    pub fn failed(text: impl Into<String>) -> Self {
        Self::Failed(Arc::from(text.into()))
    }
}

/// Answer to a command of a task that only this process has.
pub type Reply<T> = oneshot::Sender<Result<T, HandleError>>;

/// Outcome of a utility call: the decoded result, or the engine's failure message.
pub type CallResult = Result<rmpv::Value, HandleError>;

/// Sends a command with a reply channel and waits for the answer under a deadline.
pub async fn ask<C, T>(
    commands: &mpsc::Sender<C>,
    task: &'static str,
    what: String,
    limit: Duration,
    command: impl FnOnce(Reply<T>) -> C,
) -> Result<T, HandleError> {
    let (reply, answer) = oneshot::channel();
    let exchange = async {
        commands.send(command(reply)).await.map_err(|_| HandleError::Gone { task })?;
        answer.await.map_err(|_| HandleError::Gone { task })?
    };
    match tokio::time::timeout(limit, exchange).await {
        Ok(result) => result,
        Err(_) => Err(HandleError::Deadline { what, limit }),
    }
}
