//! ZMTP 3.0 with the NULL mechanism (<https://rfc.zeromq.org/spec/23/>).

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use dp_sidecar_protocol::Frames;

pub const GREETING_LENGTH: usize = 64;
/// Longest command (READY and the like) a peer may send.
const COMMAND_LIMIT: usize = 64 * 1024;
/// Longest message, all frames together, where nothing else is said.
pub const MESSAGE_LIMIT: usize = 1 << 30;
/// Kept of the second frame of a message that is too large: where vLLM has the request's id.
const HEAD_BYTES: usize = 64 * 1024;
/// Most frames of a message.
pub const FRAME_COUNT_LIMIT: usize = 64 * 1024;

const FLAG_MORE: u8 = 1;
const FLAG_LONG: u8 = 2;
const FLAG_COMMAND: u8 = 4;

/// Our greeting: version 3.0, mechanism NULL.
pub fn greeting() -> [u8; GREETING_LENGTH] {
    let mut bytes = [0; GREETING_LENGTH];
    bytes[0] = 0xff;
    bytes[9] = 0x7f;
    bytes[10] = 3;
    bytes[12..16].copy_from_slice(b"NULL");
    bytes
}

/// Checks a peer's greeting.
///
/// # Errors
/// What is wrong with it.
pub fn check_greeting(bytes: &[u8]) -> Result<(), String> {
    let bytes = bytes.first_chunk::<GREETING_LENGTH>().ok_or("a greeting that ends early")?;
    if bytes[0] != 0xff || bytes[9] != 0x7f {
        return Err("no ZMTP greeting".to_owned());
    }
    if bytes[10] < 3 {
        return Err(format!("ZMTP version {}, expected 3 or later", bytes[10]));
    }
    if bytes[12..32] != greeting()[12..32] {
        let end = bytes[12..32].iter().position(|byte| *byte == 0);
        let name = &bytes[12..12 + end.unwrap_or(20)];
        return Err(format!("mechanism {:?}, expected NULL", String::from_utf8_lossy(name)));
    }
    Ok(())
}

/// The READY command.
pub fn ready(socket_type: &str, identity: Option<&[u8]>) -> Vec<u8> {
    let mut body = vec![5];
    body.extend_from_slice(b"READY");
    let mut property = |name: &str, value: &[u8]| {
        body.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
        body.extend_from_slice(value);
    };
    property("Socket-Type", socket_type.as_bytes());
    if let Some(identity) = identity {
        property("Identity", identity);
    }
    let mut command = vec![FLAG_COMMAND, u8::try_from(body.len()).unwrap_or(u8::MAX)];
    command.extend_from_slice(&body);
    command
}

/// Reads the peer's READY and checks its socket type.
///
/// # Errors
/// What is wrong with it; an ERROR command's reason.
pub fn check_ready(command: &[u8], expected_type: &str) -> Result<(), String> {
    let mut rest = command;
    let name = take(&mut rest, 1).ok_or("an empty command")?;
    if name == b"ERROR" {
        let reason = take(&mut rest, 1).unwrap_or_default();
        return Err(format!("it refuses the connection: {}", String::from_utf8_lossy(reason)));
    }
    if name != b"READY" {
        return Err(format!("command {:?}, expected READY", String::from_utf8_lossy(name)));
    }
    match property(command, "Socket-Type") {
        Some(value) if value == expected_type.as_bytes() => Ok(()),
        Some(value) => {
            Err(format!("socket type {:?}, expected {expected_type}", String::from_utf8_lossy(value)))
        }
        None => Err("a READY without Socket-Type".to_owned()),
    }
}

/// A property of the peer's READY.
pub fn property<'a>(command: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut rest = command;
    take(&mut rest, 1)?;
    while !rest.is_empty() {
        let key = take(&mut rest, 1)?;
        let value = take(&mut rest, 4)?;
        if key.eq_ignore_ascii_case(name.as_bytes()) {
            return Some(value);
        }
    }
    None
}

/// Takes a value with a big-endian length of `width` bytes in front.
fn take<'a>(rest: &mut &'a [u8], width: usize) -> Option<&'a [u8]> {
    let length = rest.get(..width)?;
    let length = length.iter().fold(0usize, |sum, byte| (sum << 8) | usize::from(*byte));
    let value = rest.get(width..width.checked_add(length)?)?;
    *rest = &rest[width + length..];
    Some(value)
}

/// One thing read from a peer.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    Message(Frames),
    /// A command, without its header.
    Command(Bytes),
}

