//! Where the weights of a state directory are in shared memory, and who has them: the one thing that the keeper and
//! the staging area must agree on, because the keeper removes the segments when neither engines nor a sidecar are left.

mod holder;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub use self::holder::{hold, remove_lost};
use crate::files;

/// Where segments are by default.
pub const SHM_DIR: &str = "/dev/shm";
/// Names of the segments: what engines serve is in one of them, what is staged in the other.
pub const SEGMENTS: [&str; 2] = ["a", "b"];

/// What the names of all files in shared memory begin with.
const PREFIX: &str = "dp-sidecar-";

pub fn segment_path(shm_dir: &Path, run_id: &str, name: &str) -> PathBuf {
    shm_dir.join(format!("{PREFIX}{run_id}-{name}"))
}

/// Opens the file of a segment, or makes an empty one, 0600, and locks it. The lock keeps a second sidecar, and a
/// second owner within this process, away.
///
/// # Errors
/// It cannot be opened, another owner has it ([`io::ErrorKind::WouldBlock`]), or others can reach what is in it.
pub fn open_segment(path: &Path) -> io::Result<File> {
    let file = open(path, true)?;
    file.try_lock()?;
    check_private(path, &file, false)?;
    Ok(file)
}

/// A link is not followed.
fn open(path: &Path, create: bool) -> io::Result<File> {
    OpenOptions::new()
        .create(create)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
}

/// Anybody may make files in `/dev/shm`, under any name: weights are only written where nobody else can read or change
/// them. `removed`: it may have no name any more.
fn check_private(path: &Path, file: &File, removed: bool) -> io::Result<()> {
    let found = file.metadata()?;
    let own = nix::unistd::geteuid().as_raw();
    let (mode, links) = (found.mode() & 0o777, found.nlink());
    if found.is_file() && found.uid() == own && mode & 0o077 == 0 && (links == 1 || (removed && links == 0)) {
        return Ok(());
    }
    let kind = if found.is_file() { "a file" } else { "no regular file" };
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!(
            "segment {} is {kind} of uid {} with mode {mode:04o} and {links} links, expected a file of uid {own} with \
             mode 0600 and 1 link: find out who made it, and remove it",
            path.display(),
            found.uid()
        ),
    ))
}

/// Removes the segments of a state directory's run id, after a planned end or when neither engines nor a sidecar are
/// left to use them, and what says who has them. Gives the number of segments removed.
///
/// # Errors
/// A file exists and cannot be removed, or a sidecar has it ([`io::ErrorKind::WouldBlock`]).
pub fn remove_segments(shm_dir: &Path, run_id: &str) -> io::Result<usize> {
    let mut removed = 0;
    for name in SEGMENTS {
        let path = segment_path(shm_dir, run_id, name);
        if path.exists() {
            let _lock = open_segment(&path)?;
            std::fs::remove_file(&path)?;
            removed += 1;
        }
    }
    files::absent_is_fine(std::fs::remove_file(segment_path(shm_dir, run_id, holder::LOCK)))?;
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_segment_that_others_can_reach_is_neither_opened_nor_removed() {
        let base = tempfile::tempdir().unwrap();
        let path = segment_path(base.path(), "run", "a");
        drop(open_segment(&path).unwrap());
        drop(open_segment(&path).unwrap());
        let refused = |expected: &str| {
            let error = open_segment(&path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
            let error = error.to_string();
            assert!(error.contains(expected) && error.contains("dp-sidecar-run-a"), "{error}");
            remove_segments(base.path(), "run").unwrap_err();
            assert!(path.exists());
        };
        std::fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        refused("mode 0666");
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let other = base.path().join("another-name");
        std::fs::hard_link(&path, &other).unwrap();
        refused("2 links");
        std::fs::remove_file(other).unwrap();
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(65_534), None).unwrap();
            refused("uid 65534");
            std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        }
        assert_eq!(remove_segments(base.path(), "run").unwrap(), 1);
    }
}
