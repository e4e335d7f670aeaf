//! What survives the sidecar: three files in its state directory.
//!
//! * `committed.json`: the last committed update. Its rename is the commit point.
//! * `ledger.json`: which engines are not to be trusted ([`Ledger`]): written before an update touches the first
//!   engine, and when it has ended.
//! * `updates.jsonl`: records of the last updates, for people. Nothing is decided by it.
//!
//! The first two are replaced as a whole, not appended to: a file is there or not, so there is no torn tail to reason
//! about, nothing to compact, and what a late joiner is brought to can never differ from what was committed.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dp_sidecar_protocol::machine::weight_update::{Committed, Ledger};
use parking_lot::Mutex;

use super::types::UpdateRecord;
use crate::files;

/// Names in the state directory.
const FILE: &str = "committed.json";
const LEDGER: &str = "ledger.json";
const HISTORY: &str = "updates.jsonl";
/// The history is cut when it is longer, in bytes.
const HISTORY_LIMIT: u64 = 4 << 20;
/// So many records are kept then.
const HISTORY_KEPT: usize = 100;

#[derive(Clone, Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    /// Number of the newest ledger written: a write that was overtaken by a later one is left out.
    newest: Arc<Mutex<u64>>,
}

impl Journal {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), newest: Arc::default() }
    }

    /// Blocks.
    pub(super) fn read(&self) -> io::Result<Option<Committed>> {
        let Some(bytes) = files::read(&self.dir.join(FILE))? else {
            return Ok(None);
        };
        let committed: Committed = serde_json::from_slice(&bytes)?;
        if committed.format != Committed::FORMAT {
            let text = format!("format {}, expected {}", committed.format, Committed::FORMAT);
            return Err(io::Error::other(text));
        }
        Ok(Some(committed))
    }

    /// Blocks.
    pub(super) fn read_ledger(&self) -> io::Result<Ledger> {
        let bytes = files::read(&self.dir.join(LEDGER))?;
        Ok(bytes.map(|bytes| serde_json::from_slice(&bytes)).transpose()?.unwrap_or_default())
    }

    /// In force when it returns `Ok`, with why it may not survive a crash of the machine, if so; certainly not when it
    /// returns an error. Blocks.
    pub(super) fn write(&self, committed: &Committed) -> io::Result<Option<io::Error>> {
        files::replace_and_tell(&self.dir, FILE, &serde_json::to_vec_pretty(committed)?)
    }

    /// In the order of `number`; durable when it returns `Ok`. Blocks.
    pub(super) fn write_ledger(&self, number: u64, ledger: &Ledger) -> io::Result<()> {
        let mut newest = self.newest.lock();
        if *newest < number {
            files::replace_durably(&self.dir, LEDGER, &serde_json::to_vec_pretty(ledger)?)?;
            *newest = number;
        }
        Ok(())
    }

    /// Adds a record. Blocks.
    pub(super) fn remember(&self, record: &UpdateRecord) -> io::Result<()> {
        let path = self.dir.join(HISTORY);
        let mut file = OpenOptions::new().create(true).append(true).read(true).open(&path)?;
        let length = file.metadata()?.len();
        let mut line = Vec::new();
        if length > 0 {
            let mut last = [0];
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                line.push(b'\n'); // a line was cut off by a crash
            }
        }
        line.extend(serde_json::to_vec(record)?);
        line.push(b'\n');
        file.write_all(&line)?;
        file.sync_data()?;
        drop(file);
        if length > HISTORY_LIMIT {
            let kept = self.history(HISTORY_KEPT)?;
            let mut bytes = Vec::new();
            for record in kept {
                bytes.extend(serde_json::to_vec(&record)?);
                bytes.push(b'\n');
            }
            files::replace_durably(&self.dir, HISTORY, &bytes)?;
        }
        Ok(())
    }

    /// The last records, newest last. A line that cannot be read is left out. Blocks.
    pub(super) fn history(&self, limit: usize) -> io::Result<Vec<UpdateRecord>> {
        let bytes = files::read(&self.dir.join(HISTORY))?.unwrap_or_default();
        let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let mut records: Vec<UpdateRecord> =
            lines.rev().filter_map(|line| serde_json::from_slice(line).ok()).take(limit).collect();
        records.reverse();
        Ok(records)
    }

    /// Puts what is committed aside, for people: nothing reads it again. Blocks.
    pub(super) fn forget(&self) -> io::Result<()> {
        let aside = self.dir.join(format!("{FILE}.forgotten"));
        files::absent_is_fine(fs::rename(self.dir.join(FILE), aside)).map(|_| ())
    }

    /// Forgets all distrust: the engines have ended. Blocks.
    pub(super) fn clear_ledger(&self) -> io::Result<()> {
        files::absent_is_fine(fs::remove_file(self.dir.join(LEDGER))).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use dp_sidecar_protocol::PausedBy;
    use dp_sidecar_protocol::machine::weight_update::{Commit, Pause, Record};
    use dp_sidecar_protocol::{UpdateId, WeightVersion};

    fn committed(version: &str) -> Committed {
        let commit = Commit {
            id: UpdateId("u1".to_owned()),
            version: WeightVersion(version.to_owned()),
            ..Commit::default()
        };
        Committed::new("/model".to_owned(), commit)
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
        journal.forget().unwrap();
        journal.forget().unwrap();
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

    #[test]
    fn the_ledger_is_written_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path());
        let pause = Some(Pause { by: PausedBy::Operator });
        let open = Ledger { pause, ..Ledger::default() };
        journal.write_ledger(2, &Ledger::default()).unwrap();
        journal.write_ledger(1, &open).unwrap();
        assert_eq!(journal.read_ledger().unwrap(), Ledger::default());
        journal.write_ledger(3, &open).unwrap();
        assert_eq!(Journal::new(dir.path()).read_ledger().unwrap(), open);
    }

    /// Up to 0.1.0 a line said `id` and `outcome` twice: of the whole, and in `record`.
    #[test]
    fn a_line_of_an_older_release_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path());
        let record = Record { id: UpdateId("u1".to_owned()), ..Record::default() };
        let record = UpdateRecord::ended(record, WeightVersion("v2".to_owned()), 7);
        let mut line = serde_json::to_value(&record).unwrap();
        line["id"] = "u1".into();
        line["outcome"] = serde_json::json!({ "kind": "committed" });
        fs::write(dir.path().join(HISTORY), format!("{line}\n")).unwrap();
        let read = journal.history(10).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), serde_json::json!([record]));
    }

    #[test]
    fn a_line_of_the_history_that_was_cut_off_costs_no_other_line() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::new(dir.path());
        let record = |id: &str| {
            let record = Record { id: UpdateId(id.to_owned()), ..Record::default() };
            UpdateRecord::ended(record, WeightVersion::default(), 0)
        };
        for id in ["u1", "u2"] {
            journal.remember(&record(id)).unwrap();
        }
        let path = dir.path().join(HISTORY);
        let length = fs::metadata(&path).unwrap().len();
        File::options().write(true).open(&path).unwrap().set_len(length - 7).unwrap();
        journal.remember(&record("u3")).unwrap();
        let ids = |limit| -> Vec<String> {
            journal.history(limit).unwrap().into_iter().map(|line| line.record.id.0).collect()
        };
        assert_eq!(ids(10), ["u1", "u3"]);
        assert_eq!(ids(1), ["u3"]);
    }
}
