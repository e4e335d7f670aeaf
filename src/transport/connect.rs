//! Connecting sockets: DEALER, PUSH and XSUB towards a frontend.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use dp_sidecar_protocol::Frames;
use dp_sidecar_protocol::frames::SUBSCRIBE_ALL;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::either::Either;

use super::TransportError;
use super::greet::{GreetError, greet};
use super::peer::{PeerReceiver, PeerSender, WriteHalf};
use super::zmtp::{self, Decoder};
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
    pub async fn dealer(address: &str, identity: &[u8; 2], limit: Duration) -> Result<Self, TransportError> {
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
        return Err(TransportError::address(address, "expected tcp://host:port or ipc://path"));
    };
    let deadline = Instant::now() + limit;
    let late = |stage| TransportError::Timeout { address: address.to_owned(), stage, limit };
    let connected = timeout_at(deadline, connect(&target)).await.map_err(|_| late("connect"))?;
    let mut stream = connected.map_err(|error| TransportError::Connect {
        address: address.to_owned(),
        reason: error.to_string(),
    })?;
    let (mut buffer, mut decoder) = (BytesMut::new(), Decoder::default());
    let ready = zmtp::ready(own_type, identity);
    let check = |command: &[u8]| zmtp::check_ready(command, peer_type);
    let greeted = greet(&mut stream, &mut buffer, &mut decoder, &ready, check);
    match timeout_at(deadline, greeted).await.map_err(|_| late("ZMTP handshake"))? {
        Ok(_) => {}
        Err(GreetError::Protocol(reason)) => {
            return Err(TransportError::Protocol { address: address.to_owned(), reason });
        }
        Err(error) => return Err(TransportError::disconnected(address, error)),
    }
    let (reader, writer) = match stream {
        Either::Left(tcp) => {
            let (reader, writer) = tcp.into_split();
            (Either::Left(reader), WriteHalf::Tcp(writer))
        }
        Either::Right(unix) => {
            let (reader, writer) = unix.into_split();
            (Either::Right(reader), WriteHalf::Unix(writer))
        }
    };
    let receiver = PeerReceiver::new(address, reader, buffer, decoder);
    Ok(Connected { sender: PeerSender::new(address, writer), receiver })
}

/// vLLM's sockets have no heartbeat. A silent peer is given up after a minute and a half, not sooner: a frontend is lost
/// for good with one connection, so a cable that is cut and healed within a minute must not end one. A process that
/// dies is told at once all the same.
const KEEP_ALIVE: KeepAlive = KeepAlive { idle: 30, interval: 10, probes: 6, unacknowledged: 90_000 };

async fn connect(target: &Target<'_>) -> io::Result<Either<TcpStream, UnixStream>> {
    loop {
        let attempt = match target {
            Target::Tcp(host_port) => TcpStream::connect(host_port).await.and_then(|stream| {
                stream.set_nodelay(true)?;
                KEEP_ALIVE.apply(&stream)?;
                Ok(Either::Left(stream))
            }),
            Target::Ipc(path) => UnixStream::connect(path).await.map(Either::Right),
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
