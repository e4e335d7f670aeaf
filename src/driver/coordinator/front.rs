//! Frontends without a handshake with the sidecar: they subscribe here and send FIRST_REQ.

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tracing::warn;

use crate::transport::{Encoded, XpubListener, XpubPublisher};

/// The XPUB of directly connected frontends.
#[derive(Debug)]
pub(super) struct Front {
    publisher: XpubPublisher,
    _reader: DropGuard,
}

impl Front {
    pub(super) fn read(
        mut socket: XpubListener,
        requests: mpsc::Sender<Bytes>,
        tracker: &TaskTracker,
    ) -> Self {
        let publisher = socket.publisher();
        let end = CancellationToken::new();
        let reader = async move {
            while let Ok(mut frames) = socket.recv().await {
                let subscribes = frames.first().is_none_or(|f| matches!(f[..], [0 | 1, ..]));
                if let Some(frame) = frames.pop().filter(|_| !subscribes)
                    && requests.send(frame).await.is_err()
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
        if let Err(error) = self.publisher.send(&Encoded::from(vec![frame])) {
            warn!(%error, "frontends cannot be reached by the DP coordinator");
        }
    }
}
