//! Where the files of a checkpoint lie in a segment, and its chunks.
//!
//! Files lie one after the other, each from a chunk boundary on, so that engines find each file's safetensors
//! header at its start. Chunk `i` begins at `i * chunk size`; the last chunk of a file may be short.

use std::collections::BTreeSet;
use std::ops::Range;

use dp_sidecar_protocol::machine::weight_update::Extent;
use serde::{Deserialize, Serialize};

use crate::manifest::Manifest;

/// A checkpoint has no more files than this.
const MAX_FILES: usize = 100_000;
/// Chunks are numbered with 32 bits, and each costs memory of ours.
const MAX_CHUNKS: u64 = 1 << 24;
/// Shortest and longest chunk, in bytes.
const CHUNK_SIZES: Range<u32> = 4096..(64 << 20) + 1;

/// A file of a checkpoint and its length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSize {
    /// Plain file name, ending in `.safetensors`.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
}

/// The layout of a checkpoint in a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    chunk: u32,
    files: Vec<FileSize>,
    /// First chunk of each file; one more entry for the end.
    first: Vec<u32>,
}

impl Layout {
    /// Lays files out in the order given.
    ///
    /// # Errors
    /// What is wrong with a name, a size, or the chunk size.
    pub(super) fn new(chunk: u32, files: Vec<FileSize>) -> Result<Self, String> {
        if !CHUNK_SIZES.contains(&chunk) || !chunk.is_multiple_of(4096) {
            return Err(format!(
                "chunks of {chunk} bytes, expected a multiple of 4096, at most {}",
                CHUNK_SIZES.end - 1
            ));
        }
        if files.is_empty() || files.len() > MAX_FILES {
            return Err(format!("{} files, expected 1 to {MAX_FILES}", files.len()));
        }
        let mut names = BTreeSet::new();
        let mut first = vec![0];
        let mut next = 0u64;
        for file in &files {
            let name = &file.name;
            let plain = !name.contains(['/', '\0']) && name.len() <= 255 && name.ends_with(".safetensors");
            if !plain {
                return Err(format!("file name {name:?}, expected a plain *.safetensors name"));
            }
            if !names.insert(name) {
                return Err(format!("file {name:?} occurs twice"));
            }
            if file.size == 0 {
                return Err(format!("file {name:?} is empty"));
            }
            next = next.saturating_add(file.size.div_ceil(u64::from(chunk)));
            let too_many = || format!("more than {MAX_CHUNKS} chunks of {chunk} bytes");
            if next > MAX_CHUNKS {
                return Err(too_many());
            }
            first.push(u32::try_from(next).map_err(|_| too_many())?);
        }
        Ok(Self { chunk, files, first })
    }

    /// Of the files of a manifest.
    pub(super) fn of(manifest: &Manifest, chunk: u32) -> Result<Self, String> {
        let files = manifest.files.iter();
        Self::new(chunk, files.map(|file| FileSize { name: file.name.clone(), size: file.len }).collect())
    }

    /// Bytes of a full chunk.
    pub(super) const fn chunk_size(&self) -> u32 {
        self.chunk
    }

    /// The files, in order.
    pub(super) fn files(&self) -> &[FileSize] {
        &self.files
    }

    /// Number of chunks.
    pub(super) fn chunks(&self) -> u32 {
        self.first.last().copied().unwrap_or_default()
    }

    /// Bytes of a segment that holds it.
    pub(super) fn segment_size(&self) -> u64 {
        u64::from(self.chunks()) * u64::from(self.chunk)
    }

    /// Bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// Where each file lies.
    pub(super) fn extents(&self) -> Vec<Extent> {
        let files = self.files.iter().zip(&self.first);
        files
            .map(|(file, first)| Extent {
                offset: u64::from(*first) * u64::from(self.chunk),
                length: file.size,
            })
            .collect()
    }

    pub(super) fn first_chunk(&self, file: usize) -> u32 {
        self.first[file]
    }

    /// Position of the chunk's file, and the chunk's first byte in it.
    pub(super) fn locate(&self, chunk: u32) -> (usize, u64) {
        let file = self.first.partition_point(|first| *first <= chunk) - 1;
        (file, u64::from(chunk - self.first[file]) * u64::from(self.chunk))
    }

    /// Bytes of a chunk.
    pub(super) fn length(&self, chunk: u32) -> u32 {
        let (file, offset) = self.locate(chunk);
        let left = self.files[file].size - offset;
        u32::try_from(left).map_or(self.chunk, |left| left.min(self.chunk))
    }

    /// For errors: number, file and bytes of a chunk.
    pub(super) fn describe(&self, chunk: u32) -> String {
        let (file, offset) = self.locate(chunk);
        let end = offset + u64::from(self.length(chunk));
        format!("chunk {chunk} ({}, bytes {offset} to {end})", self.files[file].name)
    }

    /// The order in which chunks are best sent: what holds the headers first.
    pub(super) fn order(&self) -> Vec<u32> {
        let firsts = &self.first[..self.files.len()];
        let mut order = firsts.to_vec();
        order.extend((0..self.chunks()).filter(|chunk| firsts.binary_search(chunk).is_err()));
        order
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layout(chunk: u32, sizes: &[u64]) -> Result<Layout, String> {
        let files = sizes.iter().enumerate();
        Layout::new(
            chunk,
            files.map(|(at, size)| FileSize { name: format!("{at}.safetensors"), size: *size }).collect(),
        )
    }

    proptest! {
        #[test]
        fn chunks_cover_every_file_exactly_once(sizes in prop::collection::vec(1u64..40_000, 1..8)) {
            let layout = layout(4096, &sizes).unwrap();
            let mut covered = vec![0; sizes.len()];
            for chunk in 0..layout.chunks() {
                let (file, offset) = layout.locate(chunk);
                prop_assert_eq!(covered[file], offset);
                covered[file] += u64::from(layout.length(chunk));
                let extent = layout.extents()[file];
                prop_assert_eq!(u64::from(chunk) * 4096, extent.offset + offset);
            }
            prop_assert_eq!(covered, sizes);
            let mut order = layout.order();
            order.sort_unstable();
            prop_assert_eq!(order, (0..layout.chunks()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn headers_come_first() {
        assert_eq!(layout(4096, &[9000, 100, 5000]).unwrap().order(), [0, 3, 4, 1, 2, 5]);
    }

    #[test]
    fn names_and_sizes_from_outside_are_checked() {
        let new = |name: &str, size| {
            let file = FileSize { name: name.to_owned(), size };
            Layout::new(4096, vec![file.clone(), FileSize { name: "z.safetensors".to_owned(), size: 1 }])
                .map(|_| ())
        };
        assert_eq!(new("a.safetensors", 1), Ok(()));
        assert!(new("../a.safetensors", 1).unwrap_err().contains("plain"));
        assert!(new("a.bin", 1).unwrap_err().contains("plain"));
        assert!(new("z.safetensors", 1).unwrap_err().contains("twice"));
        assert!(new("a.safetensors", 0).unwrap_err().contains("empty"));
        assert!(new("a.safetensors", u64::MAX).unwrap_err().contains("chunks"));
        assert!(layout(1000, &[1]).unwrap_err().contains("4096"));
        assert!(layout(0, &[1]).is_err() && layout(128 << 20, &[1]).is_err());
    }
}
