//! Whether two nodes see the same checkpoint directory, without reading all of it.

use std::os::unix::fs::FileExt as _;
use std::path::Path;

use twox_hash::xxhash3_128::Hasher;

use crate::driver::handles::CheckpointDir;
use crate::files;

/// Places of each file that are looked at, spread evenly.
const SAMPLES: u64 = 32;
/// Bytes read at each.
const SAMPLE: usize = 4096;

/// Digest over names, sizes, tensors and samples of the data: two directories of one model whose weights differ
/// have different digests, but for bad luck. None if the directory cannot be read. Blocks.
pub(super) fn probe(directory: &CheckpointDir) -> Option<String> {
    let manifest = directory.manifest().ok()?;
    let path = Path::new(&directory.path);
    let mut hasher = Hasher::new();
    for tensor in &manifest.tensors {
        let line = format!(
            "{}\0{}\0{:?}\0{}\0{}\n",
            tensor.name, tensor.dtype, tensor.shape, tensor.file, tensor.start
        );
        hasher.write(line.as_bytes());
    }
    let mut buffer = [0; SAMPLE];
    for file in &manifest.files {
        hasher.write(format!("{}\0{}\n", file.name, file.len).as_bytes());
        let open = files::open_regular(&path.join(&file.name)).ok()?;
        for sample in 0..SAMPLES {
            let at = file.len / SAMPLES * sample;
            let count = open.read_at(&mut buffer, at).ok()?;
            hasher.write(&buffer[..count]);
        }
        let count = open.read_at(&mut buffer, file.len.saturating_sub(SAMPLE as u64)).ok()?;
        hasher.write(&buffer[..count]);
    }
    Some(format!("xxh3:{:032x}", hasher.finish_128()))
}
