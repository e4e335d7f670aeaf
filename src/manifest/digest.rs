//! The digest of a checkpoint's content, see `protocol/docs/weight-update.md`.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::{Manifest, ManifestError, Tensor, unreadable};
use crate::parallel;

/// Read and hashed at once by one thread.
const CHUNK: usize = 4 << 20;
/// From this size on a chunk is hashed by several threads.
const LARGE: u64 = 64 << 20;

/// Most threads that hash.
const THREADS: usize = 16;

/// How far the hashing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes hashed.
    pub done: u64,
    /// Bytes altogether.
    pub total: u64,
}

/// Digests of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    /// Whole digest, hex.
    pub whole: String,
    /// Digest of each tensor, hex.
    pub tensors: BTreeMap<String, String>,
}

impl Manifest {
    /// Reads all tensors and hashes them. Blocks, on as many threads as the machine has cores but at
    /// most 16. `progress` is called from them, after each chunk; `cancel` ends the work early.
    pub fn digests(
        &self,
        progress: &(dyn Fn(Progress) + Sync),
        cancel: &AtomicBool,
    ) -> Result<Digests, ManifestError> {
        let files = self.open()?;
        let total = self.bytes();
        let done = AtomicU64::new(0);
        let found: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
        let chunk_done = |bytes: u64| {
            let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            progress(Progress { done, total });
            if cancel.load(Ordering::Relaxed) { Err(self.cancelled()) } else { Ok(()) }
        };
        let worker = || {
            let mut buffer = vec![0; CHUNK];
            let (files, found, chunk_done) = (&files, &found, &chunk_done);
            move |at: usize| {
                let tensor: &Tensor = &self.tensors[at];
                let digest = self.hash_tensor(&files[tensor.file], tensor, &mut buffer, chunk_done)?;
                found.lock().insert(tensor.name.clone(), digest);
                Ok(())
            }
        };
        parallel::for_each(self.tensors.len(), THREADS, worker)?;
        if cancel.load(Ordering::Relaxed) {
            return Err(self.cancelled());
        }
        self.check_unchanged()?;
        let tensors = found.into_inner();
        Ok(Digests { whole: self.whole(&tensors), tensors })
    }

    fn hash_tensor(
        &self,
        file: &File,
        tensor: &Tensor,
        buffer: &mut [u8],
        chunk_done: &dyn Fn(u64) -> Result<(), ManifestError>,
    ) -> Result<String, ManifestError> {
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < tensor.len {
            let left = usize::try_from(tensor.len - at).unwrap_or(usize::MAX);
            let size = left.min(buffer.len());
            let chunk = &mut buffer[..size];
            file.read_exact_at(chunk, tensor.start + at)
                .map_err(|error| self.unreadable(tensor.file, &error))?;
            if tensor.len >= LARGE {
                hasher.update_rayon(chunk);
            } else {
                hasher.update(chunk);
            }
            at += size as u64;
            chunk_done(size as u64)?;
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    fn cancelled(&self) -> ManifestError {
        ManifestError::Cancelled { path: self.path.clone() }
    }

    /// Whether the files are still those whose headers were read.
    pub fn check_unchanged(&self) -> Result<(), ManifestError> {
        for file in &self.files {
            let path = self.path.join(&file.name);
            let meta = std::fs::metadata(&path).map_err(|error| unreadable(&path, &error))?;
            if meta.len() != file.len || meta.modified().ok() != file.modified {
                return Err(ManifestError::Changed { path });
            }
        }
        Ok(())
    }

    fn whole(&self, digests: &BTreeMap<String, String>) -> String {
        let mut hasher = blake3::Hasher::new();
        for (name, tensor) in self.by_name() {
            let shape: Vec<String> = tensor.shape.iter().map(ToString::to_string).collect();
            let digest = digests.get(name).map_or("", String::as_str);
            let line = format!("{name}\0{}\0{}\0{digest}\n", tensor.dtype, shape.join(","));
            hasher.update(line.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}
