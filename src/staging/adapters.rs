//! Files of LoRA adapters on a node: kept in the state directory, so that engines that come later get them whatever
//! has become of the directory they came from. One that this node cannot read comes in pieces from the leader.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::error::{Doing as _, StageError};
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
    dir: PathBuf,
    /// Hashed since this process began.
    checked: BTreeSet<String>,
}

impl Adapters {
    pub(super) fn new(state_dir: &Path) -> Self {
        Self { dir: state_dir.join(FOLDER), checked: BTreeSet::new() }
    }

    /// Where an adapter is; copied from `source` if it is the same one. Blocks.
    pub(super) fn take(&mut self, digest: &str, source: Option<&Path>) -> Result<AdapterPlace> {
        let home = self.dir_of(digest)?;
        if let Some(here) = self.here(digest, &home) {
            return Ok(here);
        }
        let part = home.with_extension(PART);
        if let Some(source) = source.filter(|source| digest_of(source).as_deref() == Some(digest)) {
            create(&part)?;
            let (from, to) = (source.join(ADAPTER_FILE), part.join(ADAPTER_FILE));
            let copied = copy(&from, &to);
            copied.doing(|| format!("copying {} to {}", from.display(), to.display()))?;
            // It may have been replaced meanwhile.
            if let Ok(here) = self.complete(digest, &home, &part) {
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
        let home = self.dir_of(digest)?;
        if let Some(here) = self.here(digest, &home) {
            return Ok(here);
        }
        let part = home.with_extension(PART);
        let path = part.join(ADAPTER_FILE);
        let before = length(&path);
        if before > size {
            // Of another attempt, which knew another file.
            remove(&part)?;
            return Ok(AdapterPlace::Lacks { from: 0 });
        }
        if offset != before {
            return Ok(AdapterPlace::Lacks { from: before });
        }
        create(&part)?;
        let last = before + bytes.len() as u64 >= size;
        let written = || {
            let mut file = File::options().create(true).append(true).mode(0o600).open(&path)?;
            file.write_all(bytes)?;
            if last { file.sync_all() } else { Ok(()) }
        };
        written().doing(|| format!("writing {}", path.display()))?;
        if last {
            return self.complete(digest, &home, &part);
        }
        Ok(AdapterPlace::Lacks { from: length(&path) })
    }

    /// Removes all others. Blocks.
    pub(super) fn keep(&mut self, digests: &BTreeSet<String>) -> Result<()> {
        self.checked.retain(|digest| digests.contains(digest));
        if !self.dir.exists() {
            return Ok(());
        }
        let entries = fs::read_dir(&self.dir).doing(|| format!("reading {}", self.dir.display()))?;
        for entry in entries.filter_map(std::result::Result::ok) {
            if !entry.file_name().to_str().is_some_and(|name| digests.contains(name)) {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    fn here(&mut self, digest: &str, home: &Path) -> Option<AdapterPlace> {
        let here = || AdapterPlace::Here { path: home.display().to_string() };
        if self.checked.contains(digest) && home.join(ADAPTER_FILE).is_file() {
            return Some(here());
        }
        match digest_of(home) {
            Some(actual) if actual == digest => {
                self.checked.insert(digest.to_owned());
                Some(here())
            }
            Some(actual) => {
                tracing::warn!(path = %home.display(), actual, "an adapter is damaged and not used");
                let _ = fs::remove_dir_all(home);
                None
            }
            None => None,
        }
    }

    /// All bytes are there: they are the adapter, or they are removed.
    fn complete(&mut self, digest: &str, home: &Path, part: &Path) -> Result<AdapterPlace> {
        let actual = digest_of(part);
        if actual.as_deref() != Some(digest) {
            remove(part)?;
            let actual = actual.as_deref().unwrap_or("none, it cannot be read");
            return Err(StageError::Refused(format!("digest of the adapter is {actual}, expected {digest}")));
        }
        // What is there is damaged, or `here` would have found it.
        remove(home)?;
        let renamed = fs::rename(part, home).and_then(|()| File::open(&self.dir)?.sync_all());
        renamed.doing(|| format!("renaming {}", part.display()))?;
        self.checked.insert(digest.to_owned());
        Ok(AdapterPlace::Here { path: home.display().to_string() })
    }

    /// Digests come from peers and become names of directories.
    fn dir_of(&self, digest: &str) -> Result<PathBuf> {
        let plain = digest.len() == DIGEST && digest.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !plain {
            return Err(StageError::Refused(format!("{digest:?} is no digest of an adapter")));
        }
        Ok(self.dir.join(digest))
    }
}

fn create(part: &Path) -> Result<()> {
    let created = fs::DirBuilder::new().recursive(true).mode(0o700).create(part);
    created.doing(|| format!("creating {}", part.display()))
}

fn remove(path: &Path) -> Result<()> {
    files::absent_is_fine(fs::remove_dir_all(path)).doing(|| format!("removing {}", path.display()))
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Whole digest of a directory; none if it cannot be read.
fn digest_of(path: &Path) -> Option<String> {
    let manifest = Manifest::read(path, None).ok()?;
    let digests = manifest.digests(&|_| {}, &AtomicBool::new(false)).ok()?;
    Some(digests.whole)
}
/// Copies a file that somebody else may replace meanwhile, also by one that would block.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let (mut from, mut to) = (files::open_regular(from)?, File::create(to)?);
    io::copy(&mut from, &mut to)?;
    to.sync_all()
}
