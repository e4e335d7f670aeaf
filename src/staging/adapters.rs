//! Files of LoRA adapters on a node: kept in the state directory, so that engines that come later get them whatever
//! has become of the directory they came from. One that this node cannot read comes in pieces from the leader.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::error::StageError;
use crate::driver::handles::{ADAPTER_FILE, AdapterPlace};
use crate::files;
use crate::manifest::Manifest;

/// Folder in the state directory.
const FOLDER: &str = "adapters";
/// Ending of a directory that is not complete.
const PART: &str = "part";
/// Characters of a digest.
const DIGEST: usize = 64;

type Result<T> = std::result::Result<T, StageError>;

/// The adapters of a node, each in a directory named by its whole digest.
#[derive(Debug)]
pub(super) struct Adapters {
    node: String,
    dir: PathBuf,
    /// Hashed since this process began.
    checked: BTreeSet<String>,
}

impl Adapters {
    pub(super) fn new(node: &str, state_dir: &Path) -> Self {
        Self { node: node.to_owned(), dir: state_dir.join(FOLDER), checked: BTreeSet::new() }
    }

    /// Where an adapter is; copied from `source` if it is the same one. Blocks.
    pub(super) fn take(&mut self, digest: &str, source: Option<&Path>) -> Result<AdapterPlace> {
        let place = self.place(digest)?;
        if let Some(here) = self.here(digest, &place) {
            return Ok(here);
        }
        let part = place.with_extension(PART);
        if let Some(source) = source.filter(|source| digest_of(source).as_deref() == Some(digest)) {
            self.create(&part)?;
            let (from, to) = (source.join(ADAPTER_FILE), part.join(ADAPTER_FILE));
            let copied = fs::copy(&from, &to).and_then(|_| File::open(&to)?.sync_all());
            copied
                .map_err(|error| self.io(format!("copying {} to {}", from.display(), to.display()), error))?;
            // It may have been replaced meanwhile.
            if let Ok(here) = self.complete(digest, &place, &part) {
                return Ok(here);
            }
        }
        Ok(AdapterPlace::Lacks { from: length(&part.join(ADAPTER_FILE)) })
    }

    /// Takes the next piece of an adapter's file. One that is not the next is left alone: the answer says which is.
    /// Blocks.
    pub(super) fn piece(
        &mut self,
        digest: &str,
        offset: u64,
        size: u64,
        bytes: &[u8],
    ) -> Result<AdapterPlace> {
        let place = self.place(digest)?;
        if let Some(here) = self.here(digest, &place) {
            return Ok(here);
        }
        let part = place.with_extension(PART);
        let path = part.join(ADAPTER_FILE);
        let before = length(&path);
        if before > size {
            // Of another attempt, which knew another file.
            self.remove(&part)?;
            return Ok(AdapterPlace::Lacks { from: 0 });
        }
        if offset != before {
            return Ok(AdapterPlace::Lacks { from: before });
        }
        self.create(&part)?;
        let last = before + bytes.len() as u64 >= size;
        let written = || {
            let mut file = File::options().create(true).append(true).mode(0o600).open(&path)?;
            file.write_all(bytes)?;
            if last { file.sync_all() } else { Ok(()) }
        };
        written().map_err(|error| self.io(format!("writing {}", path.display()), error))?;
        if last {
            return self.complete(digest, &place, &part);
        }
        Ok(AdapterPlace::Lacks { from: length(&path) })
    }

    /// Removes all others. Blocks.
    pub(super) fn keep(&mut self, digests: &BTreeSet<String>) -> Result<()> {
        self.checked.retain(|digest| digests.contains(digest));
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(self.io(format!("reading {}", self.dir.display()), error)),
        };
        for entry in entries.filter_map(std::result::Result::ok) {
            if !entry.file_name().to_str().is_some_and(|name| digests.contains(name)) {
                self.remove(&entry.path())?;
            }
        }
        Ok(())
    }

    fn here(&mut self, digest: &str, place: &Path) -> Option<AdapterPlace> {
        let here = || AdapterPlace::Here { path: place.display().to_string() };
        if self.checked.contains(digest) && place.join(ADAPTER_FILE).is_file() {
            return Some(here());
        }
        match digest_of(place) {
            Some(actual) if actual == digest => {
                self.checked.insert(digest.to_owned());
                Some(here())
            }
            Some(actual) => {
                tracing::warn!(path = %place.display(), actual, "an adapter is damaged and not used");
                let _ = fs::remove_dir_all(place);
                None
            }
            None => None,
        }
    }

    /// All bytes are there: they are the adapter, or they are removed.
    fn complete(&mut self, digest: &str, place: &Path, part: &Path) -> Result<AdapterPlace> {
        let actual = digest_of(part);
        if actual.as_deref() != Some(digest) {
            self.remove(part)?;
            let actual = actual.as_deref().unwrap_or("none, it cannot be read");
            let reason = format!("digest of the adapter is {actual}, expected {digest}");
            return Err(StageError::Refused { node: self.node.clone(), reason });
        }
        // What is there is damaged, or `here` would have found it.
        self.remove(place)?;
        let renamed = fs::rename(part, place).and_then(|()| File::open(&self.dir)?.sync_all());
        renamed.map_err(|error| self.io(format!("renaming {}", part.display()), error))?;
        self.checked.insert(digest.to_owned());
        Ok(AdapterPlace::Here { path: place.display().to_string() })
    }

    /// Digests come from peers and become names of directories.
    fn place(&self, digest: &str) -> Result<PathBuf> {
        let plain = digest.len() == DIGEST && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !plain {
            let reason = format!("{digest:?} is no digest of an adapter");
            return Err(StageError::Refused { node: self.node.clone(), reason });
        }
        Ok(self.dir.join(digest))
    }

    fn create(&self, part: &Path) -> Result<()> {
        let created = fs::DirBuilder::new().recursive(true).mode(0o700).create(part);
        created.map_err(|error| self.io(format!("creating {}", part.display()), error))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        let removed = files::absent_is_fine(fs::remove_dir_all(path));
        removed.map_err(|error| self.io(format!("removing {}", path.display()), error))
    }

    fn io(&self, what: String, error: io::Error) -> StageError {
        StageError::Io { node: self.node.clone(), what, error }
    }
}

/// Removes all adapters of a state directory, after a planned end.
///
/// # Errors
/// They are there and cannot be removed.
pub fn remove_adapters(state_dir: &Path) -> io::Result<()> {
    files::absent_is_fine(fs::remove_dir_all(state_dir.join(FOLDER)))
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Whole digest of a directory; none if it cannot be read.
fn digest_of(path: &Path) -> Option<String> {
    let manifest = Manifest::read(path).ok()?;
    let digests = manifest.digests(&|_| {}, &AtomicBool::new(false)).ok()?;
    Some(digests.whole)
}
