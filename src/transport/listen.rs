//! Listening sockets for engines: ROUTER and PULL.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::Frames;
use futures::StreamExt;
use futures::channel::mpsc;
use zeromq::{
    PullSocket, RouterRecvHalf, RouterSendHalf, RouterSocket, Socket, SocketBackend, SocketEvent, SocketRecv,
    SocketSend, ZmqError, ZmqMessage,
};

use super::{TransportError, unlink_stale_socket};

/// After a connection's error, so that a peer that breaks again and again cannot take a core.
const ERROR_PAUSE: Duration = Duration::from_millis(5);

/// What a ROUTER reports.
#[derive(Debug, PartialEq, Eq)]
pub enum RouterEvent {
    /// With the sender's routing id, which is no part of the frames.
    Message { identity: Bytes, frames: Frames },
    /// The connection of the peer with this routing id is over. All its messages have been reported before.
    Disconnected { identity: Bytes },
}

/// What a PULL reports.
#[derive(Debug, PartialEq, Eq)]
pub enum PullEvent {
    Message(Frames),
    /// A connection is over. All its messages have been reported before.
    Disconnected,
}

/// ROUTER that listens for engines. Everything closes when this and all its senders are dropped.
pub struct RouterListener {
    address: String,
    receiver: RouterRecvHalf,
    sender: RouterSendHalf,
    monitor: mpsc::Receiver<SocketEvent>,
}

/// Sends to the peers of a [`RouterListener`].
#[derive(Clone)]
pub struct RouterSender {
    address: String,
    sender: RouterSendHalf,
}

impl fmt::Debug for RouterListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RouterListener").field(&self.address).finish()
    }
}

impl fmt::Debug for RouterSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RouterSender").field(&self.address).finish()
    }
}

impl RouterListener {
    /// Binds to `tcp://127.0.0.1:0` (or another numeric address and port) or `ipc://path`. A stale
    /// socket file is removed first.
    ///
    /// # Errors
    /// The address is malformed, too long, in use, or not ours to bind.
    pub async fn bind(address: &str) -> Result<Self, TransportError> {
        let mut socket = RouterSocket::new();
        let monitor = socket.monitor();
        let address = bind(&mut socket, address).await?;
        let (sender, receiver) = socket.split();
        Ok(Self { address, receiver, sender, monitor })
    }

    /// The address, with the port that was taken.
    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn sender(&self) -> RouterSender {
        RouterSender { address: self.address.clone(), sender: self.sender.clone() }
    }

    /// The next event. Cancel-safe.
    pub async fn recv(&mut self) -> RouterEvent {
        loop {
            tokio::select! {
                biased;
                received = self.receiver.recv() => match received {
                    Ok(message) => {
                        let mut frames = message.into_vecdeque();
                        if let Some(identity) = frames.pop_front() {
                            return RouterEvent::Message { identity, frames: frames.into() };
                        }
                    }
                    Err(error) => connection_error(&self.address, &error).await,
                },
                Some(event) = self.monitor.next() => match event {
                    SocketEvent::Accepted(..) => unlink(&self.address),
                    SocketEvent::Disconnected(peer) => {
                        return RouterEvent::Disconnected { identity: peer.into() };
                    }
                    _ => {}
                }
            }
        }
    }
}

impl RouterSender {
    /// Queues a message for a peer. `Ok` does not mean delivered. Never cancel it: a message whose
    /// sending was cancelled may go out all the same.
    ///
    /// # Errors
    /// [`TransportError::Disconnected`] if no peer with this routing id is connected.
    pub async fn send(&mut self, identity: &[u8], frames: Frames) -> Result<(), TransportError> {
        let mut message = ZmqMessage::from(Bytes::copy_from_slice(identity));
        for frame in frames {
            message.push_back(frame);
        }
        let sent = self.sender.send(message).await;
        sent.map_err(|error| TransportError::disconnected(&self.address, error))
    }
}

/// PULL that listens for engines. Closes its connections when dropped.
pub struct PullListener {
    address: String,
    socket: PullSocket,
    monitor: mpsc::Receiver<SocketEvent>,
}

impl fmt::Debug for PullListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PullListener").field(&self.address).finish()
    }
}

impl PullListener {
    /// Binds; see [`RouterListener::bind`].
    ///
    /// # Errors
    /// As [`RouterListener::bind`].
    pub async fn bind(address: &str) -> Result<Self, TransportError> {
        let mut socket = PullSocket::new();
        let monitor = socket.monitor();
        let address = bind(&mut socket, address).await?;
        Ok(Self { address, socket, monitor })
    }

    /// The address, with the port that was taken.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The next event. Cancel-safe.
    pub async fn recv(&mut self) -> PullEvent {
        loop {
            tokio::select! {
                biased;
                received = self.socket.recv() => match received {
                    Ok(message) => return PullEvent::Message(message.into_vec()),
                    Err(error) => connection_error(&self.address, &error).await,
                },
                Some(event) = self.monitor.next() => match event {
                    SocketEvent::Accepted(..) => unlink(&self.address),
                    SocketEvent::Disconnected(_) => return PullEvent::Disconnected,
                    _ => {}
                }
            }
        }
    }
}

impl Drop for RouterListener {
    fn drop(&mut self) {
        unlink(&self.address);
    }
}

impl Drop for PullListener {
    fn drop(&mut self) {
        unlink(&self.address);
        // The crate's PULL leaves its connections open: wakers and streams hold each other.
        let backend = self.socket.backend();
        SocketBackend::shutdown(&*backend);
    }
}

/// Removes the file of a socket: when its one engine is connected, so that nobody else can be, and before it is
/// dropped. The crate does the latter too, but later, and a connection that it accepts until then stays open for ever.
pub(super) fn unlink(address: &str) {
    if let Some(path) = address.strip_prefix("ipc://") {
        let _ = std::fs::remove_file(path);
    }
}

/// Binds a socket of the crate; the resolved address.
pub(super) async fn bind<S: Socket>(socket: &mut S, address: &str) -> Result<String, TransportError> {
    if let Some(path) = address.strip_prefix("ipc://") {
        // `ipc://*` panics in the crate, `ipc://@name` makes a file of that name.
        if !path.starts_with('/') {
            return Err(TransportError::address(address, "expected an absolute path"));
        }
        unlink_stale_socket(path.as_ref())?;
    } else if !address.starts_with("tcp://") || address.contains('*') {
        return Err(TransportError::address(address, "expected tcp://address:port or ipc:///path"));
    }
    let bound = socket.bind(address).await.map_err(|error| TransportError::bind(address, error))?;
    Ok(bound.to_string())
}

async fn connection_error(address: &str, error: &ZmqError) {
    tracing::debug!(address, %error, "connection error");
    tokio::time::sleep(ERROR_PAUSE).await;
}
