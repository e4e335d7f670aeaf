//! The DP coordinator's sockets of one engine, and the task that reads them.

use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::frames::SUBSCRIBE_ALL;
use dp_sidecar_protocol::{EngineIndex, Frames, Incarnation};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::EdgeState;
use super::backlog::{Backlog, Reported};
use crate::driver::handles::{EdgeEvent, NodeEvent, wave_edge};
use crate::tasks::{Task, named};
use crate::transport::{
    Encoded, PrivateDir, PullEvent, PullListener, TransportError, XpubListener, XpubPublisher,
};

/// An engine that takes no message for this long has no input thread any more.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// One XPUB (READY, START_DP_WAVE) and one PULL (stats, wave edges) of an engine incarnation.
/// Dropping it ends its reader task, and closes both.
#[derive(Debug)]
pub(super) struct EngineSockets {
    pub(super) incarnation: Incarnation,
    /// `coordinator_input` and `coordinator_output` of INIT.
    pub(super) addresses: (String, String),
    publisher: XpubPublisher,
    /// The last message was refused. Later ones may not be: the engine may have been stopped for a while only.
    unreachable: bool,
    _reader: DropGuard,
}

impl EngineSockets {
    pub(super) async fn bind(
        directory: &PrivateDir,
        rank: EngineIndex,
        incarnation: Incarnation,
        events: mpsc::Sender<NodeEvent>,
        state: watch::Sender<EdgeState>,
        tracker: &TaskTracker,
    ) -> Result<Self, TransportError> {
        let address = directory.fresh_addresses(rank);
        let (publish, output) = (address("ci")?, address("co")?);
        let xpub = XpubListener::bind(&publish, SEND_TIMEOUT).await?;
        let pull = PullListener::bind(&output).await?;
        let publisher = xpub.publisher();
        let end = CancellationToken::new();
        let reader = Reader { rank, incarnation, events, state, backlog: Backlog::default() };
        tracker.spawn(named(Task::EdgeReader, end.clone().run_until_cancelled_owned(reader.run(xpub, pull))));
        Ok(Self {
            incarnation,
            addresses: (publish, output),
            publisher,
            unreachable: false,
            _reader: end.drop_guard(),
        })
    }

    pub(super) fn publish(&mut self, rank: EngineIndex, message: &Encoded) {
        let sent = self.publisher.send(message);
        let was_unreachable = std::mem::replace(&mut self.unreachable, sent.is_err());
        if let Err(error) = sent
            && !was_unreachable
        {
            warn!(rank = rank.0, %error, "the engine cannot be reached by its DP coordinator");
        }
    }
}

struct Reader {
    rank: EngineIndex,
    incarnation: Incarnation,
    events: mpsc::Sender<NodeEvent>,
    state: watch::Sender<EdgeState>,
    backlog: Backlog,
}

impl Reader {
    /// Ends when nobody can take events any more.
    async fn run(mut self, mut xpub: XpubListener, mut pull: PullListener) {
        let rank = self.rank.0;
        let mut subscriptions = true;
        loop {
            tokio::select! {
                // As long as there is room nothing is left out.
                biased;
                permit = self.events.reserve(), if !self.backlog.is_empty() => {
                    let Ok(permit) = permit else { return };
                    if let Some(reported) = self.backlog.take() {
                        permit.send(event(self.rank, self.incarnation, reported));
                    }
                }
                received = xpub.recv(), if subscriptions => match received {
                    Ok(frames) if is_subscription(&frames) => {
                        debug!(rank, incarnation = self.incarnation.0, "engine subscribed");
                        self.state.send_modify(|state| {
                            state.subscribed.insert(self.rank, self.incarnation);
                        });
                        self.backlog.keep(Reported::Subscribed);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        warn!(rank, %error, "the engine does not read what its DP coordinator publishes");
                        subscriptions = false;
                    }
                },
                event = pull.recv() => match event {
                    // Stats and wave edges are single frames.
                    PullEvent::Message(frames) => match <[Bytes; 1]>::try_from(frames) {
                        Ok([frame]) => self.backlog.keep(self.report(frame)),
                        Err(frames) => debug!(rank, frames = frames.len(), "report of several frames dropped"),
                    },
                    // The rank task notices the loss of the engine, and more surely.
                    PullEvent::Disconnected => {}
                },
            }
        }
    }

    /// Notes what the report says about waves. What cannot be read is for the DP coordinator to complain about.
    fn report(&self, frame: Bytes) -> Reported {
        let Some((wave, running)) = wave_edge(&frame) else { return Reported::Load(frame) };
        self.state.send_if_modified(|state| state.note(wave, running));
        Reported::Edge(frame)
    }
}

fn event(rank: EngineIndex, incarnation: Incarnation, reported: Reported) -> NodeEvent {
    NodeEvent::Edge(match reported {
        Reported::Subscribed => EdgeEvent::Subscribed { rank, incarnation },
        Reported::Edge(frame) | Reported::Load(frame) => EdgeEvent::Report { rank, incarnation, frame },
    })
}

fn is_subscription(frames: &Frames) -> bool {
    matches!(frames.as_slice(), [only] if **only == *SUBSCRIBE_ALL)
}
