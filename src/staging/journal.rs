//! `upload.json` and `upload.digests` in the state directory: a sidecar that was started again goes on with the
//! upload that its predecessor took.
//!
//! Nothing is synced: what a killed process has written is there for the next one, and when the machine ends, the
//! segment does as well. Nothing is trusted either: a chunk counts when its bytes have the digest that was noted.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::layout::{FileSize, Layout};
use crate::files;

const RECORD: &str = "upload.json";
const DIGESTS: &str = "upload.digests";
const FORMAT: u32 = 1;
/// In place of the digest of a chunk that is not there.
const ABSENT: [u8; Digest::LEN] = [0; Digest::LEN];

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    id: String,
    segment: String,
    chunk: u32,
    files: Vec<FileSize>,
}

/// The notes of one upload.
#[derive(Debug)]
pub(super) struct Journal {
    digests: File,
}

/// What a predecessor noted.
#[derive(Debug)]
pub(super) struct Noted {
    /// Name of the upload.
    pub(super) id: String,
    /// Name of its segment.
    pub(super) segment: String,
    /// Layout of the segment.
    pub(super) layout: Layout,
    /// Digests of the chunks that were complete.
    pub(super) digests: Vec<Option<Digest>>,
    /// To go on with.
    pub(super) journal: Journal,
}

impl Journal {
    /// An upload begins, and nothing of it is there. Blocks.
    pub(super) fn begin(dir: &Path, id: &str, segment: &str, layout: &Layout) -> io::Result<Self> {
        Self::remove(dir)?;
        let digests = File::create(dir.join(DIGESTS))?;
        digests.set_len(u64::from(layout.chunks()) * Digest::LEN as u64)?;
        let record = Record {
            format: FORMAT,
            id: id.to_owned(),
            segment: segment.to_owned(),
            chunk: layout.chunk_size(),
            files: layout.files().to_vec(),
        };
        files::replace(dir, RECORD, &serde_json::to_vec(&record)?)?;
        Ok(Self { digests })
    }

    /// A chunk is complete.
    pub(super) fn note(&self, chunk: u32, digest: Digest) -> io::Result<()> {
        self.digests.write_all_at(digest.as_bytes(), u64::from(chunk) * Digest::LEN as u64)
    }

    /// What is noted; nothing if it makes no sense. Blocks.
    pub(super) fn read(dir: &Path) -> io::Result<Option<Noted>> {
        let Some(text) = files::read(&dir.join(RECORD))? else { return Ok(None) };
        let Ok(record) = serde_json::from_slice::<Record>(&text) else { return Ok(None) };
        let Ok(layout) = Layout::new(record.chunk, record.files) else { return Ok(None) };
        let bytes = fs::read(dir.join(DIGESTS))?;
        let (noted, rest) = bytes.as_chunks::<{ Digest::LEN }>();
        if record.format != FORMAT || noted.len() != layout.chunks() as usize || !rest.is_empty() {
            return Ok(None);
        }
        let digests =
            noted.iter().map(|bytes| (*bytes != ABSENT).then(|| Digest::from_bytes(*bytes))).collect();
        let journal = Self { digests: File::options().write(true).open(dir.join(DIGESTS))? };
        Ok(Some(Noted { id: record.id, segment: record.segment, layout, digests, journal }))
    }

    /// There is no upload any more. Blocks.
    pub(super) fn remove(dir: &Path) -> io::Result<()> {
        for name in [RECORD, DIGESTS] {
            files::absent_is_fine(fs::remove_file(dir.join(name)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_read_and_what_makes_no_sense_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let files = vec![FileSize { name: "a.safetensors".to_owned(), size: 9000 }];
        let layout = Layout::new(4096, files).unwrap();
        let digest = Digest::of(b"chunk");
        assert!(Journal::read(dir.path()).unwrap().is_none());
        Journal::begin(dir.path(), "up", "a", &layout).unwrap().note(1, digest).unwrap();
        let noted = Journal::read(dir.path()).unwrap().unwrap();
        assert_eq!((noted.id.as_str(), noted.segment.as_str(), &noted.layout), ("up", "a", &layout));
        assert_eq!(noted.digests, [None, Some(digest), None]);
        noted.journal.note(2, digest).unwrap();
        assert_eq!(Journal::read(dir.path()).unwrap().unwrap().digests, [None, Some(digest), Some(digest)]);
        // The next one begins with nothing.
        Journal::begin(dir.path(), "up", "a", &layout).unwrap();
        assert_eq!(Journal::read(dir.path()).unwrap().unwrap().digests, [None; 3]);
        fs::write(dir.path().join(DIGESTS), [0; 47]).unwrap();
        assert!(Journal::read(dir.path()).unwrap().is_none(), "another number of chunks");
        fs::write(dir.path().join(RECORD), "{}").unwrap();
        assert!(Journal::read(dir.path()).unwrap().is_none());
        Journal::remove(dir.path()).unwrap();
        Journal::remove(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
