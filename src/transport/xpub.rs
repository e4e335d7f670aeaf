//! XPUB that listens for engines.

use std::time::Duration;

use dp_sidecar_protocol::Frames;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use zeromq::util::PeerIdentity;
use zeromq::{MultiPeerBackend, Socket, SocketEvent, SocketRecv, SocketSend, XPubSocket, ZmqMessage};

use super::TransportError;
use super::listen::{bind, unlink};

/// Messages waiting to be published, and upstream messages waiting to be read.
const QUEUE: usize = 256;

/// XPUB with a task of its own, because the crate's `send` waits for the slowest subscriber. Meant
/// for one engine (one socket per rank and incarnation). Closes when this and all publishers are
/// dropped.
///
/// Like `XPUB_VERBOSE` it reports every subscription. It cannot report that a subscriber left.
#[derive(Debug)]
pub struct XpubListener {
    address: String,
    publisher: mpsc::Sender<Frames>,
    upstream: mpsc::Receiver<Frames>,
    task: JoinHandle<()>,
}

/// Publishes on an [`XpubListener`].
#[derive(Clone, Debug)]
pub struct XpubPublisher {
    address: String,
    publisher: mpsc::Sender<Frames>,
}

impl XpubListener {
    /// Binds; see [`super::RouterListener::bind`]. A subscriber that takes nothing for `send_timeout`
    /// ends the socket: `recv` and `send` then report the disconnection.
    ///
    /// # Errors
    /// As [`super::RouterListener::bind`].
    pub async fn bind(address: &str, send_timeout: Duration) -> Result<Self, TransportError> {
        let mut socket = XPubSocket::new();
        let monitor = socket.monitor();
        let address = bind(&mut socket, address).await?;
        let (publisher, commands) = mpsc::channel(QUEUE);
        let (events, upstream) = mpsc::channel(QUEUE);
        let owned = Owned { socket, peers: Vec::new() };
        let name = address.clone();
        let task = tokio::spawn(async move {
            run(owned, monitor, commands, events, &name, send_timeout).await;
        });
        Ok(Self { address, publisher, upstream, task })
    }

    /// The address, with the port that was taken.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A publisher.
    pub fn publisher(&self) -> XpubPublisher {
        XpubPublisher { address: self.address.clone(), publisher: self.publisher.clone() }
    }

    /// Publishes; see [`XpubPublisher::send`].
    ///
    /// # Errors
    /// As [`XpubPublisher::send`].
    pub fn send(&self, frames: Frames) -> Result<(), TransportError> {
        send(&self.address, &self.publisher, frames)
    }

    /// The next subscription (`01...`, `00...`) or upstream message. Cancel-safe.
    ///
    /// # Errors
    /// [`TransportError::Disconnected`] when a subscriber was stuck; the socket is over.
    pub async fn recv(&mut self) -> Result<Frames, TransportError> {
        self.upstream.recv().await.ok_or_else(|| stuck(&self.address))
    }
}

impl Drop for XpubListener {
    fn drop(&mut self) {
        unlink(&self.address);
        self.task.abort();
    }
}

impl XpubPublisher {
    /// Queues a message for all subscribers. Never blocks.
    ///
    /// # Errors
    /// [`TransportError::Disconnected`] when a subscriber is stuck; the socket is over.
    pub fn send(&self, frames: Frames) -> Result<(), TransportError> {
        send(&self.address, &self.publisher, frames)
    }
}

fn send(address: &str, publisher: &mpsc::Sender<Frames>, frames: Frames) -> Result<(), TransportError> {
    publisher.try_send(frames).map_err(|_| stuck(address))
}

fn stuck(address: &str) -> TransportError {
    TransportError::Disconnected {
        address: address.to_owned(),
        reason: "the subscriber does not read".to_owned(),
    }
}

/// The socket and the peers it accepted, so that dropping it closes their connections: the crate's
/// XPUB leaves them open.
struct Owned {
    socket: XPubSocket,
    peers: Vec<PeerIdentity>,
}

impl Drop for Owned {
    fn drop(&mut self) {
        let backend = self.socket.backend();
        for peer in &self.peers {
            MultiPeerBackend::peer_disconnected(&*backend, peer);
        }
    }
}

async fn run(
    mut owned: Owned,
    mut monitor: futures::channel::mpsc::Receiver<SocketEvent>,
    mut commands: mpsc::Receiver<Frames>,
    events: mpsc::Sender<Frames>,
    address: &str,
    send_timeout: Duration,
) {
    loop {
        tokio::select! {
            biased;
            Some(event) = monitor.next() => {
                if let SocketEvent::Accepted(_, peer) = event {
                    owned.peers.push(peer);
                }
            }
            received = owned.socket.recv() => match received {
                Ok(message) => {
                    // A reader that does not keep up loses upstream data, never a subscription's effect.
                    if events.try_send(message.into_vec()).is_err() {
                        tracing::warn!(address, "upstream message dropped: its reader is behind");
                    }
                }
                Err(error) => {
                    tracing::debug!(address, %error, "connection error");
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            },
            command = commands.recv() => {
                let Some(frames) = command else { return };
                let Ok(message) = ZmqMessage::try_from(frames) else { continue };
                // Cancelling a send leaves half a message: after the timeout the socket is dropped.
                match tokio::time::timeout(send_timeout, owned.socket.send(message)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(address, %error, "publishing failed"),
                    Err(_) => {
                        tracing::warn!(address, ?send_timeout, "a subscriber does not read");
                        return;
                    }
                }
            }
        }
    }
}
