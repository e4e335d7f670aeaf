//! Connecting sockets: DEALER, PUSH and XSUB towards a frontend.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::Frames;
use dp_sidecar_protocol::frames::SUBSCRIBE_ALL;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout_at};

use super::TransportError;
use super::peer::{PeerReceiver, PeerSender, ReadHalf, WriteHalf};
use super::zmtp::{self, GREETING_LENGTH, Item};
use crate::net::KeepAlive;

/// Between two attempts while nobody listens yet.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// A socket that is connected to one peer. While nobody listens at an address, connecting is tried again until `limit`
/// is over; it fails with [`TransportError::Address`], [`TransportError::Connect`], [`TransportError::Timeout`] or
/// [`TransportError::Protocol`].
#[derive(Debug)]
pub struct Connected {
    sender: PeerSender,
    receiver: PeerReceiver,
}

impl Connected {
    /// DEALER to a ROUTER, with this routing id (the two bytes of an engine identity).
    ///
    /// # Errors
    /// See [`Connected`].
    pub async fn dealer(address: &str, identity: &[u8], limit: Duration) -> Result<Self, TransportError> {
        open(address, "DEALER", "ROUTER", Some(identity), limit).await
    }

    /// PUSH to a PULL, which sends nothing: receiving only ever reports the disconnection.
    ///
    /// # Errors
    /// See [`Connected`].
    pub async fn push(address: &str, limit: Duration) -> Result<Self, TransportError> {
        open(address, "PUSH", "PULL", None, limit).await
    }

    /// XSUB to an XPUB. Nothing is received before [`Self::subscribe`], and what is sent must not begin with the byte
    /// 0 or 1 (a subscription).
    ///
    /// # Errors
    /// See [`Connected`].
    pub async fn xsub(address: &str, limit: Duration) -> Result<Self, TransportError> {
        open(address, "XSUB", "XPUB", None, limit).await
    }

    /// Sends the subscription to everything (`01`).
    ///
    /// # Errors
    /// The connection is over.
    pub async fn subscribe(&mut self) -> Result<(), TransportError> {
        self.send(vec![Bytes::from_static(SUBSCRIBE_ALL)]).await
    }

    /// See [`PeerReceiver::recv`].
    ///
    /// # Errors
    /// The connection is over.
    pub async fn recv(&mut self) -> Result<Frames, TransportError> {
        self.receiver.recv().await
    }

    /// See [`PeerSender::send`].
    ///
    /// # Errors
    /// The connection is over.
    pub async fn send(&mut self, frames: Frames) -> Result<(), TransportError> {
        self.sender.send(frames).await
    }

    /// Waits until the peer is gone, and says what was seen. Cancel-safe.
    pub async fn disconnected(&mut self) -> TransportError {
        loop {
            if let Err(error) = self.recv().await {
                return error;
            }
        }
    }

    /// Halves for two tasks. The connection closes when both are dropped.
    pub fn split(self) -> (PeerSender, PeerReceiver) {
        (self.sender, self.receiver)
    }
}

enum Target<'a> {
    Tcp(&'a str),
    Ipc(PathBuf),
}

async fn open(
    address: &str,
    own_type: &str,
    peer_type: &str,
    identity: Option<&[u8]>,
    limit: Duration,
) -> Result<Connected, TransportError> {
    let target = if let Some(host_port) = address.strip_prefix("tcp://") {
        Target::Tcp(host_port)
    } else if let Some(path) = address.strip_prefix("ipc://") {
        super::check_socket_path(path.as_ref())?;
        Target::Ipc(path.into())
    } else {
        return Err(TransportError::Address {
            address: address.to_owned(),
            reason: "expected tcp://host:port or ipc://path".to_owned(),
        });
    };
    let deadline = Instant::now() + limit;
    let late = |stage| TransportError::Timeout { address: address.to_owned(), stage, limit };
    let (reader, writer) =
        timeout_at(deadline, connect(&target)).await.map_err(|_| late("connect"))?.map_err(|error| {
            TransportError::Connect { address: address.to_owned(), reason: error.to_string() }
        })?;
    let mut receiver = PeerReceiver::new(address, reader);
    let mut sender = PeerSender::new(address, writer);
    timeout_at(deadline, handshake(&mut sender, &mut receiver, own_type, peer_type, identity))
        .await
        .map_err(|_| late("ZMTP handshake"))??;
    Ok(Connected { sender, receiver })
}

/// vLLM's sockets have no heartbeat. A silent peer is given up after a minute and a half, not sooner: a frontend is lost
/// for good with one connection, so a cable that is cut and healed within a minute must not end one. A process that
/// dies is told at once all the same.
const KEEP_ALIVE: KeepAlive = KeepAlive { idle: 30, interval: 10, probes: 6, unacknowledged: 90_000 };

async fn connect(target: &Target<'_>) -> io::Result<(ReadHalf, WriteHalf)> {
    loop {
        let attempt = match target {
            Target::Tcp(host_port) => TcpStream::connect(host_port).await.and_then(|stream| {
                stream.set_nodelay(true)?;
                KEEP_ALIVE.apply(&stream)?;
                let (reader, writer) = stream.into_split();
                Ok((ReadHalf::Tcp(reader), WriteHalf::Tcp(writer)))
            }),
            Target::Ipc(path) => UnixStream::connect(path).await.map(|stream| {
                let (reader, writer) = stream.into_split();
                (ReadHalf::Unix(reader), WriteHalf::Unix(writer))
            }),
        };
        match attempt {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
                    && (matches!(target, Target::Ipc(_))
                        || error.kind() == io::ErrorKind::ConnectionRefused) =>
            {
                sleep(RETRY_INTERVAL).await;
            }
            other => return other,
        }
    }
}

async fn handshake(
    sender: &mut PeerSender,
    receiver: &mut PeerReceiver,
    own_type: &str,
    peer_type: &str,
    identity: Option<&[u8]>,
) -> Result<(), TransportError> {
    let address = sender.address.clone();
    let broken = |reason: String| TransportError::Protocol { address: address.clone(), reason };
    let lost = |error: io::Error| TransportError::Disconnected {
        address: address.clone(),
        reason: format!("during the ZMTP handshake: {error}"),
    };
    if identity.is_some_and(|identity| identity.is_empty() || identity.len() > 200) {
        return Err(broken("a routing id has 1 to 200 bytes".to_owned()));
    }
    let mut hello = zmtp::greeting().to_vec();
    sender.stream.write_all(&hello).await.map_err(lost)?;
    let mut greeting = [0; GREETING_LENGTH];
    receiver.stream.read_exact(&mut greeting).await.map_err(lost)?;
    zmtp::check_greeting(&greeting).map_err(broken)?;
    hello = zmtp::ready(own_type, identity);
    sender.stream.write_all(&hello).await.map_err(lost)?;
    loop {
        let item =
            receiver.decoder.decode(&mut receiver.buffer).map_err(|error| broken(error.to_string()))?;
        match item {
            None => receiver.fill().await?,
            Some(Item::Command(command)) => {
                return zmtp::check_ready(&command, peer_type).map_err(broken);
            }
            Some(Item::Message(_)) => return Err(broken("a message before READY".to_owned())),
        }
    }
}
