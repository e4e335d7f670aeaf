//! Connecting sockets: DEALER, PUSH and XSUB towards a frontend.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSlice};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use dp_sidecar_protocol::Frames;
use dp_sidecar_protocol::frames::SUBSCRIBE_ALL;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio::time::{Instant, sleep, timeout_at};

use super::TransportError;
use super::zmtp::{self, Decoder, GREETING_LENGTH, Item};

/// Frames from this length on are written from where they are instead of being copied together.
const COPY_LIMIT: usize = 8 * 1024;
/// Copied bytes are written once this much has gathered.
const GATHER_LIMIT: usize = 256 * 1024;
/// Room made for one read, at least and at most: idle connections keep little.
const MIN_READ: usize = 512;
const MAX_READ: usize = 128 * 1024;
/// Between two attempts while nobody listens yet.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// The reading half of a connecting socket.
pub struct PeerReceiver {
    address: String,
    stream: ReadHalf,
    buffer: BytesMut,
    /// Room to make for the next read: follows what comes in.
    chunk: usize,
    decoder: Decoder,
}

/// The writing half of a connecting socket. `send` returns when the kernel has the bytes.
pub struct PeerSender {
    address: String,
    stream: Arc<WriteHalf>,
    /// Small frames and headers, copied together.
    tail: BytesMut,
    /// What comes before `tail`.
    chunks: VecDeque<Bytes>,
    queued: usize,
}

impl fmt::Debug for PeerReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PeerReceiver").field(&self.address).finish()
    }
}

impl fmt::Debug for PeerSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PeerSender").field(&self.address).finish()
    }
}

impl PeerReceiver {
    /// The next message. Cancel-safe.
    ///
    /// # Errors
    /// [`TransportError::Disconnected`] or [`TransportError::Protocol`]; the connection is over.
    pub async fn recv(&mut self) -> Result<Frames, TransportError> {
        loop {
            if let Some(frames) = self.try_recv()? {
                return Ok(frames);
            }
            self.fill().await?;
        }
    }

    /// The next message, if it has come in already with an earlier read.
    ///
    /// # Errors
    /// [`TransportError::Protocol`]; the connection is over.
    pub fn try_recv(&mut self) -> Result<Option<Frames>, TransportError> {
        loop {
            match self.decoder.decode(&mut self.buffer) {
                Ok(Some(Item::Message(frames))) => return Ok(Some(frames)),
                Ok(Some(Item::Command(_))) => {}
                Ok(None) => return Ok(None),
                Err(error) => {
                    return Err(TransportError::Protocol {
                        address: self.address.clone(),
                        reason: error.to_string(),
                    });
                }
            }
        }
    }

    async fn fill(&mut self) -> Result<(), TransportError> {
        if self.buffer.is_empty() && self.buffer.capacity() > 4 * self.chunk {
            self.buffer = BytesMut::new();
        }
        if self.buffer.capacity() - self.buffer.len() < self.chunk {
            self.buffer.reserve(self.chunk);
        }
        let room = self.buffer.capacity() - self.buffer.len();
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(0) => Err(self.disconnected("the peer closed the connection".to_owned())),
            Ok(count) => {
                if count == room {
                    self.chunk = (self.chunk * 2).min(MAX_READ);
                } else if count < self.chunk / 4 {
                    self.chunk = (self.chunk / 2).max(MIN_READ);
                }
                Ok(())
            }
            Err(error) => Err(self.disconnected(error.to_string())),
        }
    }

    fn disconnected(&self, reason: String) -> TransportError {
        TransportError::Disconnected {
            address: self.address.clone(),
            reason,
        }
    }
}

impl PeerSender {
    /// Sends one message. Not cancel-safe in the sense that a cancelled message may still go out with
    /// the next call; it is never cut in half.
    ///
    /// # Errors
    /// [`TransportError::Disconnected`]; the connection is over.
    pub async fn send(&mut self, frames: Frames) -> Result<(), TransportError> {
        self.push(frames);
        self.flush().await
    }

    /// Queues one message. Nothing is written before [`Self::try_flush`] or [`Self::flush`]; watch
    /// [`Self::queued`].
    pub fn push(&mut self, frames: Frames) {
        let last = frames.len().saturating_sub(1);
        for (at, frame) in frames.into_iter().enumerate() {
            zmtp::encode_header(frame.len(), at < last, &mut self.tail);
            self.queued += frame.len() + 2;
            if frame.len() < COPY_LIMIT {
                self.tail.extend_from_slice(&frame);
            } else {
                self.chunks.push_back(self.tail.split().freeze());
                self.chunks.push_back(frame);
            }
            if self.tail.len() >= GATHER_LIMIT {
                self.chunks.push_back(self.tail.split().freeze());
            }
        }
    }