/// Cuts a byte stream into messages. Never allocates for bytes that have not come.
#[derive(Debug)]
pub struct Decoder {
    frames: Frames,
    size: usize,
    message_limit: usize,
    frame_count_limit: usize,
    /// What is too large is read and dropped.
    cuts: bool,
    /// The message that is being read is too large.
    too_large: bool,
    /// What it had, if the last one was.
    cut: Option<usize>,
    /// Bytes of its current frame that are still to be dropped, and whether more frames follow.
    dropping: Option<(usize, bool)>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::with_limits(MESSAGE_LIMIT, FRAME_COUNT_LIMIT)
    }
}

impl Decoder {
    /// A decoder for messages of at most this many bytes and frames.
    pub fn with_limits(message_limit: usize, frame_count_limit: usize) -> Self {
        Self {
            frames: Frames::new(),
            size: 0,
            message_limit,
            frame_count_limit,
            cuts: false,
            too_large: false,
            cut: None,
            dropping: None,
        }
    }

    /// From now on a message of more bytes than this, or of too many frames, comes without most of its bytes instead of
    /// being refused: its first two frames, as far as they were kept. See [`Self::take_cut`].
    pub fn cut_beyond(&mut self, bytes: usize) {
        self.cuts = true;
        self.message_limit = bytes;
    }

    /// Bytes that all frames of the last message had, if it was cut.
    pub const fn take_cut(&mut self) -> Option<usize> {
        self.cut.take()
    }

    /// Frames of a message that is not complete have been read.
    pub fn is_inside(&self) -> bool {
        !self.frames.is_empty() || self.dropping.is_some()
    }

    /// The next complete item in `buffer`, if there is one.
    ///
    /// # Errors
    /// `InvalidData` if a limit is exceeded or reserved flags are set: close the connection.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> io::Result<Option<Item>> {
        loop {
            if let Some((left, more)) = self.dropping.take() {
                let dropped = left.min(buffer.len());
                buffer.advance(dropped);
                if dropped < left {
                    self.dropping = Some((left - dropped, more));
                    return Ok(None);
                }
                if !more {
                    self.too_large = false;
                    self.cut = Some(std::mem::take(&mut self.size));
                    return Ok(Some(Item::Message(std::mem::take(&mut self.frames))));
                }
            }
            let Some((flags, header, length)) = header(buffer) else {
                return Ok(None);
            };
            if flags & !(FLAG_MORE | FLAG_LONG | FLAG_COMMAND) != 0 {
                return Err(invalid(format!("frame flags {flags:#04x}")));
            }
            let is_command = flags & FLAG_COMMAND != 0;
            let limit = if is_command { COMMAND_LIMIT } else { self.message_limit.saturating_sub(self.size) };
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            self.too_large |=
                self.cuts && !is_command && (length > limit || self.frames.len() == self.frame_count_limit);
            if self.too_large && !is_command {
                self.frames.truncate(2);
                let kept = if self.frames.len() < 2 { length.min(HEAD_BYTES) } else { 0 };
                if buffer.len() < header + kept {
                    buffer.reserve(header + kept - buffer.len());
                    return Ok(None);
                }
                buffer.advance(header);
                if self.frames.len() < 2 {
                    self.frames.push(buffer.split_to(kept).freeze());
                }
                self.size = self.size.saturating_add(length);
                self.dropping = Some((length - kept, flags & FLAG_MORE != 0));
                continue;
            }
            if length > limit {
                return Err(invalid(format!(
                    "a frame of {length} bytes, at most {limit} are left of the limit"
                )));
            }
            if buffer.len() < header + length {
                // A long frame comes in many reads: ask for its room in steps, at most doubling.
                let missing = header + length - buffer.len();
                buffer.reserve(missing.min(buffer.len().max(64 * 1024)));
                return Ok(None);
            }
            buffer.advance(header);
            let body = buffer.split_to(length).freeze();
            if is_command {
                return Ok(Some(Item::Command(body)));
            }
            if self.frames.len() == self.frame_count_limit {
                return Err(invalid(format!("more than {} frames", self.frame_count_limit)));
            }
            self.size += length;
            self.frames.push(body);
            if flags & FLAG_MORE == 0 {
                self.size = 0;
                return Ok(Some(Item::Message(std::mem::take(&mut self.frames))));
            }
        }
    }
}

