//! Reads msgpack in place: finds elements by position and skips what nobody needs.
//!
//! vLLM's hot messages are arrays of known positions (`msgspec.Struct(array_like=True)`), of which
//! the sidecar reads two or three. [`Scanner`] walks over the bytes without allocating and without
//! recursion; what it returns borrows from the input. It never panics, and every length it reads is
//! checked against the bytes that are there.

use serde::Serialize;
use thiserror::Error;

use crate::error::DecodeError;

/// How deep values may be nested. Python's decoder gives up near 1000 levels, which would cost an
/// engine its input thread; no message of vLLM comes near this.
pub const MAX_DEPTH: usize = 128;

/// Why bytes could not be scanned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ScanError {
    /// A value, or a declared length, goes past the end.
    #[error("ends at byte {0} within a value")]
    Truncated(usize),
    /// `0xc1`, which msgpack never uses.
    #[error("reserved byte 0xc1 at byte {0}")]
    Reserved(usize),
    /// More than [`MAX_DEPTH`] levels.
    #[error("more than {MAX_DEPTH} levels deep at byte {0}")]
    TooDeep(usize),
    /// The value is of another type.
    #[error("{actual} at byte {at}, expected {expected}")]
    Type {
        /// Offset.
        at: usize,
        /// What should be there.
        expected: &'static str,
        actual: Kind,
    },
    /// A string that is not UTF-8.
    #[error("string at byte {0} is not utf-8")]
    Utf8(usize),
    /// Bytes after the value.
    #[error("{extra} bytes after the value that ends at byte {at}")]
    Trailing {
        /// Where the value ended.
        at: usize,
        /// How many follow.
        extra: usize,
    },
    /// An extension type of vLLM that would be unpickled, or one that vLLM does not know.
    #[error("extension type {code} at byte {at}")]
    Extension {
        /// Offset.
        at: usize,
        code: i8,
    },
    /// A key that Python cannot hash.
    #[error("map key at byte {at} is {actual}")]
    Key {
        /// Offset.
        at: usize,
        /// What the key is.
        actual: Kind,
    },
}

impl ScanError {
    /// With the name of the message and of the field or position that was read.
    pub fn within(self, message: &'static str, at: impl Into<String>) -> DecodeError {
        match self {
            Self::Type { expected, actual, .. } => {
                DecodeError::Unexpected { message, at: at.into(), expected, actual: actual.to_string() }
            }
            other => DecodeError::Malformed { message, at: at.into(), reason: other.to_string() },
        }
    }
}

/// Type of a msgpack value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `None`.
    Nil,
    /// `bool`.
    Bool,
    /// `int` of any width.
    Int,
    /// `float` of either width.
    Float,
    /// `str`.
    Str,
    /// `bytes`.
    Bin,
    /// `list`, `tuple`, `set`, or a positional struct.
    Array,
    /// `dict`, dataclass, or a struct with field names.
    Map,
    /// Extension type.
    Ext,
    /// `0xc1`.
    #[serde(rename = "reserved byte")]
    Reserved,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

impl Kind {
    /// Type of the value that starts with `marker`.
    pub const fn of(marker: u8) -> Self {
        match marker {
            0x00..=0x7f | 0xcc..=0xd3 | 0xe0..=0xff => Self::Int,
            0x80..=0x8f | 0xde | 0xdf => Self::Map,
            0x90..=0x9f | 0xdc | 0xdd => Self::Array,
            0xa0..=0xbf | 0xd9..=0xdb => Self::Str,
            0xc0 => Self::Nil,
            0xc1 => Self::Reserved,
            0xc2 | 0xc3 => Self::Bool,
            0xc4..=0xc6 => Self::Bin,
            0xc7..=0xc9 | 0xd4..=0xd8 => Self::Ext,
            0xca | 0xcb => Self::Float,
        }
    }
}

/// Length of a number, bool or nil by its marker; 0 for everything else.
const PLAIN_LENGTH: [u8; 256] = {
    let mut lengths = [0; 256];
    let mut marker = 0;
    while marker < 256 {
        lengths[marker] = match marker as u8 {
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => 1,
            0xcc | 0xd0 => 2,
            0xcd | 0xd1 => 3,
            0xce | 0xd2 | 0xca => 5,
            0xcf | 0xd3 | 0xcb => 9,
            _ => 0,
        };
        marker += 1;
    }
    lengths
};

/// First bytes of a value: how long the header is, and what follows.
#[derive(Clone, Copy, Debug)]
struct Head {
    kind: Kind,
    /// Bytes of the marker and the length field.
    header: usize,
    /// Bytes after the header that belong to the value itself (not to its elements).
    body: usize,
    /// Values inside: elements of an array, twice the entries of a map.
    children: usize,
}

