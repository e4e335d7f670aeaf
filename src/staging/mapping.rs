//! Segment files and their memory. The only unsafe code of staging: chunks of a mapped segment are handed out
//! for writing to one owner at a time, and for reading once they are valid for good.
#![allow(
    unsafe_code,
    reason = "slices of a shared mapping are made here, under rules that this module keeps"
)]

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};

use memmap2::{Advice, MmapRaw};
use rustix::fs::FallocateFlags;

use super::layout::Layout;
use crate::shared_memory;

/// Memory is taken and touched in pieces of this many bytes.
const PIECE: u64 = 32 << 20;
/// Nobody has it; its bytes mean nothing yet.
const EMPTY: u8 = 0;
/// A [`Claim`] has it.
const CLAIMED: u8 = 1;
/// It may be read, and is not written again through this mapping.
const VALID: u8 = 2;

/// A segment: a file in shared memory that belongs to this process alone (engines only read it).
#[derive(Debug)]
pub(super) struct Segment {
    path: PathBuf,
    file: File,
    raw: Option<Arc<MmapRaw>>,
    live: Weak<Mapping>,
}

impl Segment {
    /// Opens the file, or makes an empty one, 0600, and locks it.
    ///
    /// # Errors
    /// It cannot be opened, or somebody else has it ([`io::ErrorKind::WouldBlock`]).
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = shared_memory::open_segment(path)?;
        Ok(Self { path: path.to_owned(), file, raw: None, live: Weak::new() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes, all of it allocated.
    pub(super) fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Makes it `size` bytes long and takes the memory for them. A longer one is kept unless it is longer by
    /// more than `slack`. Fails with [`io::ErrorKind::StorageFull`] when there is no room, and then is as long as
    /// before; with [`io::ErrorKind::Interrupted`] when `stop` says so, and then has some of it.
    ///
    /// Before each piece `room` says how many bytes may be taken: less than that is [`io::ErrorKind::OutOfMemory`].
    pub(super) fn allocate(
        &mut self,
        size: u64,
        slack: u64,
        room: &dyn Fn() -> u64,
        stop: &dyn Fn() -> bool,
    ) -> io::Result<()> {
        self.unused()?;
        let before = self.size()?;
        if size > before {
            // Nobody else is to run out of memory while this finds out that there is not enough.
            let system = rustix::fs::fstatvfs(&self.file)?;
            // A tmpfs without a limit says that it has no blocks.
            if system.f_blocks > 0 && system.f_bavail.saturating_mul(system.f_frsize) < size - before {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.raw = None;
            // Piece by piece: hundreds of gigabytes take a minute.
            for (at, piece) in pieces(before, size) {
                if stop() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                // All that is still wanted: others take memory, too.
                if room() < size - at {
                    let _ = self.file.set_len(before);
                    return Err(io::ErrorKind::OutOfMemory.into());
                }
                let taken = rustix::fs::fallocate(&self.file, FallocateFlags::empty(), at, piece);
                if let Err(error) = taken {
                    let _ = self.file.set_len(before);
                    return Err(error.into());
                }
            }
        } else if before - size > slack {
            self.raw = None;
            self.file.set_len(size)?;
        }
        Ok(())
    }

    /// Maps it for chunks of this layout: all valid (their bytes were checked), or none.
    ///
    /// # Errors
    /// An earlier mapping is still in use, or the system refuses.
    pub(super) fn map(&mut self, layout: Arc<Layout>, valid: bool) -> io::Result<Arc<Mapping>> {
        self.unused()?;
        let size = self.size()?;
        if size < layout.segment_size() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{} is {size} bytes long, expected {}", self.path.display(), layout.segment_size()),
            ));
        }
        let raw = self.raw()?;
        let state = if valid { VALID } else { EMPTY };
        let states = (0..layout.chunks()).map(|_| AtomicU8::new(state)).collect();
        let mapping = Arc::new(Mapping { raw, layout, states });
        self.live = Arc::downgrade(&mapping);
        Ok(mapping)
    }

    /// Touches its pages, as [`Mapping::populate`] does, until all are touched or `stop` says so.
    ///
    /// # Errors
    /// A mapping is in use, or there is no memory.
    pub(super) fn touch(&mut self, stop: &dyn Fn() -> bool) -> io::Result<()> {
        self.unused()?;
        let raw = self.raw()?;
        let mut pieces = pieces(0, self.size()?).take_while(|_| !stop());
        pieces.try_for_each(|(at, length)| populate(&raw, at, length))
    }