fn header(buffer: &[u8]) -> Option<(u8, usize, u64)> {
    let flags = *buffer.first()?;
    if flags & FLAG_LONG == 0 {
        Some((flags, 2, u64::from(*buffer.get(1)?)))
    } else {
        let length = buffer.get(1..9)?.try_into().ok()?;
        Some((flags, 9, u64::from_be_bytes(length)))
    }
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Writes the header of one frame.
pub fn encode_header(length: usize, more: bool, out: &mut BytesMut) {
    let more = if more { FLAG_MORE } else { 0 };
    match u8::try_from(length) {
        Ok(length) => out.extend_from_slice(&[more, length]),
        Err(_) => {
            out.extend_from_slice(&[more | FLAG_LONG]);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
}

/// A whole message.
pub fn encode(frames: &[Bytes]) -> Bytes {
    let mut out = BytesMut::new();
    let last = frames.len().saturating_sub(1);
    for (at, frame) in frames.iter().enumerate() {
        encode_header(frame.len(), at < last, &mut out);
        out.extend_from_slice(frame);
    }
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_being_cut_at_any_byte() {
        let long = vec![7; 300];
        let whole = encode(&[&b""[..], b"ab", &long, b""].map(Bytes::copy_from_slice));
        for cut in 0..=whole.len() {
            let mut decoder = Decoder::default();
            let mut buffer = BytesMut::from(&whole[..cut]);
            let first = decoder.decode(&mut buffer).unwrap();
            assert_eq!(first.is_some(), cut == whole.len());
            if first.is_none() {
                buffer.extend_from_slice(&whole[cut..]);
                let Some(Item::Message(frames)) = decoder.decode(&mut buffer).unwrap() else {
                    panic!("no message after the cut at {cut}");
                };
                assert_eq!(frames, vec![&b""[..], b"ab", &long, b""]);
                assert!(buffer.is_empty());
            }
        }
    }

    #[test]
    fn a_declared_length_of_2_to_the_62_is_refused_without_allocating() {
        let mut buffer = BytesMut::from(&[FLAG_LONG, 0x40, 0, 0, 0, 0, 0, 0, 0][..]);
        assert!(Decoder::default().decode(&mut buffer).is_err());
        assert!(buffer.capacity() < 1024);
    }

    #[test]
    fn what_is_too_large_is_read_without_being_kept_and_the_next_message_is_whole() {
        let long = vec![7; 2 * HEAD_BYTES];
        let mut whole =
            BytesMut::from(&encode(&[&b"t"[..], &long, &long, b"x"].map(Bytes::copy_from_slice))[..]);
        whole.extend_from_slice(&encode(&[Bytes::from_static(b"next")]));
        for cut in (0..whole.len()).step_by(977) {
            let mut decoder = Decoder::default();
            decoder.cut_beyond(HEAD_BYTES);
            let mut buffer = BytesMut::from(&whole[..cut]);
            let mut items = Vec::new();
            for part in [&b""[..], &whole[cut..]] {
                buffer.extend_from_slice(part);
                while let Some(item) = decoder.decode(&mut buffer).unwrap() {
                    items.push((item, decoder.take_cut()));
                }
            }
            let [(Item::Message(head), size), (Item::Message(next), None)] = &items[..] else {
                panic!("{} items after the cut at {cut}", items.len());
            };
            assert_eq!((head.len(), &head[0][..], head[1].len()), (2, &b"t"[..], HEAD_BYTES));
            assert_eq!((*size, &next[..]), (Some(2 * long.len() + 2), &[Bytes::from_static(b"next")][..]));
        }
        let mut decoder = Decoder::default();
        decoder.cut_beyond(HEAD_BYTES);
        let mut buffer = BytesMut::from(&[FLAG_MORE, 0].repeat(FRAME_COUNT_LIMIT + 1)[..]);
        buffer.extend_from_slice(&[0, 0]);
        assert!(decoder.decode(&mut buffer).unwrap().is_some());
        assert_eq!(decoder.take_cut(), Some(0));
    }

    #[test]
    fn endless_more_frames_are_refused() {
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::from(&[FLAG_MORE, 0].repeat(FRAME_COUNT_LIMIT + 1)[..]);
        assert!(decoder.decode(&mut buffer).is_err());
    }

    #[test]
    fn a_ready_of_another_socket_type_names_both() {
        let command = ready("REQ", Some(b"\0\0"));
        let error = check_ready(&command[2..], "ROUTER").unwrap_err();
        assert!(error.contains("REQ") && error.contains("ROUTER"), "{error}");
        check_ready(&ready("ROUTER", None)[2..], "ROUTER").unwrap();
        for cut in 0..command.len() - 2 {
            assert!(check_ready(&command[2..2 + cut], "ROUTER").is_err());
        }
    }
}