    /// Bytes that are queued and not yet with the kernel (headers counted roughly).
    pub const fn queued(&self) -> usize {
        self.queued
    }

    /// Writes as much of the queue as the kernel takes now. True if all is written.
    ///
    /// # Errors
    /// [`TransportError::Disconnected`]; the connection is over.
    pub fn try_flush(&mut self) -> Result<bool, TransportError> {
        if !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
        while !self.chunks.is_empty() {
            let mut slices = [IoSlice::new(&[]); 32];
            let mut count = 0;
            for (slice, chunk) in slices.iter_mut().zip(&self.chunks) {
                *slice = IoSlice::new(chunk);
                count += 1;
            }
            let mut written = match self.stream.try_write_vectored(&slices[..count]) {
                Ok(0) => return Err(self.disconnected("it takes no more bytes".to_owned())),
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(self.disconnected(error.to_string())),
            };
            self.queued = self.queued.saturating_sub(written);
            while let Some(chunk) = self.chunks.front_mut() {
                if written < chunk.len() {
                    chunk.advance(written);
                    break;
                }
                written -= chunk.len();
                self.chunks.pop_front();
            }
        }
        self.queued = 0;
        Ok(true)
    }

    /// Writes the whole queue. Cancel-safe: what is left goes out with the next call.
    ///
    /// # Errors
    /// [`TransportError::Disconnected`]; the connection is over.
    pub async fn flush(&mut self) -> Result<(), TransportError> {
        while !self.try_flush()? {
            let writable = self.stream.writable().await;
            writable.map_err(|error| self.disconnected(error.to_string()))?;
        }
        Ok(())
    }

    /// Completes when the kernel takes more bytes, or the connection is over: then flush again.
    pub fn writable(&self) -> impl Future<Output = ()> + Send + 'static {
        let stream = self.stream.clone();
        async move {
            // An error shows again at the next flush.
            let _ = stream.writable().await;
        }
    }

    fn disconnected(&self, reason: String) -> TransportError {
        TransportError::Disconnected {
            address: self.address.clone(),
            reason,
        }
    }
}

enum ReadHalf {
    Tcp(tcp::OwnedReadHalf),
    Unix(unix::OwnedReadHalf),
}

impl AsyncRead for ReadHalf {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Tcp(half) => Pin::new(half).poll_read(context, buffer),
            Self::Unix(half) => Pin::new(half).poll_read(context, buffer),
        }
    }
}

