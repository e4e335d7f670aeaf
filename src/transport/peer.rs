//! The two halves of a connecting socket.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use dp_sidecar_protocol::Frames;
use tokio::io::AsyncReadExt;
use tokio::net::{tcp, unix};
use tokio_util::either::Either;

use super::TransportError;
use super::zmtp::{self, Decoder, Item};

/// Frames from this length on are written from where they are instead of being copied together.
const COPY_LIMIT: usize = 8 * 1024;
/// Copied bytes are written once this much has gathered.
const GATHER_LIMIT: usize = 256 * 1024;
/// Room made for one read, at least and at most: idle connections keep little.
const MIN_READ: usize = 512;
const MAX_READ: usize = 128 * 1024;

/// What comes from a peer.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    Message(Frames),
    /// A message that was too large, and was read without being kept, see [`PeerReceiver::cut_beyond`].
    TooLarge {
        /// Its first two frames, as far as they were kept.
        head: Frames,
        /// Bytes of all its frames.
        size: usize,
    },
}

/// The reading half of a connecting socket.
#[derive(Debug)]
pub struct PeerReceiver {
    address: String,
    stream: Either<tcp::OwnedReadHalf, unix::OwnedReadHalf>,
    buffer: BytesMut,
    /// Room to make for the next read: follows what comes in.
    chunk: usize,
    decoder: Decoder,
}

/// The writing half of a connecting socket. `send` returns when the kernel has the bytes.
#[derive(Debug)]
pub struct PeerSender {
    address: String,
    stream: Arc<WriteHalf>,
    /// Small frames and headers, copied together.
    tail: BytesMut,
    /// What comes before `tail`.
    chunks: VecDeque<Bytes>,
    queued: usize,
}

impl PeerReceiver {
    /// Of a connection that has been greeted.
    pub(super) fn new(
        address: &str,
        stream: Either<tcp::OwnedReadHalf, unix::OwnedReadHalf>,
        buffer: BytesMut,
        decoder: Decoder,
    ) -> Self {
        Self { address: address.to_owned(), stream, buffer, chunk: MIN_READ, decoder }
    }

    /// From now on a message of more bytes, or of too many frames, is no reason to end the connection.
    pub fn cut_beyond(&mut self, bytes: usize) {
        self.decoder.cut_beyond(bytes);
    }

    /// The next message. Cancel-safe.
    ///
    /// # Errors
    /// [`TransportError::Disconnected`] or [`TransportError::Protocol`]; the connection is over.
    pub async fn recv(&mut self) -> Result<Frames, TransportError> {
        match self.recv_any().await? {
            Received::Message(frames) => Ok(frames),
            Received::TooLarge { size, .. } => Err(TransportError::Protocol {
                address: self.address.clone(),
                reason: format!("a message of {size} bytes"),
            }),
        }
    }

    /// As [`Self::recv`]; too large ones, too.
    ///
    /// # Errors
    /// As there.
    pub async fn recv_any(&mut self) -> Result<Received, TransportError> {
        loop {
            if let Some(received) = self.try_recv()? {
                return Ok(received);
            }
            self.fill().await?;
        }
    }

    /// The next message, if it has come in already with an earlier read.
    ///
    /// # Errors
    /// [`TransportError::Protocol`]; the connection is over.
    pub fn try_recv(&mut self) -> Result<Option<Received>, TransportError> {
        loop {
            match self.decoder.decode(&mut self.buffer) {
                Ok(Some(Item::Message(frames))) => {
                    return Ok(Some(match self.decoder.take_cut() {
                        None => Received::Message(frames),
                        Some(size) => Received::TooLarge { head: frames, size },
                    }));
                }
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
            Ok(0) => Err(TransportError::disconnected(&self.address, "the peer closed the connection")),
            Ok(count) => {
                if count == room {
                    self.chunk = (self.chunk * 2).min(MAX_READ);
                } else if count < self.chunk / 4 {
                    self.chunk = (self.chunk / 2).max(MIN_READ);
                }
                Ok(())
            }
            Err(error) => Err(TransportError::disconnected(&self.address, error)),
        }
    }
}

impl PeerSender {
    pub(super) fn new(address: &str, stream: WriteHalf) -> Self {
        Self {
            address: address.to_owned(),
            stream: Arc::new(stream),
            tail: BytesMut::new(),
            chunks: VecDeque::new(),
            queued: 0,
        }
    }

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
                Ok(0) => {
                    return Err(TransportError::disconnected(&self.address, "it closed its receiving side"));
                }
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(TransportError::disconnected(&self.address, error)),
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
            writable.map_err(|error| TransportError::disconnected(&self.address, error))?;
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
}

#[derive(Debug)]
pub(super) enum WriteHalf {
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
}
