//! What nodes say to each other in a transfer, and how it is cut into frames: one byte of kind, a `u32` length (big
//! endian), the payload. A control frame holds one msgpack value; a data frame a `u32` chunk number and its bytes.

use std::io::{self, IoSlice, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::net::RecvFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::msgpack;
use crate::staging::digest::Digest;
use crate::staging::error::StageError;
use crate::staging::layout::FileSize;

/// Version of the protocol. Another one is refused.
pub(super) const VERSION: u32 = 1;
/// Longest control frame, in bytes.
pub(super) const MAX_CONTROL: u32 = 32 << 20;
/// Read at once, in bytes.
const PIECE: usize = 1 << 20;
/// Reads and writes give up after this long and look around.
pub(super) const TICK: Duration = Duration::from_millis(250);
/// A side with nothing to say says so this often.
pub(super) const PING: Duration = Duration::from_secs(1);
/// Bytes of a digest with its chunk number.
const ENTRY: usize = 4 + Digest::LEN;

const CONTROL: u8 = 1;
const DATA: u8 = 2;
const HEAD: usize = 5;

/// From the sending node.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromSender {
    /// The first frame: which update's files are coming from which node, in chunks of how many bytes.
    Plan { version: u32, id: String, node: String, chunk: u32, files: Vec<FileSize> },
    /// Digests of chunks, 20 bytes each, see [`entries`].
    Known(Bytes),
    /// All are told; the digest of the whole.
    AllKnown(String),
    /// This side lives, and has nothing to say.
    Ping,
    /// It failed over there.
    Failed(String),
}

/// From the receiving node.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::staging) enum FromReceiver {
    /// The first frame: the plan is accepted by this node.
    Accept { node: String },
    /// Chunks that are to be sent: 4 bytes each, big endian.
    Want(Bytes),
    /// All is there and checked.
    Done,
    /// This side lives, and has nothing to say.
    Ping,
    /// It failed over there.
    Failed(String),
}

/// What was read.
#[derive(Debug)]
pub(super) enum Incoming<T> {
    Control(T),
    /// A chunk's number, and the length of its bytes, which are to be read next.
    Data {
        chunk: u32,
        length: u32,
    },
}

/// Says whether the job has ended meanwhile: then nothing more is read or written.
pub(in crate::staging) type Ended<'a> = &'a dyn Fn() -> bool;

/// One side of the connection of a transfer. Blocks, but looks around every [`TICK`].
#[derive(Debug)]
pub(in crate::staging) struct Line {
    stream: TcpStream,
    idle_limit: Duration,
    /// When bytes came or were taken last.
    moved: Instant,
    /// The sending node, for errors.
    pub(super) from: String,
    /// The receiving node, for errors.
    pub(super) to: String,
}

