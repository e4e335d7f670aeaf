//! What nodes say to each other on a hop, and how it is cut into frames: one byte of kind, a `u32` length (big
//! endian), the payload. A control frame holds one msgpack value; a data frame a `u32` chunk number and its bytes.

use std::io::{self, IoSlice, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::net::RecvFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::super::digest::Digest;
use super::super::layout::FileSize;
use crate::msgpack;

/// Version of the hop. Another one is refused.
pub(in super::super) const HOP_VERSION: u32 = 1;
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
pub(in super::super) enum Down {
    /// The first frame: what is coming.
    Plan {
        version: u32,
        /// Of the update.
        id: String,
        /// The sender's name.
        node: String,
        /// Bytes of a chunk.
        chunk: u32,
        files: Vec<FileSize>,
    },
    /// Digests of chunks, 20 bytes each, see [`entries`].
    Known(Bytes),
    /// All are told; the digest of the whole.
    AllKnown(String),
    Ping,
    /// It failed over there.
    Failed(String),
}

/// From the receiving node.
#[derive(Debug, Serialize, Deserialize)]
pub(in super::super) enum Up {
    /// The first frame: the plan is accepted by this node.
    Accept {
        node: String,
    },
    /// Chunks that are to be sent: 4 bytes each, big endian.
    Want(Bytes),
    /// All is there and checked.
    Done,
    Ping,
    /// It failed over there.
    Failed(String),
}

/// Why nothing more can be read or written.
#[derive(Debug)]
pub(in super::super) enum LineError {
    /// The job has ended meanwhile.
    Ended,
    /// The other side is silent, or does not read.
    Silent { what: &'static str, limit: Duration },
    /// The other side has closed, or the connection broke.
    Lost(io::Error),
    /// What came makes no sense.
    Garbage(String),
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

/// One side of a hop's connection. Blocks, but looks around every [`TICK`].
#[derive(Debug)]
pub(in super::super) struct Line {
    stream: TcpStream,
    idle_limit: Duration,
    moved: Instant,
}

impl Line {
    /// Of a connected socket; `moved` counts from now.
    pub(in super::super) fn new(stream: TcpStream, idle_limit: Duration) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(TICK))?;
        Ok(Self { stream, idle_limit, moved: Instant::now() })
    }

    /// A second handle of the connection, for another thread.
    pub(in super::super) fn another(&self) -> io::Result<Self> {
        Ok(Self { stream: self.stream.try_clone()?, idle_limit: self.idle_limit, moved: Instant::now() })
    }

    /// Reads the head of the next frame, and the whole of a control frame. `tick` is called while nothing comes;
    /// it says whether to go on.
    pub(super) fn next<T: DeserializeOwned>(
        &mut self,
        tick: &mut dyn FnMut() -> Result<(), LineError>,
    ) -> Result<Incoming<T>, LineError> {
        let mut head = [0; HEAD];
        self.read(&mut head, tick)?;
        let [kind, length @ ..] = head;
        let length = u32::from_be_bytes(length);
        match kind {
            CONTROL if length <= MAX_CONTROL => {
                let (mut payload, length) = (Vec::new(), length as usize);
                // The length is only declared: room is taken for what has come.
                while payload.len() < length {
                    let from = payload.len();
                    payload.resize(length.min(from + PIECE), 0);
                    self.read(&mut payload[from..], tick)?;
                }
                let value = msgpack::decode(&payload);
                value.map(Incoming::Control).map_err(|error| LineError::Garbage(error.to_string()))
            }
            DATA if length >= 4 => {
                let mut chunk = [0; 4];
                self.read(&mut chunk, tick)?;
                Ok(Incoming::Data { chunk: u32::from_be_bytes(chunk), length: length - 4 })
            }
            _ => Err(LineError::Garbage(format!("a frame of kind {kind} and {length} bytes"))),
        }
    }

    /// Fills the buffer.
    pub(super) fn read(
        &mut self,
        buffer: &mut [u8],
        tick: &mut dyn FnMut() -> Result<(), LineError>,
    ) -> Result<(), LineError> {
        let mut at = 0;
        while at < buffer.len() {
            let end = buffer.len().min(at + PIECE);
            // Waits for the whole piece: one wake-up instead of one for each few segments of TCP.
            match rustix::net::recv(&self.stream, &mut buffer[at..end], RecvFlags::WAITALL) {
                Ok((_, 0)) => return Err(LineError::Lost(io::ErrorKind::UnexpectedEof.into())),
                Ok((_, count)) => {
                    self.moved = Instant::now();
                    if at + count < end {
                        tick()?;
                    }
                    at += count;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    if self.moved.elapsed() > self.idle_limit {
                        return Err(LineError::Silent { what: "came", limit: self.idle_limit });
                    }
                    tick()?;
                }
                Err(error) => return Err(LineError::Lost(error.into())),
            }
        }
        Ok(())
    }

    /// Writes a control frame.
    pub(super) fn control<T: Serialize>(
        &mut self,
        value: &T,
        ended: &dyn Fn() -> bool,
    ) -> Result<(), LineError> {
        let payload =
            rmp_serde::to_vec_named(value).map_err(|error| LineError::Garbage(error.to_string()))?;
        let length = u32::try_from(payload.len()).ok().filter(|length| *length <= MAX_CONTROL);
        let length = length.ok_or_else(|| LineError::Garbage("a control frame is too long".to_owned()))?;
        let mut frame = Vec::with_capacity(HEAD + payload.len());
        frame.push(CONTROL);
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(&payload);
        self.write(&frame, &[], ended)
    }

    /// Writes a data frame, straight from the segment.
    pub(super) fn data(
        &mut self,
        chunk: u32,
        bytes: &[u8],
        ended: &dyn Fn() -> bool,
    ) -> Result<(), LineError> {
        let length = u32::try_from(bytes.len() + 4);
        let length = length.map_err(|_| LineError::Garbage("a chunk is too long".to_owned()))?;
        let mut head = [0; HEAD + 4];
        head[0] = DATA;
        head[1..HEAD].copy_from_slice(&length.to_be_bytes());
        head[HEAD..].copy_from_slice(&chunk.to_be_bytes());
        self.write(&head, bytes, ended)
    }

    fn write(
        &mut self,
        mut head: &[u8],
        mut bytes: &[u8],
        ended: &dyn Fn() -> bool,
    ) -> Result<(), LineError> {
        self.moved = Instant::now();
        while !head.is_empty() || !bytes.is_empty() {
            match self.stream.write_vectored(&[IoSlice::new(head), IoSlice::new(bytes)]) {
                Ok(0) => return Err(LineError::Lost(io::ErrorKind::WriteZero.into())),
                Ok(count) => {
                    self.moved = Instant::now();
                    let of_head = count.min(head.len());
                    head = &head[of_head..];
                    bytes = &bytes[count - of_head..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.moved.elapsed() > self.idle_limit {
                        return Err(LineError::Silent { what: "was taken", limit: self.idle_limit });
                    }
                    if ended() {
                        return Err(LineError::Ended);
                    }
                }
                Err(error) => return Err(LineError::Lost(error)),
            }
        }
        Ok(())
    }

    /// No more will be written.
    pub(super) fn close(&self) {
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
pub(super) fn entries(packed: &[u8]) -> Result<Vec<(u32, Digest)>, LineError> {
    if !packed.len().is_multiple_of(ENTRY) {
        return Err(LineError::Garbage(format!("{} bytes of digests", packed.len())));
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
pub(super) fn chunks(packed: &[u8]) -> Result<Vec<u32>, LineError> {
    let (chunks, rest) = packed.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(LineError::Garbage(format!("{} bytes of chunk numbers", packed.len())));
    }
    Ok(chunks.iter().map(|chunk| u32::from_be_bytes(*chunk)).collect())
}

/// For `crate::fuzz`: a control frame of either side with what is packed in it, and the plan laid out.
#[cfg(any(test, feature = "test-support"))]
pub(crate) fn fuzz(data: &[u8]) -> bool {
    use super::super::layout::Layout;

    fn again<T: Serialize + DeserializeOwned>(value: &T) {
        let first = rmp_serde::to_vec_named(value).expect("it was decoded");
        let second: T = msgpack::decode(&first).expect("own encoding");
        assert_eq!(first, rmp_serde::to_vec_named(&second).expect("it was decoded"));
    }
    let down = msgpack::decode::<Down>(data);
    if let Ok(down) = &down {
        again(down);
        match down {
            Down::Known(packed) => {
                if let Ok(known) = entries(packed) {
                    assert_eq!(pack_entries(&known), packed);
                }
            }
            Down::Plan { chunk, files, .. } => {
                if let Ok(layout) = Layout::new(*chunk, files.clone()) {
                    assert!(layout.segment_size() >= layout.bytes());
                    let last = layout.chunks() - 1;
                    let (file, from) = layout.place(last);
                    assert_eq!(from + u64::from(layout.length(last)), layout.files()[file].size);
                }
            }
            _ => {}
        }
    }
    let up = msgpack::decode::<Up>(data);
    if let Ok(up) = &up {
        again(up);
        if let Up::Want(packed) = up
            && let Ok(wanted) = chunks(packed)
        {
            assert_eq!(pack_chunks(&wanted), packed);
        }
    }
    down.is_ok() || up.is_ok()
}

/// For `crate::fuzz`: control frames of both sides.
#[cfg(test)]
pub(crate) fn corpus() -> Vec<Vec<u8>> {
    let down = |frame: &Down| rmp_serde::to_vec_named(frame).unwrap();
    let up = |frame: &Up| rmp_serde::to_vec_named(frame).unwrap();
    let files = vec![FileSize { name: "model.safetensors".to_owned(), size: 10 << 20 }];
    let plan = |chunk, files| Down::Plan {
        version: HOP_VERSION,
        id: "u".to_owned(),
        node: "n".to_owned(),
        chunk,
        files,
    };
    vec![
        down(&plan(4 << 20, files.clone())),
        down(&plan(0, files)),
        down(&Down::Known(pack_entries(&[(0, Digest::of(b"a")), (7, Digest::of(b"b"))]))),
        down(&Down::AllKnown("digest".to_owned())),
        down(&Down::Ping),
        up(&Up::Accept { node: "n".to_owned() }),
        up(&Up::Want(pack_chunks(&[0, 1, 9]))),
        up(&Up::Done),
        up(&Up::Failed("no room".to_owned())),
    ]
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
