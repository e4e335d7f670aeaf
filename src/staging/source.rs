//! Reads a checkpoint directory into a segment.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::digest::Digest;
use super::error::StageError;
use super::fill::{Fill, Origin};
use crate::manifest::{Manifest, ManifestError};

/// Most threads that read at once.
const THREADS: usize = 4;

/// Reads all chunks, the ones with headers first, on some threads, until all are there or the fill ends. Fails the
/// fill when a file cannot be read or has changed since `manifest` was read.
pub(super) fn read(node: &str, manifest: &Manifest, fill: &Fill) {
    if let Err(error) = read_all(manifest, fill) {
        fill.fail(StageError::Manifest { node: node.to_owned(), error });
    }
}

fn read_all(manifest: &Manifest, fill: &Fill) -> Result<(), ManifestError> {
    let unreadable = |file: usize, error: &std::io::Error| ManifestError::Unreadable {
        path: manifest.path.join(&manifest.files[file].name),
        reason: error.to_string(),
    };
    let open = |(at, file): (usize, &crate::manifest::ManifestFile)| {
        File::open(manifest.path.join(&file.name)).map_err(|error| unreadable(at, &error))
    };
    let files = manifest.files.iter().enumerate().map(open).collect::<Result<Vec<_>, _>>()?;
    let layout = fill.layout();
    let order = layout.order();
    let next = AtomicUsize::new(0);
    let work = || -> Result<(), ManifestError> {
        while let Some(chunk) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            if fill.ended() {
                return Ok(());
            }
            let Some(mut claim) = fill.mapping().claim(*chunk) else { continue };
            let (file, offset) = layout.place(*chunk);
            files[file].read_exact_at(&mut claim, offset).map_err(|error| unreadable(file, &error))?;
            // While it is in the cache.
            let digest = Digest::of(&claim);
            fill.finish(claim, digest, Origin::Read);
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
    let results = std::thread::scope(|scope| {
        let handles: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut results = vec![work()];
        for handle in handles {
            results.extend(handle.join());
        }
        results
    });
    results.into_iter().collect::<Result<(), _>>()?;
    if fill.ended() { Ok(()) } else { manifest.check_unchanged() }
}