impl Line {
    /// Of a connected socket; `idle_limit` counts from now.
    pub(in crate::staging) fn new(
        stream: TcpStream,
        idle_limit: Duration,
        from: String,
        to: String,
    ) -> Result<Self, StageError> {
        let line = Self { stream, idle_limit, moved: Instant::now(), from, to };
        let set = |stream: &TcpStream| {
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(TICK))?;
            stream.set_write_timeout(Some(TICK))
        };
        set(&line.stream).map_err(|error| line.lost(&error))?;
        Ok(line)
    }

    /// A second handle of the connection, for another thread.
    pub(in crate::staging) fn another(&self) -> Result<Self, StageError> {
        let stream = self.stream.try_clone().map_err(|error| self.lost(&error))?;
        let (from, to) = (self.from.clone(), self.to.clone());
        Ok(Self { stream, idle_limit: self.idle_limit, moved: Instant::now(), from, to })
    }

    /// The other side does what it should not, or failed.
    pub(super) fn fault(&self, reason: impl Into<String>) -> StageError {
        StageError::Transfer { from: self.from.clone(), to: self.to.clone(), reason: reason.into() }
    }

    fn lost(&self, error: &io::Error) -> StageError {
        self.fault(format!("the connection is lost: {error}"))
    }

    /// For how long nothing has moved; an error from the limit on, or if the job has ended.
    fn check(&self, what: &str, ended: Ended<'_>) -> Result<(), StageError> {
        if self.moved.elapsed() > self.idle_limit {
            return Err(self.fault(format!("no byte {what} for {:?}", self.idle_limit)));
        }
        if ended() { Err(StageError::Cancelled) } else { Ok(()) }
    }

    /// Whether the other side has to hear that this one lives.
    pub(super) fn is_quiet(&self) -> bool {
        self.moved.elapsed() >= PING
    }

    /// Reads the head of the next frame, and the whole of a control frame.
    pub(super) fn next<T: DeserializeOwned>(&mut self, ended: Ended<'_>) -> Result<Incoming<T>, StageError> {
        let mut head = [0; HEAD];
        self.read(&mut head, ended)?;
        let [kind, length @ ..] = head;
        let length = u32::from_be_bytes(length);
        match kind {
            CONTROL if length <= MAX_CONTROL => {
                let (mut payload, length) = (Vec::new(), length as usize);
                // The length is only declared: room is taken for what has come.
                while payload.len() < length {
                    let from = payload.len();
                    payload.resize(length.min(from + PIECE), 0);
                    self.read(&mut payload[from..], ended)?;
                }
                let value = msgpack::decode(&payload);
                value.map(Incoming::Control).map_err(|error| self.fault(error.to_string()))
            }
            DATA if length >= 4 => {
                let mut chunk = [0; 4];
                self.read(&mut chunk, ended)?;
                Ok(Incoming::Data { chunk: u32::from_be_bytes(chunk), length: length - 4 })
            }
            _ => Err(self.fault(format!("a frame of kind {kind} and {length} bytes"))),
        }
    }

    /// Fills the buffer.
    pub(super) fn read(&mut self, buffer: &mut [u8], ended: Ended<'_>) -> Result<(), StageError> {
        let mut at = 0;
        while at < buffer.len() {
            let end = buffer.len().min(at + PIECE);
            // Waits for the whole piece: one wake-up instead of one for each few segments of TCP.
            match rustix::net::recv(&self.stream, &mut buffer[at..end], RecvFlags::WAITALL) {
                Ok((_, 0)) => return Err(self.lost(&io::ErrorKind::UnexpectedEof.into())),
                Ok((_, count)) => {
                    self.moved = Instant::now();
                    at += count;
                    if at < end {
                        self.check("came", ended)?;
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => self.check("came", ended)?,
                Err(error) => return Err(self.lost(&error.into())),
            }
        }
        Ok(())
    }

    /// Writes a control frame.
    pub(super) fn control<T: Serialize>(&mut self, value: &T, ended: Ended<'_>) -> Result<(), StageError> {
        let payload = rmp_serde::to_vec_named(value).map_err(|error| self.fault(error.to_string()))?;
        let length = u32::try_from(payload.len()).ok().filter(|length| *length <= MAX_CONTROL);
        let length = length.ok_or_else(|| self.fault("a control frame is too long"))?;
        let mut head = [CONTROL; HEAD];
        head[1..].copy_from_slice(&length.to_be_bytes());
        self.write(&head, &payload, ended)
    }

    /// Writes a data frame, straight from the segment.
    pub(super) fn data(&mut self, chunk: u32, bytes: &[u8], ended: Ended<'_>) -> Result<(), StageError> {
        let length = u32::try_from(bytes.len() + 4).map_err(|_| self.fault("a chunk is too long"))?;
        let mut head = [DATA; HEAD + 4];
        head[1..HEAD].copy_from_slice(&length.to_be_bytes());
        head[HEAD..].copy_from_slice(&chunk.to_be_bytes());
        self.write(&head, bytes, ended)
    }

    fn write(&mut self, mut head: &[u8], mut bytes: &[u8], ended: Ended<'_>) -> Result<(), StageError> {
        self.moved = Instant::now();
        while !head.is_empty() || !bytes.is_empty() {
            match self.stream.write_vectored(&[IoSlice::new(head), IoSlice::new(bytes)]) {
                Ok(0) => return Err(self.lost(&io::ErrorKind::WriteZero.into())),
                Ok(count) => {
                    self.moved = Instant::now();
                    let of_head = count.min(head.len());
                    head = &head[of_head..];
                    bytes = &bytes[count - of_head..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.check("was taken", ended)?,
                Err(error) => return Err(self.lost(&error)),
            }
        }
        Ok(())
    }

    /// Tells the other side why this one ends, if it can still be told.
    pub(in crate::staging) fn end(&mut self, why: Option<&impl Serialize>) {
        if let Some(why) = why {
            let _ = self.control(why, &|| false);
        }
        // Fails if the other side is gone, which is as well.
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
    }
}

/// Packs digests with their chunk numbers.
pub(super) fn pack_entries(entries: &[(u32, Digest)]) -> Bytes {
    let mut packed = Vec::with_capacity(entries.len() * ENTRY);
    for (chunk, digest) in entries {
        packed.extend_from_slice(&chunk.to_be_bytes());
        packed.extend_from_slice(digest.as_bytes());
    }
    packed.into()
}

/// Unpacks digests with their chunk numbers.
pub(super) fn entries(packed: &[u8]) -> Result<Vec<(u32, Digest)>, String> {
    if !packed.len().is_multiple_of(ENTRY) {
        return Err(format!("{} bytes of digests", packed.len()));
    }
    let entries = packed.chunks_exact(ENTRY).filter_map(|entry| {
        let (chunk, digest) = entry.split_first_chunk()?;
        Some((u32::from_be_bytes(*chunk), Digest::from_bytes(*digest.first_chunk()?)))
    });
    Ok(entries.collect())
}

/// Packs chunk numbers.
pub(super) fn pack_chunks(chunks: &[u32]) -> Bytes {
    chunks.iter().flat_map(|chunk| chunk.to_be_bytes()).collect::<Vec<u8>>().into()
}

/// Unpacks chunk numbers.
pub(super) fn chunks(packed: &[u8]) -> Result<Vec<u32>, String> {
    let (chunks, rest) = packed.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(format!("{} bytes of chunk numbers", packed.len()));
    }
    Ok(chunks.iter().map(|chunk| u32::from_be_bytes(*chunk)).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn digests_and_chunk_numbers_survive_packing(numbers in prop::collection::vec(any::<u32>(), 0..40)) {
            let known: Vec<_> = numbers.iter().map(|n| (*n, Digest::of(&n.to_le_bytes()))).collect();
            prop_assert_eq!(entries(&pack_entries(&known)).unwrap(), known);
            prop_assert_eq!(chunks(&pack_chunks(&numbers)).unwrap(), numbers);
        }

        #[test]
        fn garbage_is_refused_and_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(entries(&bytes).is_ok(), bytes.len() % 20 == 0);
            prop_assert_eq!(chunks(&bytes).is_ok(), bytes.len() % 4 == 0);
        }
    }
}
