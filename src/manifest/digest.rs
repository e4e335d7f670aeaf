//! The digest of a checkpoint's content, see `protocol/docs/weight-update.md`.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use parking_lot::Mutex;

use super::{Manifest, ManifestError, Tensor, unreadable};

/// Read and hashed at once by one thread.
const CHUNK: usize = 4 << 20;
/// From this size on a chunk is hashed by several threads.
const LARGE: u64 = 64 << 20;

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
        let files = self
            .files
            .iter()
            .map(|file| {
                let path = self.path.join(&file.name);
                File::open(&path).map_err(|error| unreadable(&path, &error))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let total = self.bytes();
        let done = AtomicU64::new(0);
        let next = AtomicUsize::new(0);
        let failed: Mutex<Option<ManifestError>> = Mutex::new(None);
        let found: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
        let stop = || cancel.load(Ordering::Relaxed) || failed.lock().is_some();
        let work = || {
            let mut buffer = vec![0; CHUNK];
            while let Some(tensor) = self.tensors.get(next.fetch_add(1, Ordering::Relaxed)) {
                let chunk_done = |bytes: u64| {
                    let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
                    progress(Progress { done, total });
                    !stop()
                };
                match self.hash_tensor(&files[tensor.file], tensor, &mut buffer, &chunk_done) {
                    Ok(Some(digest)) => {
                        found.lock().insert(tensor.name.clone(), digest);
                    }
                    Ok(None) => return,
                    Err(error) => {
                        failed.lock().get_or_insert(error);
                        return;
                    }
                }
            }
        };
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads = cores.min(16).min(self.tensors.len().max(1));
        thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        if let Some(error) = failed.into_inner() {
            return Err(error);
        }
        if cancel.load(Ordering::Relaxed) {
            return Err(ManifestError::Cancelled { path: self.path.clone() });
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
        chunk_done: &dyn Fn(u64) -> bool,
    ) -> Result<Option<String>, ManifestError> {
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < tensor.len {
            let left = usize::try_from(tensor.len - at).unwrap_or(usize::MAX);
            let size = left.min(buffer.len());
            let chunk = &mut buffer[..size];
            file.read_exact_at(chunk, tensor.start + at)
                .map_err(|error| unreadable(&self.path.join(&self.files[tensor.file].name), &error))?;
            if tensor.len >= LARGE {
                hasher.update_rayon(chunk);
            } else {
                hasher.update(chunk);
            }
            at += size as u64;
            if !chunk_done(size as u64) {
                return Ok(None);
            }
        }
        Ok(Some(hasher.finalize().to_hex().to_string()))
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
        let by_name: BTreeMap<&str, &Tensor> =
            self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let mut hasher = blake3::Hasher::new();
        for (name, tensor) in by_name {
            let shape: Vec<String> = tensor.shape.iter().map(ToString::to_string).collect();
            let digest = digests.get(name).map_or("", String::as_str);
            let line = format!("{name}\0{}\0{}\0{digest}\n", tensor.dtype, shape.join(","));
            hasher.update(line.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}
