//! Where the weights of a state directory are in shared memory, and who has them: the one thing that the keeper and
//! the staging area must agree on, because the keeper removes the segments when neither engines nor a sidecar are left.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Where segments are by default.
pub const SHM_DIR: &str = "/dev/shm";
/// Names of the segments: what engines serve is in one of them, what is staged in the other.
pub const SEGMENTS: [&str; 2] = ["a", "b"];

pub fn segment_path(shm_dir: &Path, run_id: &str, name: &str) -> PathBuf {
    shm_dir.join(format!("dp-sidecar-{run_id}-{name}"))
}

/// Opens the file of a segment, or makes an empty one, 0600, and locks it. The lock keeps a second sidecar, and a
/// second owner within this process, away.
///
/// # Errors
/// It cannot be opened, or another owner has it ([`io::ErrorKind::WouldBlock`]).
pub fn open_segment(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)?;
    file.try_lock()?;
    Ok(file)
}

/// Removes the segments of a state directory's run id, after a planned end or when neither engines nor a sidecar are
/// left to use them. Gives the number of files removed.
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
    Ok(removed)
}
