//! The last committed update on disk: one JSON file, replaced as a whole.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use dp_sidecar_protocol::machine::weight_update::{Commit, Record};
use serde::{Deserialize, Serialize};

/// Name in the state directory.
const FILE: &str = "committed.json";
const FORMAT: u32 = 1;

/// What the file holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Committed {
    format: u32,
    /// Checkpoint directory of the command line. For another model the record means nothing.
    pub(super) model_path: String,
    /// The commit record proper.
    pub(super) commit: Commit,
    /// Written when the update has ended; missing if the sidecar ended in between.
    pub(super) record: Option<Record>,
}

impl Committed {
    pub(super) const fn new(model_path: String, commit: Commit, record: Option<Record>) -> Self {
        Self { format: FORMAT, model_path, commit, record }
    }
}

/// Where it is.
#[derive(Clone, Debug)]
pub(super) struct Journal {
    dir: PathBuf,
}

impl Journal {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// Blocks.
    pub(super) fn read(&self) -> io::Result<Option<Committed>> {
        let bytes = match fs::read(self.dir.join(FILE)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let committed: Committed = serde_json::from_slice(&bytes)?;
        if committed.format != FORMAT {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("format {}, expected {FORMAT}", committed.format),
            ));
        }
        Ok(Some(committed))
    }

    /// Durable when it returns `Ok`; certainly not in force when it returns an error. Blocks.
    pub(super) fn write(&self, committed: &Committed) -> io::Result<()> {
        let temporary = self.dir.join(format!("{FILE}.new"));
        let result = self.replace(&temporary, committed);
        if result.is_err() {
            // What is left of it does no harm: it is never read.
            fs::remove_file(&temporary).ok();
        }
        result
    }

    fn replace(&self, temporary: &Path, committed: &Committed) -> io::Result<()> {
        let mut file = File::create(temporary)?;
        file.write_all(&serde_json::to_vec_pretty(committed)?)?;
        file.sync_all()?;
        drop(file);
        let dir = File::open(&self.dir)?;
        fs::rename(temporary, self.dir.join(FILE))?;
        // The rename is in force for every reader from here. Should this fail, only a crash of the whole
        // machine could take it back, and no engine survives that.
        dir.sync_all().or(Ok(()))
    }

    /// Forgets it. Blocks.
    pub(super) fn clear(&self) -> io::Result<()> {
        match fs::remove_file(self.dir.join(FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dp_sidecar_protocol::{UpdateId, WeightVersion};

    fn committed(version: &str) -> Committed {
        let commit = Commit {
            id: UpdateId("u1".to_owned()),
            version: WeightVersion(version.to_owned()),
            ..Commit::default()
        };
        Committed::new("/model".to_owned(), commit, None)
    }

    #[test]
    fn what_was_written_is_read_and_can_be_replaced_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path());
        assert_eq!(journal.read().unwrap(), None);
        for version in ["v1", "v2"] {
            journal.write(&committed(version)).unwrap();
            assert_eq!(journal.read().unwrap(), Some(committed(version)));
        }
        journal.clear().unwrap();
        journal.clear().unwrap();
        assert_eq!(journal.read().unwrap(), None);
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_record() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path());
        journal.write(&committed("v1")).unwrap();
        fs::create_dir(dir.path().join("committed.json.new")).unwrap();
        journal.write(&committed("v2")).unwrap_err();
        assert_eq!(journal.read().unwrap(), Some(committed("v1")));
    }

    #[test]
    fn a_damaged_file_is_an_error_and_not_an_empty_journal() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(Journal::new(dir.path()).read().is_err());
    }
}
