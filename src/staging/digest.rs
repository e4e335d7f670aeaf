//! Digests of chunks, and of a checkpoint made of them.

use std::fmt;
use std::sync::Arc;

use super::layout::Layout;

/// XXH3-128 of some bytes. Finds damage, not malice: transfers are authenticated, not signed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Digest([u8; 16]);

impl Digest {
    /// Bytes of a digest.
    pub(super) const LEN: usize = 16;

    /// Of these bytes.
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self(twox_hash::XxHash3_128::oneshot(bytes).to_be_bytes())
    }

    /// From its canonical (big endian) form.
    pub(super) const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its canonical form.
    pub(super) const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// From 32 hex digits.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        u128::from_str_radix(text, 16).ok().map(|number| Self(number.to_be_bytes()))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is known of the chunks of a segment.
#[derive(Clone, Debug)]
pub(super) struct Contents {
    pub(super) layout: Arc<Layout>,
    /// One for each chunk.
    pub(super) digests: Vec<Option<Digest>>,
}

/// Digest of a whole checkpoint, see `protocol/docs/staging.md`: `xxh3:` and 32 hex digits.
pub(super) fn root(layout: &Layout, chunks: &[Digest]) -> String {
    let mut hasher = twox_hash::xxhash3_128::Hasher::new();
    hasher.write(&layout.chunk_size().to_le_bytes());
    for file in layout.files() {
        hasher.write(&(file.name.len() as u64).to_le_bytes());
        hasher.write(file.name.as_bytes());
        hasher.write(&file.size.to_le_bytes());
    }
    for chunk in chunks {
        hasher.write(&chunk.0);
    }
    format!("xxh3:{:032x}", hasher.finish_128())
}

#[cfg(test)]
mod tests {
    use super::super::layout::FileSize;
    use super::*;

    #[test]
    fn a_digest_survives_its_text() {
        let digest = Digest::of(b"weights");
        assert_eq!(Digest::parse(&digest.to_string()), Some(digest));
        assert_eq!(Digest::parse("+0000000000000000000000000000001"), None);
        assert_eq!(Digest::parse("12"), None);
    }

    #[test]
    fn the_digest_of_nothing_is_that_of_the_xxh3_specification() {
        assert_eq!(Digest::of(b"").to_string(), "99aa06d3014798d86001c324468d497f");
    }

    #[test]
    fn the_root_depends_on_names_sizes_and_the_order_of_chunks() {
        let layout = |name: &str, size: u64| {
            Layout::new(4096, vec![FileSize { name: name.to_owned(), size }]).unwrap()
        };
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let base = root(&layout("x.safetensors", 8000), &[a, b]);
        assert_ne!(base, root(&layout("x.safetensors", 8000), &[b, a]));
        assert_ne!(base, root(&layout("y.safetensors", 8000), &[a, b]));
        assert_ne!(base, root(&layout("x.safetensors", 8001), &[a, b]));
        assert_eq!(base, root(&layout("x.safetensors", 8000), &[a, b]));
        assert!(base.starts_with("xxh3:"), "{base}");
    }
}
