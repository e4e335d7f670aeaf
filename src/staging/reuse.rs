//! Chunks that this node has in its memory already: at their place in the segment that is being filled, or
//! anywhere in the segment of the current version. Their bytes are hashed before they count.

use std::collections::HashMap;
use std::sync::Arc;

use super::area::{Old, Whole};
use super::digest::Digest;
use super::fill::{Fill, Origin};
use super::layout::Layout;
use super::mapping::Mapping;

/// Where chunks may be found.
#[derive(Debug, Default)]
pub(super) struct Reuse {
    old: Old,
    current: Option<(Arc<Mapping>, HashMap<Digest, u32>)>,
}

impl Reuse {
    /// In what the segment held before, and in the current version.
    pub(super) fn new(old: Old, current: Option<&Whole>) -> Self {
        let current = current.map(|whole| {
            let chunks = (0u32..).zip(whole.digests.iter()).map(|(chunk, digest)| (*digest, chunk));
            (Arc::clone(&whole.mapping), chunks.collect())
        });
        Self { old, current }
    }

    /// Is it worth looking?
    pub(super) fn may_have(&self, layout: &Layout, chunk: u32, digest: Digest) -> bool {
        self.old.may_hold(layout, chunk, digest) || self.in_current(digest).is_some()
    }

    /// Makes the chunk valid if it is found. True also if somebody else has it in hand.
    pub(super) fn take(&self, fill: &Fill, chunk: u32, digest: Digest) -> bool {
        let Some(mut claim) = fill.mapping().claim(chunk) else { return true };
        if self.old.may_hold(fill.layout(), chunk, digest) && Digest::of(&claim) == digest {
            return fill.finish(claim, digest, Origin::Reused);
        }
        let Some(bytes) = self.in_current(digest) else { return false };
        if bytes.len() != claim.len() {
            return false;
        }
        claim.copy_from_slice(bytes);
        // Hashed after copying: also memory can fail.
        Digest::of(&claim) == digest && fill.finish(claim, digest, Origin::Reused)
    }

    fn in_current(&self, digest: Digest) -> Option<&[u8]> {
        let (mapping, chunks) = self.current.as_ref()?;
        mapping.bytes(*chunks.get(&digest)?)
    }
}
