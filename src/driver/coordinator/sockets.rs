//! The DP coordinator's sockets and the tasks that read them.

use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::frames::SUBSCRIBE_ALL;
use dp_sidecar_protocol::{EngineIndex, Frames, Incarnation};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::transport::{PrivateDir, PullEvent, PullListener, TransportError, XpubListener, XpubPublisher};

/// An engine that takes no message for this long has no input thread any more.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// From a reader task.
#[derive(Debug)]
pub(super) enum Input {
    /// From an engine.
    Engine { rank: EngineIndex, incarnation: Incarnation, what: FromEngine },
    /// From a directly connected frontend.
    Front(Bytes),
}

#[derive(Debug)]
pub(super) enum FromEngine {
    /// It receives from now on what is published.
    Subscribed,
    /// An encoded `EngineCoreOutputs`.
    Report(Bytes),
}

/// One XPUB (READY, START_DP_WAVE) and one PULL (stats, wave edges) of an engine incarnation.
/// Dropping it ends its reader task, and closes both.
#[derive(Debug)]
pub(super) struct EngineSockets {
    pub(super) incarnation: Incarnation,
    /// `coordinator_input` and `coordinator_output` of INIT.
    pub(super) addresses: (String, String),
    publisher: XpubPublisher,
    /// The last message could not be queued. Later ones may be: the engine may have been stopped for
    /// a while only.
    unreachable: bool,
    _reader: DropGuard,
}

impl EngineSockets {
    pub(super) async fn bind(
        directory: &PrivateDir,
        rank: EngineIndex,
        incarnation: Incarnation,
        inputs: mpsc::Sender<Input>,
        tracker: &TaskTracker,
    ) -> Result<Self, TransportError> {
        let publish = directory.ipc_address(&format!("ci-{rank}-{incarnation}"))?;
        let output = directory.ipc_address(&format!("co-{rank}-{incarnation}"))?;
        let xpub = XpubListener::bind(&publish, SEND_TIMEOUT).await?;
        let pull = PullListener::bind(&output).await?;
        let publisher = xpub.publisher();
        let end = CancellationToken::new();
        let reader =
            end.clone().run_until_cancelled_owned(read_engine(rank, incarnation, xpub, pull, inputs));
        tracker.spawn(reader);
        Ok(Self {
            incarnation,
            addresses: (publish, output),
            publisher,
            unreachable: false,
            _reader: end.drop_guard(),
        })
    }

    pub(super) fn publish(&mut self, rank: EngineIndex, frames: Frames) {
        let sent = self.publisher.send(frames);
        let was_unreachable = std::mem::replace(&mut self.unreachable, sent.is_err());
        if let Err(error) = sent
            && !was_unreachable
        {
            warn!(rank = rank.0, %error, "the engine cannot be reached by its DP coordinator");
        }
    }
}

async fn read_engine(
    rank: EngineIndex,
    incarnation: Incarnation,
    mut xpub: XpubListener,
    mut pull: PullListener,
    inputs: mpsc::Sender<Input>,
) {
    let mut subscriptions = true;
    loop {
        let what = tokio::select! {
            event = pull.recv() => match event {
                // Stats and wave edges are single frames.
                PullEvent::Message(mut frames) if frames.len() == 1 => {
                    match frames.pop() {
                        Some(frame) => FromEngine::Report(frame),
                        None => continue,
                    }
                }
                PullEvent::Message(frames) => {
                    debug!(rank = rank.0, frames = frames.len(), "report of several frames dropped");
                    continue;
                }
                // The rank task notices the loss of the engine, and more surely.
                PullEvent::Disconnected => continue,
            },
            received = xpub.recv(), if subscriptions => match received {
                Ok(frames) if is_subscription(&frames) => FromEngine::Subscribed,
                Ok(_) => continue,
                Err(error) => {
                    warn!(rank = rank.0, %error, "the engine does not read what its DP coordinator publishes");
                    subscriptions = false;
                    continue;
                }
            },
        };
        let input = Input::Engine { rank, incarnation, what };
        if inputs.send(input).await.is_err() {
            return;
        }
    }
}

/// The XPUB of directly connected frontends.
#[derive(Debug)]
pub(super) struct Front {
    publisher: XpubPublisher,
    _reader: DropGuard,
}

impl Front {
    pub(super) fn read(mut socket: XpubListener, inputs: mpsc::Sender<Input>, tracker: &TaskTracker) -> Self {
        let publisher = socket.publisher();
        let end = CancellationToken::new();
        let reader = async move {
            while let Ok(mut frames) = socket.recv().await {
                let subscribes = frames.first().is_none_or(|f| matches!(f[..], [0 | 1, ..]));
                if let Some(frame) = frames.pop().filter(|_| !subscribes)
                    && inputs.send(Input::Front(frame)).await.is_err()
                {
                    return;
                }
            }
            warn!("a frontend does not read what the DP coordinator publishes");
        };
        tracker.spawn(end.clone().run_until_cancelled_owned(reader));
        Self { publisher, _reader: end.drop_guard() }
    }

    pub(super) fn publish(&self, frame: Bytes) {
        if let Err(error) = self.publisher.send(vec![frame]) {
            warn!(%error, "frontends cannot be reached by the DP coordinator");
        }
    }
}

fn is_subscription(frames: &Frames) -> bool {
    matches!(frames.as_slice(), [only] if **only == *SUBSCRIBE_ALL)
}