/// Walks over msgpack bytes.
#[derive(Clone, Debug)]
pub struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Scanner<'a> {
    /// At the start of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Offset of the next value.
    pub const fn position(&self) -> usize {
        self.at
    }

    /// Whether nothing follows.
    pub const fn is_at_end(&self) -> bool {
        self.at >= self.bytes.len()
    }

    /// Fails if something follows.
    pub const fn finish(&self) -> Result<(), ScanError> {
        if self.is_at_end() {
            Ok(())
        } else {
            Err(ScanError::Trailing { at: self.at, extra: self.bytes.len() - self.at })
        }
    }

    /// Type of the next value.
    pub fn kind(&self) -> Result<Kind, ScanError> {
        self.bytes.get(self.at).map(|marker| Kind::of(*marker)).ok_or(ScanError::Truncated(self.at))
    }

    fn big_endian(&self, at: usize, width: usize) -> Result<u64, ScanError> {
        let field = at
            .checked_add(width)
            .and_then(|end| self.bytes.get(at..end))
            .ok_or(ScanError::Truncated(self.at))?;
        Ok(field.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn head(&self) -> Result<Head, ScanError> {
        let marker = *self.bytes.get(self.at).ok_or(ScanError::Truncated(self.at))?;
        let kind = Kind::of(marker);
        let length = |width: usize| -> Result<usize, ScanError> {
            let value = self.big_endian(self.at + 1, width)?;
            usize::try_from(value).map_err(|_| ScanError::Truncated(self.at))
        };
        let plain = |header, body, children| Head { kind, header, body, children };
        let head = match marker {
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => plain(1, 0, 0),
            0xc1 => return Err(ScanError::Reserved(self.at)),
            0x80..=0x8f => plain(1, 0, usize::from(marker & 0x0f) * 2),
            0x90..=0x9f => plain(1, 0, usize::from(marker & 0x0f)),
            0xa0..=0xbf => plain(1, usize::from(marker & 0x1f), 0),
            0xcc | 0xd0 => plain(1, 1, 0),
            0xcd | 0xd1 => plain(1, 2, 0),
            0xce | 0xd2 | 0xca => plain(1, 4, 0),
            0xcf | 0xd3 | 0xcb => plain(1, 8, 0),
            0xc4 | 0xd9 => plain(2, length(1)?, 0),
            0xc5 | 0xda => plain(3, length(2)?, 0),
            0xc6 | 0xdb => plain(5, length(4)?, 0),
            // The type byte of an extension counts as header.
            0xc7 => plain(3, length(1)?, 0),
            0xc8 => plain(4, length(2)?, 0),
            0xc9 => plain(6, length(4)?, 0),
            0xd4..=0xd8 => plain(2, 1 << (marker - 0xd4), 0),
            0xdc => plain(3, 0, length(2)?),
            0xdd => plain(5, 0, length(4)?),
            0xde => plain(3, 0, length(2)?.saturating_mul(2)),
            0xdf => plain(5, 0, length(4)?.saturating_mul(2)),
        };
        let own = head.header.saturating_add(head.body);
        let left = self.bytes.len() - self.at;
        // Each element takes at least one byte: a declared count beyond that is a lie.
        if own.saturating_add(head.children) > left {
            return Err(ScanError::Truncated(self.at));
        }
        Ok(head)
    }

    fn typed(&self, wanted: Kind, expected: &'static str) -> Result<Head, ScanError> {
        let actual = self.kind()?;
        if actual == wanted { self.head() } else { Err(ScanError::Type { at: self.at, expected, actual }) }
    }

    /// Enters an array; returns how many elements follow.
    pub fn array(&mut self) -> Result<usize, ScanError> {
        let head = self.typed(Kind::Array, "array")?;
        self.at += head.header;
        Ok(head.children)
    }

    /// Enters a map; returns how many pairs follow.
    pub fn map(&mut self) -> Result<usize, ScanError> {
        let head = self.typed(Kind::Map, "map")?;
        self.at += head.header;
        Ok(head.children / 2)
    }

    /// Takes nil if it comes next.
    pub fn nil(&mut self) -> Result<bool, ScanError> {
        let is_nil = self.kind()? == Kind::Nil;
        if is_nil {
            self.at += 1;
        }
        Ok(is_nil)
    }

    /// Reads a bool.
    pub fn bool(&mut self) -> Result<bool, ScanError> {
        self.typed(Kind::Bool, "bool")?;
        let value = self.bytes.get(self.at) == Some(&0xc3);
        self.at += 1;
        Ok(value)
    }

    /// Reads an integer of any width.
    pub fn int(&mut self) -> Result<i128, ScanError> {
        let head = self.typed(Kind::Int, "int")?;
        let marker = self.bytes[self.at];
        let raw = self.big_endian(self.at + 1, head.body)?;
        let value = match marker {
            0x00..=0x7f => i128::from(marker),
            0xe0..=0xff => i128::from(marker.cast_signed()),
            0xd0 => i128::from((raw as u8).cast_signed()),
            0xd1 => i128::from((raw as u16).cast_signed()),
            0xd2 => i128::from((raw as u32).cast_signed()),
            0xd3 => i128::from(raw.cast_signed()),
            _ => i128::from(raw),
        };
        self.at += head.header + head.body;
        Ok(value)
    }

    /// Reads an integer that fits `T`.
    pub fn integer<T: TryFrom<i128>>(&mut self, expected: &'static str) -> Result<T, ScanError> {
        let at = self.at;
        T::try_from(self.int()?).map_err(|_| ScanError::Type { at, expected, actual: Kind::Int })
    }

    /// Reads a float, or an integer as one (msgspec accepts both where a float is declared).
    pub fn float(&mut self) -> Result<f64, ScanError> {
        if self.kind()? == Kind::Int {
            return self.int().map(|value| value as f64);
        }
        let head = self.typed(Kind::Float, "float")?;
        let raw = self.big_endian(self.at + 1, head.body)?;
        let value = if head.body == 4 { f64::from(f32::from_bits(raw as u32)) } else { f64::from_bits(raw) };
        self.at += head.header + head.body;
        Ok(value)
    }

    /// Reads a string.
    pub fn str(&mut self) -> Result<&'a str, ScanError> {
        let head = self.typed(Kind::Str, "str")?;
        let start = self.at + head.header;
        let text = std::str::from_utf8(&self.bytes[start..start + head.body])
            .map_err(|_| ScanError::Utf8(self.at))?;
        self.at = start + head.body;
        Ok(text)
    }

    /// Reads bytes.
    pub fn bin(&mut self) -> Result<&'a [u8], ScanError> {
        let head = self.typed(Kind::Bin, "bin")?;
        let start = self.at + head.header;
        self.at = start + head.body;
        Ok(&self.bytes[start..self.at])
    }

    /// Reads vLLM's raw view, extension type 3: bytes that become a tensor.
    pub fn raw_view(&mut self) -> Result<&'a [u8], ScanError> {
        let head = self.typed(Kind::Ext, "ext 3")?;
        let start = self.at + head.header;
        let code = self.bytes[start - 1].cast_signed();
        if code != 3 {
            return Err(ScanError::Extension { at: self.at, code });
        }
        self.at = start + head.body;
        Ok(&self.bytes[start..self.at])
    }

    /// Reads nil as `None`, anything else with `read`.
    pub fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, ScanError>,
    ) -> Result<Option<T>, ScanError> {
        if self.nil()? { Ok(None) } else { read(self).map(Some) }
    }

    /// Skips one value with everything in it.
    pub fn skip(&mut self) -> Result<(), ScanError> {
        self.walk::<false>()
    }

    /// Skips one value and checks what Python would choke on: strings are UTF-8, map keys are
    /// hashable, and the only extension type is vLLM's raw view (code 3). Codes 1 and 2 are pickle.
    pub fn skip_checked(&mut self) -> Result<(), ScanError> {
        self.walk::<true>()
    }

    /// The bytes of the next value; skips it.
    pub fn raw(&mut self) -> Result<&'a [u8], ScanError> {
        let start = self.at;
        self.skip()?;
        Ok(&self.bytes[start..self.at])
    }

    /// Skips `count` values.
    pub fn skip_many(&mut self, count: usize) -> Result<(), ScanError> {
        let mut left = count;
        loop {
            left -= self.skip_plain(left);
            if left == 0 {
                return Ok(());
            }
            self.skip()?;
            left -= 1;
        }
    }

    /// Skips as many of the next `limit` values as are plain numbers, bools and nils: most of what an
    /// engine sends, and it sends a lot of it. How many these were.
    fn skip_plain(&mut self, limit: usize) -> usize {
        let mut at = self.at;
        for skipped in 0..limit {
            let length = match self.bytes.get(at) {
                Some(marker) => usize::from(PLAIN_LENGTH[usize::from(*marker)]),
                None => 0,
            };
            if length == 0 || at + length > self.bytes.len() {
                self.at = at;
                return skipped;
            }
            at += length;
        }
        self.at = at;
        limit
    }

    /// What lies between here and `end`, a scanner over the same bytes; goes there.
    pub fn take_until(&mut self, end: &Self) -> &'a [u8] {
        let start = self.at;
        self.at = end.at.max(start);
        self.bytes.get(start..self.at).unwrap_or_default()
    }

    /// Skips `count` integers (token ids), failing on anything else.
    pub fn skip_ints(&mut self, count: usize) -> Result<(), ScanError> {
        for _ in 0..count {
            match self.bytes.get(self.at) {
                Some(0x00..=0x7f | 0xe0..=0xff) => self.at += 1,
                Some(0xcc | 0xd0) => self.at += 2,
                Some(0xcd | 0xd1) => self.at += 3,
                Some(0xce | 0xd2) => self.at += 5,
                Some(0xcf | 0xd3) => self.at += 9,
                Some(_) => {
                    self.typed(Kind::Int, "int")?;
                }
                None => return Err(ScanError::Truncated(self.at)),
            }
        }
        if self.at > self.bytes.len() {
            let end = self.bytes.len();
            self.at = end;
            return Err(ScanError::Truncated(end));
        }
        Ok(())
    }

    fn walk<const CHECKED: bool>(&mut self) -> Result<(), ScanError> {
        let head = self.step::<CHECKED>()?;
        let mut children = head.children;
        if head.kind == Kind::Array {
            children -= self.skip_plain(children);
        }
        if children == 0 {
            return Ok(());
        }
        // What is left to read on each level, innermost last, and whether the level is a map.
        let mut left = [0usize; MAX_DEPTH];
        let mut maps = [false; MAX_DEPTH];
        left[0] = children;
        maps[0] = head.kind == Kind::Map;
        let mut depth = 1;
        while depth > 0 {
            let level = depth - 1;
            if !maps[level] {
                left[level] -= self.skip_plain(left[level]);
            }
            if left[level] == 0 {
                depth -= 1;
                continue;
            }
            let is_key = maps[level] && left[level].is_multiple_of(2);
            left[level] -= 1;
            let at = self.at;
            let head = self.step::<CHECKED>()?;
            if CHECKED && is_key && matches!(head.kind, Kind::Map | Kind::Array | Kind::Ext) {
                return Err(ScanError::Key { at, actual: head.kind });
            }
            if head.children > 0 {
                if depth == MAX_DEPTH {
                    return Err(ScanError::TooDeep(at));
                }
                left[depth] = head.children;
                maps[depth] = head.kind == Kind::Map;
                depth += 1;
            }
        }
        Ok(())
    }

    /// Goes past one header and its body.
    fn step<const CHECKED: bool>(&mut self) -> Result<Head, ScanError> {
        let head = self.head()?;
        let start = self.at + head.header;
        let end = start + head.body;
        if CHECKED {
            match head.kind {
                Kind::Str if std::str::from_utf8(&self.bytes[start..end]).is_err() => {
                    return Err(ScanError::Utf8(self.at));
                }
                Kind::Ext => {
                    let code = self.bytes[start - 1].cast_signed();
                    if code != 3 {
                        return Err(ScanError::Extension { at: self.at, code });
                    }
                }
                _ => {}
            }
        }
        self.at = end;
        Ok(head)
    }
}