    fn raw(&mut self) -> io::Result<Arc<MmapRaw>> {
        let raw = match &self.raw {
            Some(raw) => Arc::clone(raw),
            None => Arc::new(MmapRaw::map_raw(&self.file)?),
        };
        Ok(Arc::clone(self.raw.insert(raw)))
    }

    /// Removes the file. Mappings stay usable.
    pub(super) fn remove(self) -> io::Result<()> {
        std::fs::remove_file(&self.path)
    }

    fn unused(&self) -> io::Result<()> {
        if self.live.strong_count() > 0 {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("{} is still in use", self.path.display()),
            ));
        }
        Ok(())
    }
}

/// A mapped segment, divided into chunks.
#[derive(Debug)]
pub(super) struct Mapping {
    raw: Arc<MmapRaw>,
    layout: Arc<Layout>,
    states: Box<[AtomicU8]>,
}

impl Mapping {
    pub(super) const fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The bytes of a chunk, once it is valid.
    pub(super) fn bytes(&self, chunk: u32) -> Option<&[u8]> {
        if self.states.get(chunk as usize)?.load(Ordering::Acquire) != VALID {
            return None;
        }
        let (start, length) = self.range(chunk);
        // SAFETY: the range lies within the mapping (`Segment::map` compared the sizes, and the file is never
        // shortened while a `Mapping` lives). A valid chunk is never claimed again through this mapping, so nobody
        // holds a mutable slice of it; `Segment::unused` keeps other mappings of the file from being made, and
        // its lock other processes from writing.
        Some(unsafe { std::slice::from_raw_parts(self.raw.as_ptr().add(start), length) })
    }

    /// Takes an empty chunk for writing; none if it is valid or somebody else has it.
    pub(super) fn claim(self: &Arc<Self>, chunk: u32) -> Option<Claim> {
        let state = self.states.get(chunk as usize)?;
        state.compare_exchange(EMPTY, CLAIMED, Ordering::Acquire, Ordering::Relaxed).ok()?;
        Some(Claim { mapping: Arc::clone(self), chunk })
    }

    /// Touches the pages of a range, so that writing them later costs no faults. An old kernel does not have it;
    /// then nothing happens.
    pub(super) fn populate(&self, start: u64, length: u64) -> io::Result<()> {
        populate(&self.raw, start, length)
    }

    /// Offset and length in the mapping.
    fn range(&self, chunk: u32) -> (usize, usize) {
        let size = self.layout.chunk_size() as usize;
        (chunk as usize * size, self.layout.length(chunk) as usize)
    }
}

/// Start and length of the pieces in which a range of a segment is worked through.
pub(super) fn pieces(mut from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> {
    std::iter::from_fn(move || {
        let piece = (from, PIECE.min(to.saturating_sub(from)));
        from += piece.1;
        (piece.1 > 0).then_some(piece)
    })
}

fn populate(raw: &MmapRaw, start: u64, length: u64) -> io::Result<()> {
    let (Ok(start), Ok(length)) = (usize::try_from(start), usize::try_from(length)) else {
        return Ok(());
    };
    let length = length.min(raw.len().saturating_sub(start));
    match raw.advise_range(Advice::PopulateWrite, start, length) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        other => other,
    }
}

/// An empty chunk that one owner may write. Dropping it leaves the chunk empty.
#[derive(Debug)]
pub(super) struct Claim {
    mapping: Arc<Mapping>,
    chunk: u32,
}

impl Claim {
    pub(super) const fn chunk(&self) -> u32 {
        self.chunk
    }

    /// From now on everybody may read it.
    pub(super) fn finish(self) {
        self.mapping.states[self.chunk as usize].store(VALID, Ordering::Release);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let state = &self.mapping.states[self.chunk as usize];
        // Fails after `finish`.
        let _ = state.compare_exchange(CLAIMED, EMPTY, Ordering::Release, Ordering::Relaxed);
    }
}

impl Deref for Claim {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let (start, length) = self.mapping.range(self.chunk);
        // SAFETY: in range, see `Mapping::bytes`. The chunk is claimed, and there is one claim of it: this one.
        unsafe { std::slice::from_raw_parts(self.mapping.raw.as_ptr().add(start), length) }
    }
}