enum WriteHalf {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

impl WriteHalf {
    fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(half) => half.try_write_vectored(slices),
            Self::Unix(half) => half.try_write_vectored(slices),
        }
    }

    async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(half) => half.writable().await,
            Self::Unix(half) => half.writable().await,
        }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.writable().await?;
            match self.try_write_vectored(&[IoSlice::new(bytes)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// DEALER connected to one ROUTER.
#[derive(Debug)]
pub struct Dealer {
    sender: PeerSender,
    receiver: PeerReceiver,
}

impl Dealer {
    /// Connects with this routing id (the two bytes of an engine identity). While nobody listens at
    /// `address` it tries again until `limit` is over.
    ///
    /// # Errors
    /// [`TransportError::Address`], [`TransportError::Connect`], [`TransportError::Timeout`] or
    /// [`TransportError::Protocol`].
    pub async fn connect(
        address: &str,
        identity: &[u8],
        limit: Duration,
    ) -> Result<Self, TransportError> {
        let (sender, receiver) = open(address, "DEALER", "ROUTER", Some(identity), limit).await?;
        Ok(Self { sender, receiver })
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

    /// Halves for two tasks. The connection closes when both are dropped.
    pub fn split(self) -> (PeerSender, PeerReceiver) {
        (self.sender, self.receiver)
    }
}

/// PUSH connected to one PULL.
#[derive(Debug)]
pub struct Push {
    sender: PeerSender,
    receiver: PeerReceiver,
}

impl Push {
    /// Connects; see [`Dealer::connect`].
    ///
    /// # Errors
    /// As [`Dealer::connect`].
    pub async fn connect(address: &str, limit: Duration) -> Result<Self, TransportError> {
        let (sender, receiver) = open(address, "PUSH", "PULL", None, limit).await?;
        Ok(Self { sender, receiver })
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
        disconnected(&mut self.receiver).await
    }

    /// Halves for two tasks: the receiver only ever reports the disconnection.
    pub fn split(self) -> (PeerSender, PeerReceiver) {
        (self.sender, self.receiver)
    }
}

/// XSUB connected to one XPUB.
#[derive(Debug)]
pub struct Xsub {
    sender: PeerSender,
    receiver: PeerReceiver,
}

impl Xsub {
    /// Connects; see [`Dealer::connect`]. Nothing is received before [`Self::subscribe`].
    ///
    /// # Errors
    /// As [`Dealer::connect`].
    pub async fn connect(address: &str, limit: Duration) -> Result<Self, TransportError> {
        let (sender, receiver) = open(address, "XSUB", "XPUB", None, limit).await?;
        Ok(Self { sender, receiver })
    }

    /// Sends the subscription to everything (`01`).
    ///
    /// # Errors
    /// The connection is over.
    pub async fn subscribe(&mut self) -> Result<(), TransportError> {
        self.sender
            .send(vec![Bytes::from_static(SUBSCRIBE_ALL)])
            .await
    }

    /// Sends upstream data. It must not begin with the byte 0 or 1 (a subscription).
    ///
    /// # Errors
    /// The connection is over.
    pub async fn send(&mut self, frames: Frames) -> Result<(), TransportError> {
        self.sender.send(frames).await
    }

    /// See [`PeerReceiver::recv`].
    ///
    /// # Errors
    /// The connection is over.
    pub async fn recv(&mut self) -> Result<Frames, TransportError> {
        self.receiver.recv().await
    }

    /// Halves for two tasks. The connection closes when both are dropped.
    pub fn split(self) -> (PeerSender, PeerReceiver) {
        (self.sender, self.receiver)
    }
}

async fn disconnected(receiver: &mut PeerReceiver) -> TransportError {
    loop {
        if let Err(error) = receiver.recv().await {
            return error;
        }
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
) -> Result<(PeerSender, PeerReceiver), TransportError> {
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
    let late = |stage| TransportError::Timeout {
        address: address.to_owned(),
        stage,
        limit,
    };
    let (reader, writer) = timeout_at(deadline, connect(&target))
        .await
        .map_err(|_| late("connect"))?
        .map_err(|error| TransportError::Connect {
            address: address.to_owned(),
            reason: error.to_string(),
        })?;
    let mut receiver = PeerReceiver {
        address: address.to_owned(),
        stream: reader,
        buffer: BytesMut::new(),
        chunk: MIN_READ,
        decoder: Decoder::default(),
    };
    let mut sender = PeerSender {
        address: address.to_owned(),
        stream: Arc::new(writer),
        tail: BytesMut::new(),
        chunks: VecDeque::new(),
        queued: 0,
    };
    timeout_at(
        deadline,
        handshake(&mut sender, &mut receiver, own_type, peer_type, identity),
    )
    .await
    .map_err(|_| late("ZMTP handshake"))??;
    Ok((sender, receiver))
}

/// The kernel asks a silent peer after ten seconds, and gives it up fifteen later; the same for bytes
/// that it does not acknowledge. A host that lost its power says nothing, and vLLM's sockets have no
/// heartbeat.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &10)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &5)?;
    setsockopt(stream, sockopt::TcpKeepCount, &3)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &25_000)?;
    Ok(())
}

async fn connect(target: &Target<'_>) -> io::Result<(ReadHalf, WriteHalf)> {
    loop {
        let attempt = match target {
            Target::Tcp(host_port) => TcpStream::connect(host_port).await.and_then(|stream| {
                stream.set_nodelay(true)?;
                keep_alive(&stream)?;
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
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                ) && (matches!(target, Target::Ipc(_))
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
    let broken = |reason: String| TransportError::Protocol {
        address: address.clone(),
        reason,
    };
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
    receiver
        .stream
        .read_exact(&mut greeting)
        .await
        .map_err(lost)?;
    zmtp::check_greeting(&greeting).map_err(broken)?;
    hello = zmtp::ready(own_type, identity);
    sender.stream.write_all(&hello).await.map_err(lost)?;
    loop {
        let item = receiver
            .decoder
            .decode(&mut receiver.buffer)
            .map_err(|error| broken(error.to_string()))?;
        match item {
            None => receiver.fill().await?,
            Some(Item::Command(command)) => {
                return zmtp::check_ready(&command, peer_type).map_err(broken);
            }
            Some(Item::Message(_)) => return Err(broken("a message before READY".to_owned())),
        }
    }
}
