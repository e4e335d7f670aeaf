//! `segments.json` in the state directory: what the segments hold, for a restarted sidecar.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::digest::{Contents, Digest};
use super::layout::{FileSize, Layout};
use crate::driver::handles::StagedVersion;
use crate::files;

const FILE: &str = "segments.json";
const FORMAT: u32 = 1;

/// What a segment is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    /// Holds the committed version.
    Current,
    /// Holds the version before it.
    Previous,
    /// Holds a complete version that is not committed.
    Staged,
    /// Holds chunks that may be reused. A segment that is being filled has no record.
    Left,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SegmentRecord {
    pub(super) role: Role,
    pub(super) version: Option<StagedVersion>,
    chunk: u32,
    files: Vec<FileSize>,
    /// One after the other, 32 hex digits each, `-` for one that is not known.
    digests: Vec<String>,
}

impl SegmentRecord {
    pub(super) fn new(role: Role, contents: &Contents, version: Option<StagedVersion>) -> Self {
        let text =
            |digest: &Option<Digest>| digest.map_or_else(|| "-".to_owned(), |digest| digest.to_string());
        Self {
            role,
            version,
            chunk: contents.layout.chunk_size(),
            files: contents.layout.files().to_vec(),
            digests: contents.digests.iter().map(text).collect(),
        }
    }

    /// What the segment holds, if the record makes sense.
    pub(super) fn contents(&self) -> Option<Contents> {
        let layout = Layout::new(self.chunk, self.files.clone()).ok()?;
        let digests = self.digests();
        (layout.chunks() as usize == digests.len()).then(|| Contents { layout: Arc::new(layout), digests })
    }

    /// Its digests, as far as known.
    pub(super) fn digests(&self) -> Vec<Option<Digest>> {
        self.digests.iter().map(|text| Digest::parse(text)).collect()
    }
}

/// All of them, by the segment's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Records {
    format: u32,
    pub(super) segments: BTreeMap<String, SegmentRecord>,
}

impl Default for Records {
    fn default() -> Self {
        Self { format: FORMAT, segments: BTreeMap::new() }
    }
}

impl Records {
    /// Where they are.
    pub(super) fn path(dir: &Path) -> PathBuf {
        dir.join(FILE)
    }

    /// Blocks. What is not understood counts as nothing: segments can be filled again.
    pub(super) fn read(dir: &Path) -> io::Result<Self> {
        let Some(bytes) = files::read(&Self::path(dir))? else {
            return Ok(Self::default());
        };
        match serde_json::from_slice::<Self>(&bytes) {
            Ok(records) if records.format == FORMAT => return Ok(records),
            Ok(records) => tracing::warn!(format = records.format, expected = FORMAT, "{FILE} is not used"),
            Err(error) => tracing::warn!(%error, "{FILE} is not used"),
        }
        Ok(Self::default())
    }

    /// Durable when it returns. Blocks.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        files::replace_durably(dir, FILE, &serde_json::to_vec(self)?)
    }
}
