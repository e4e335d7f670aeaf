//! Which of two leaders is the newer one.
//!
//! A leader that is thought dead and started again elsewhere may be alive after all, and then two of them know the
//! secret. So each leader has a number, greater than those of the leaders before: time in milliseconds, or one more
//! than the last one if the clock is behind. Followers remember the greatest that they have followed, and no leader with
//! a smaller one lets them in ([`Registry::claim`](super::registry::Registry::claim)).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::files;

/// Name in the state directory.
const FILE: &str = "leader-epoch";

/// The newest leader that a state directory knows of.
#[derive(Debug)]
pub struct Epoch {
    dir: PathBuf,
    newest: AtomicU64,
}

impl Epoch {
    /// Blocks.
    ///
    /// # Errors
    /// The file cannot be read, or holds something else.
    pub fn read(dir: &Path) -> io::Result<Self> {
        let path = dir.join(FILE);
        let text = files::read(&path)?.map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned());
        let newest = text.map(|text| text.parse().map_err(|_| not_a_number(&path, &text))).transpose()?;
        Ok(Self { dir: dir.to_owned(), newest: AtomicU64::new(newest.unwrap_or_default()) })
    }

    /// Of the leader that was followed last; 0 if there was none.
    pub fn newest(&self) -> u64 {
        self.newest.load(Ordering::Acquire)
    }

    /// A number for a leader that starts now. Durable when it returns. Blocks.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn lead(&self) -> io::Result<u64> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let epoch = u64::try_from(now).unwrap_or(u64::MAX).max(self.newest().saturating_add(1));
        self.follow(epoch)?;
        Ok(epoch)
    }

    /// Remembers a leader that lets this node in. Durable when it returns. Blocks.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn follow(&self, epoch: u64) -> io::Result<()> {
        if epoch > self.newest() {
            files::replace_durably(&self.dir, FILE, epoch.to_string().as_bytes())?;
            self.newest.store(epoch, Ordering::Release);
        }
        Ok(())
    }
}

fn not_a_number(path: &Path, text: &str) -> io::Error {
    let text =
        format!("{} holds {text:?}, expected a number; remove it to follow any leader", path.display());
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leader_is_newer_than_those_before_also_with_a_clock_that_is_behind() {
        let dir = tempfile::tempdir().unwrap();
        let first = Epoch::read(dir.path()).unwrap();
        assert_eq!(first.newest(), 0);
        let one = first.lead().unwrap();
        let again = Epoch::read(dir.path()).unwrap();
        assert_eq!(again.newest(), one);
        assert!(again.lead().unwrap() > one);
        let ahead = again.newest() + 86_400_000;
        again.follow(ahead).unwrap();
        again.follow(one).unwrap();
        assert_eq!(Epoch::read(dir.path()).unwrap().lead().unwrap(), ahead + 1);
        std::fs::write(dir.path().join(FILE), "x").unwrap();
        assert!(Epoch::read(dir.path()).unwrap_err().to_string().contains("expected a number"));
    }
}
