//! Who has a use for the segments of a run: its keeper, which outlives sidecars, has a lock on a file beside them for as
//! long as it lives. What nobody has a use for, and nobody can come back to, is removed.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{PREFIX, SEGMENTS, check_private, open_segment, segment_path};

/// Name of the lock, where segments have theirs.
pub(super) const LOCK: &str = "lock";
/// Somebody else has the lock while it looks whether anybody has, no longer.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
/// Longest content of a lock that is read.
const LONGEST: u64 = 16 * 1024;

/// Where the state directory is to which segments belong: if it is gone, nobody comes back to them.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Home {
    state_dir: PathBuf,
    /// Elsewhere the path may mean another directory.
    mount_namespace: String,
    host: String,
}

impl Home {
    fn here(state_dir: &Path) -> io::Result<Self> {
        Ok(Self {
            state_dir: state_dir.to_owned(),
            mount_namespace: fs::read_link("/proc/self/ns/mnt")?.to_string_lossy().into_owned(),
            host: nix::unistd::gethostname()?.to_string_lossy().into_owned(),
        })
    }

    /// Whether the state directory is known to be lost. `own`: that of this process, which has another run id.
    fn is_lost(&self, own: &Self, run_id: &str, id_file: &str) -> bool {
        if self.mount_namespace != own.mount_namespace {
            // A container that was made anew, with an empty state directory in the place of the lost one.
            return self.host == own.host && self.state_dir == own.state_dir;
        }
        match fs::read_to_string(self.state_dir.join(id_file)) {
            Ok(id) => id.trim() != run_id,
            Err(error) => error.kind() == ErrorKind::NotFound,
        }
    }
}