/// The `nth` element of the array in `bytes`, as it is; `None` if the array is shorter.
pub fn element(bytes: &[u8], nth: usize) -> Result<Option<&[u8]>, ScanError> {
    let mut scanner = Scanner::new(bytes);
    if nth >= scanner.array()? {
        return Ok(None);
    }
    scanner.skip_many(nth)?;
    scanner.raw().map(Some)
}

/// Decodes one value that fills `bytes`.
pub fn value(bytes: &[u8]) -> Result<rmpv::Value, ScanError> {
    let mut scanner = Scanner::new(bytes);
    scanner.skip()?;
    scanner.finish()?;
    // The scan has bounded every length and the depth, so this only fails on what it refused.
    rmpv::decode::read_value(&mut &bytes[..]).map_err(|_| ScanError::Truncated(bytes.len()))
}

/// Writes `bytes[..range.start]`, `replacement`, `bytes[range.end..]`.
pub(crate) fn splice(bytes: &[u8], range: std::ops::Range<usize>, replacement: &[u8]) -> bytes::Bytes {
    let mut out = Vec::with_capacity(bytes.len() + replacement.len());
    out.extend_from_slice(&bytes[..range.start]);
    out.extend_from_slice(replacement);
    out.extend_from_slice(&bytes[range.end..]);
    out.into()
}