impl DerefMut for Claim {
    fn deref_mut(&mut self) -> &mut [u8] {
        let (start, length) = self.mapping.range(self.chunk);
        // SAFETY: as in `deref`; chunks do not overlap, and `&mut self` makes this the only slice of the chunk.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.raw.as_mut_ptr().add(start), length) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::FileSize;
    use super::*;

    fn layout(size: u64) -> Arc<Layout> {
        Arc::new(Layout::new(4096, vec![FileSize { name: "a.safetensors".to_owned(), size }]).unwrap())
    }

    #[test]
    fn a_chunk_is_written_by_one_owner_and_read_when_it_is_finished() {
        let dir = tempfile::tempdir().unwrap();
        let mut segment = Segment::open(&dir.path().join("a")).unwrap();
        segment.allocate(8192, 0, &|| u64::MAX, &|| false).unwrap();
        let mapping = segment.map(layout(5000), false).unwrap();
        mapping.populate(0, 8192).unwrap();
        let mut claim = mapping.claim(1).unwrap();
        assert!(mapping.claim(1).is_none(), "one owner");
        assert_eq!(claim.len(), 5000 - 4096);
        claim.fill(7);
        assert_eq!(mapping.bytes(1), None, "not yet");
        claim.finish();
        assert_eq!(mapping.bytes(1).unwrap(), vec![7; 904]);
        assert!(mapping.claim(1).is_none(), "valid for good");
        drop(mapping.claim(0).unwrap());
        assert!(mapping.claim(0).is_some(), "given back");
        assert!(mapping.claim(2).is_none() && mapping.bytes(2).is_none(), "there is no such chunk");
        assert_eq!(&std::fs::read(dir.path().join("a")).unwrap()[4096..5000], vec![7; 904]);
    }

    #[test]
    fn a_segment_is_mapped_once_at_a_time_and_belongs_to_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut segment = Segment::open(&path).unwrap();
        assert_eq!(Segment::open(&path).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        segment.allocate(8192, 0, &|| u64::MAX, &|| false).unwrap();
        let mapping = segment.map(layout(5000), true).unwrap();
        let claim_keeps_it = segment.map(layout(5000), false).unwrap_err();
        assert!(claim_keeps_it.to_string().ends_with("is still in use"), "{claim_keeps_it}");
        assert!(
            segment.allocate(1 << 20, 0, &|| u64::MAX, &|| false).is_err(),
            "not resized under a mapping"
        );
        drop(mapping);
        assert!(segment.map(layout(9000), false).unwrap_err().to_string().contains("expected 12288"));
        segment.map(layout(5000), false).unwrap();
    }

    #[test]
    fn the_memory_stays_as_long_as_the_size_fits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut segment = Segment::open(&path).unwrap();
        segment.allocate(1 << 20, 4096, &|| u64::MAX, &|| false).unwrap();
        segment.map(layout(5000), false).unwrap().claim(0).unwrap().fill(9);
        segment.allocate((1 << 20) - 4096, 4096, &|| u64::MAX, &|| false).unwrap();
        assert_eq!(segment.size().unwrap(), 1 << 20, "kept");
        let mapping = segment.map(layout(5000), false).unwrap();
        assert_eq!(mapping.claim(0).unwrap()[0], 9, "and its bytes, too");
        drop(mapping);
        segment.allocate(8192, 4096, &|| u64::MAX, &|| false).unwrap();
        assert_eq!(segment.size().unwrap(), 8192, "far too long");
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn taking_memory_can_be_interrupted_and_goes_on_where_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let mut segment = Segment::open(&dir.path().join("a")).unwrap();
        let size = 2 * PIECE + 4096;
        let asked = std::cell::Cell::new(0);
        let stop = || asked.replace(asked.get() + 1) == 1;
        let error = segment.allocate(size, 0, &|| u64::MAX, &stop).unwrap_err();
        assert_eq!((error.kind(), segment.size().unwrap()), (io::ErrorKind::Interrupted, PIECE));
        segment.allocate(size, 0, &|| u64::MAX, &|| false).unwrap();
        assert_eq!(segment.size().unwrap(), size);
        segment.touch(&|| false).unwrap();
        // No room for so much: nothing of it is kept.
        let error = segment.allocate(1 << 60, 0, &|| u64::MAX, &|| false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(segment.size().unwrap(), size);
    }
}