/// Keeps the segments of a run from being taken for nobody's, until it is dropped. Blocks for a moment.
///
/// # Errors
/// The lock cannot be made, or another keeper of this run has it.
#[expect(clippy::disallowed_methods, reason = "called by the keeper, which has no runtime")]
pub fn hold(shm_dir: &Path, run_id: &str, state_dir: &Path) -> io::Result<File> {
    let path = segment_path(shm_dir, run_id, LOCK);
    let home = Home::here(state_dir)?;
    let until = Instant::now() + LOCK_LIMIT;
    loop {
        let mut file = open(&path, true)?;
        match file.try_lock() {
            // It may have been removed since it was opened.
            Ok(()) if file.metadata()?.nlink() == 0 => {}
            Ok(()) => {
                file.set_len(0)?;
                file.rewind()?;
                file.write_all(&serde_json::to_vec(&home)?)?;
                return Ok(file);
            }
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn open(path: &Path, create: bool) -> io::Result<File> {
    let file = super::open(path, create)?;
    check_private(path, &file, true)?;
    Ok(file)
}

/// What was found of other runs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Segments that were removed.
    pub removed: Vec<PathBuf>,
    /// Segments that nobody has, and whose state directory may be somewhere else.
    pub unknown: Vec<PathBuf>,
}

/// Removes the segments that belong to this user, that nobody has, and whose state directory is lost: nobody would ever
/// use or remove them. `id_file` has the run id, in each state directory.
///
/// # Errors
/// `shm_dir` cannot be read. What cannot be looked at or removed is left, and told in the log.
pub fn remove_lost(shm_dir: &Path, run_id: &str, state_dir: &Path, id_file: &str) -> io::Result<Found> {
    let own = Home::here(state_dir)?;
    let mut found = Found::default();
    for run in runs(shm_dir)?.iter().filter(|run| **run != run_id) {
        match look(shm_dir, run, &own, id_file, &mut found) {
            Ok(()) => {}
            // Others make files of such names, too.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
            Err(error) => tracing::warn!(run, %error, "segments of another run cannot be looked at"),
        }
    }
    Ok(found)
}

/// Run ids of which there is a file.
fn runs(shm_dir: &Path) -> io::Result<Vec<String>> {
    let mut runs = Vec::new();
    for entry in fs::read_dir(shm_dir)? {
        let name = entry?.file_name();
        let run = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.rsplit_once('-'));
        if let Some((run, part)) = run
            && (part == LOCK || SEGMENTS.contains(&part))
            && uuid::Uuid::parse_str(run).is_ok()
        {
            runs.push(run.to_owned());
        }
    }
    runs.sort();
    runs.dedup();
    Ok(runs)
}

fn look(shm_dir: &Path, run: &str, own: &Home, id_file: &str, found: &mut Found) -> io::Result<()> {
    let segments =
        || SEGMENTS.iter().map(|name| segment_path(shm_dir, run, name)).filter(|path| path.exists());
    let lock_path = segment_path(shm_dir, run, LOCK);
    let lock = match open(&lock_path, false) {
        Ok(lock) => lock,
        // Made by an earlier release, of which nothing is known.
        Err(error) if error.kind() == ErrorKind::NotFound => {
            found.unknown.extend(segments());
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    match lock.try_lock() {
        Err(TryLockError::WouldBlock) => return Ok(()),
        locked => locked?,
    }
    let mut text = Vec::new();
    (&lock).take(LONGEST).read_to_end(&mut text)?;
    if !serde_json::from_slice(&text).is_ok_and(|home: Home| home.is_lost(own, run, id_file)) {
        found.unknown.extend(segments());
        return Ok(());
    }
    for path in segments() {
        // A sidecar that has lost its keeper and its state directory may still be there.
        let _segment = match open_segment(&path) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            opened => opened?,
        };
        fs::remove_file(&path)?;
        found.removed.push(path);
    }
    fs::remove_file(&lock_path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID_FILE: &str = "run-id";
    const RUNS: [&str; 2] = ["6f2f2f5e-0a56-4b6a-9f43-0a6d9d6f6a01", "6f2f2f5e-0a56-4b6a-9f43-0a6d9d6f6a02"];

    struct Node {
        shm: tempfile::TempDir,
        states: tempfile::TempDir,
    }

    impl Node {
        fn new() -> Self {
            Self { shm: tempfile::tempdir().unwrap(), states: tempfile::tempdir().unwrap() }
        }

        fn state(&self, at: usize) -> PathBuf {
            self.states.path().join(at.to_string())
        }

        /// A deployment with both segments, whose keeper has the lock.
        fn run(&self, at: usize) -> File {
            fs::create_dir(self.state(at)).unwrap();
            fs::write(self.state(at).join(ID_FILE), format!("{}\n", RUNS[at])).unwrap();
            for name in SEGMENTS {
                drop(open_segment(&segment_path(self.shm.path(), RUNS[at], name)).unwrap());
            }
            hold(self.shm.path(), RUNS[at], &self.state(at)).unwrap()
        }

        /// As the run of number 1 sees it.
        fn look(&self) -> (usize, usize) {
            let found = remove_lost(self.shm.path(), RUNS[1], &self.state(1), ID_FILE).unwrap();
            (found.removed.len(), found.unknown.len())
        }

        fn change_home(&self, change: impl Fn(&mut Home)) {
            let path = segment_path(self.shm.path(), RUNS[0], LOCK);
            let mut home: Home = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            change(&mut home);
            fs::write(&path, serde_json::to_vec(&home).unwrap()).unwrap();
        }

        fn left(&self) -> usize {
            fs::read_dir(self.shm.path()).unwrap().count()
        }
    }

    #[test]
    fn segments_of_a_lost_state_directory_are_removed_when_nobody_has_them() {
        let node = Node::new();
        let (keeper, _own) = (node.run(0), node.run(1));
        fs::remove_dir_all(node.state(0)).unwrap();
        assert_eq!(node.look(), (0, 0), "its keeper lives");
        drop(keeper);
        let sidecar = open_segment(&segment_path(node.shm.path(), RUNS[0], "a")).unwrap();
        assert_eq!(node.look(), (0, 0), "a sidecar has one");
        drop(sidecar);
        assert_eq!(node.look(), (2, 0));
        assert_eq!(node.left(), 3, "its own");
        drop(node.run(0));
        fs::write(node.state(0).join(ID_FILE), "another\n").unwrap();
        assert_eq!(node.look(), (2, 0), "the directory is of another run");
    }

    #[test]
    fn what_somebody_may_come_back_to_stays() {
        let node = Node::new();
        let (keeper, _own) = (node.run(0), node.run(1));
        drop(keeper);
        assert_eq!(node.look(), (0, 2), "its state directory is there");
        fs::remove_dir_all(node.state(0)).unwrap();
        node.change_home(|home| home.mount_namespace = "mnt:[1]".to_owned());
        assert_eq!(node.look(), (0, 2), "another container");
        node.change_home(|home| home.state_dir = node.state(1));
        node.change_home(|home| home.host = "another".to_owned());
        assert_eq!(node.look(), (0, 2), "another container with the same path");
        let lock = segment_path(node.shm.path(), RUNS[0], LOCK);
        let home = fs::read(&lock).unwrap();
        fs::remove_file(&lock).unwrap();
        assert_eq!(node.look(), (0, 2), "made by an earlier release");
        assert_eq!(node.left(), 5);
        let mut made = open(&lock, true).unwrap();
        made.write_all(&home).unwrap();
        drop(made);
        let own = Home::here(&node.state(1)).unwrap();
        node.change_home(|home| home.host.clone_from(&own.host));
        assert_eq!(node.look(), (2, 0), "this container, made anew");
    }

    #[test]
    fn a_lock_that_is_removed_while_it_is_waited_for_is_made_anew() {
        let node = Node::new();
        let path = segment_path(node.shm.path(), RUNS[0], LOCK);
        let first = hold(node.shm.path(), RUNS[0], &node.state(0)).unwrap();
        thread::scope(|scope| {
            let second = scope.spawn(|| hold(node.shm.path(), RUNS[0], &node.state(0)).unwrap());
            fs::remove_file(&path).unwrap();
            drop(first);
            let second = second.join().unwrap();
            assert_eq!(second.metadata().unwrap().ino(), fs::metadata(&path).unwrap().ino());
        });
    }
}
