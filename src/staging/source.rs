//! Reads a checkpoint directory into a segment.

use std::os::unix::fs::FileExt as _;

use super::digest::Digest;
use super::fill::{Fill, Origin};
use crate::manifest::{Manifest, ManifestError};
use crate::parallel;

/// Most threads that read at once.
const THREADS: usize = 4;

/// Reads all chunks, the ones with headers first, on some threads, until all are there or the fill ends. Fails the
/// fill when a file cannot be read or has changed since `manifest` was read.
pub(super) fn read(manifest: &Manifest, fill: &Fill) {
    if let Err(error) = read_all(manifest, fill) {
        fill.fail(error.into());
    }
}

fn read_all(manifest: &Manifest, fill: &Fill) -> Result<(), ManifestError> {
    let files = manifest.open()?;
    let (layout, order) = (fill.layout(), fill.layout().order());
    let read = |at: usize| {
        if fill.ended() {
            return Ok(());
        }
        let Some(mut claim) = fill.mapping().claim(order[at]) else { return Ok(()) };
        let (file, offset) = layout.locate(order[at]);
        files[file].read_exact_at(&mut claim, offset).map_err(|error| manifest.unreadable(file, &error))?;
        // While it is in the cache.
        let digest = Digest::of(&claim);
        fill.finish(claim, digest, Origin::Read);
        Ok(())
    };
    parallel::for_each(order.len(), THREADS, || read)?;
    if fill.ended() { Ok(()) } else { manifest.check_unchanged() }
}
