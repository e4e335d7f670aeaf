//! The state directory: private, used by one sidecar at a time, with a run id of its own.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::files;

/// Lock of the running sidecar; holds its pid.
pub const LOCK_FILE: &str = "lock";
/// Run id of the directory; marks the environment of all processes started for it.
pub const RUN_ID_FILE: &str = "run-id";
pub const ADMIN_SOCKET: &str = "admin.sock";
/// Longest path of a state directory, so that the sockets in it fit into 107 bytes.
pub const LONGEST_PATH: usize = 80;

/// A state directory cannot be used.
#[derive(Debug, Error)]
pub enum StateDirError {
    /// Another sidecar runs there: the holder of the lock, as it says itself.
    #[error("state directory {} is in use by pid {pid}", path.display())]
    InUse { path: PathBuf, pid: String },
    /// Its path is too long for the unix sockets in it.
    #[error("state directory {}: its path has {length} bytes, at most {LONGEST_PATH} fit a unix socket", path.display())]
    TooLong { path: PathBuf, length: usize },
    /// It belongs to another user than this process.
    #[error("state directory {}: belongs to uid {owner}, expected {expected}", path.display())]
    Foreign { path: PathBuf, owner: u32, expected: u32 },
    /// The file system refused.
    #[error("state directory: {}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// A state directory that belongs to this process until it is dropped.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    run_id: String,
    _lock: File,
}

impl StateDir {
    /// Where the state of the sidecar of `start_rank` is by default: below `$XDG_RUNTIME_DIR`, or in
    /// a folder of this user below `/tmp`.
    pub fn default_path(runtime_dir: Option<&str>, start_rank: u16) -> PathBuf {
        match runtime_dir.filter(|dir| !dir.is_empty()) {
            Some(dir) => Path::new(dir).join("dp-sidecar").join(start_rank.to_string()),
            None => PathBuf::from(format!("/tmp/dp-sidecar-{}/{start_rank}", nix::unistd::geteuid())),
        }
    }

    /// Creates the directory (0700) if need be, takes its lock, and reads or makes its run id.
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        let length = path.as_os_str().len();
        if length > LONGEST_PATH {
            return Err(StateDirError::TooLong { path: path.to_owned(), length });
        }
        let io_error = |path: &Path| {
            let path = path.to_owned();
            move |error| StateDirError::Io { path, error }
        };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error(path))?;
        let path = path.canonicalize().map_err(io_error(path))?;
        let metadata = fs::metadata(&path).map_err(io_error(&path))?;
        let expected = nix::unistd::geteuid().as_raw();
        if metadata.uid() != expected {
            return Err(StateDirError::Foreign { path, owner: metadata.uid(), expected });
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).map_err(io_error(&path))?;
        let lock_path = path.join(LOCK_FILE);
        let Some(lock) = files::lock_with_pid(&lock_path).map_err(io_error(&lock_path))? else {
            let pid = fs::read_to_string(&lock_path).unwrap_or_default();
            let pid = Some(pid.trim()).filter(|pid| !pid.is_empty()).unwrap_or("unknown").to_owned();
            return Err(StateDirError::InUse { path, pid });
        };
        let id_path = path.join(RUN_ID_FILE);
        let run_id = match fs::read_to_string(&id_path) {
            Ok(text) if uuid::Uuid::parse_str(text.trim()).is_ok() => text.trim().to_owned(),
            _ => {
                let id = uuid::Uuid::new_v4().to_string();
                fs::write(&id_path, format!("{id}\n")).map_err(io_error(&id_path))?;
                id
            }
        };
        Ok(Self { path, run_id, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Marks the environment of all processes started for this directory. Stays the same over
    /// restarts of the sidecar.
    pub fn run_id(&self) -> &str {
        &self.run_id
    }

    /// Where the token for HTTP clients is, if none was given.
    pub fn http_token(&self) -> PathBuf {
        self.path.join("http-token")
    }

    /// Where the admin socket of a state directory is.
    pub fn admin_socket(path: &Path) -> PathBuf {
        path.join(ADMIN_SOCKET)
    }
}

/// Pid of the sidecar that has the lock of a state directory, if one has it.
pub fn holder(path: &Path) -> Option<String> {
    let lock = File::open(path.join(LOCK_FILE)).ok()?;
    match lock.try_lock_shared() {
        Err(fs::TryLockError::WouldBlock) => {
            Some(fs::read_to_string(path.join(LOCK_FILE)).unwrap_or_default().trim().to_owned())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_is_private_and_used_once_at_a_time() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("a/b");
        let first = StateDir::open(&path).unwrap();
        let mode = fs::metadata(first.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let error = StateDir::open(&path).unwrap_err();
        assert!(error.to_string().ends_with(&format!("is in use by pid {}", std::process::id())), "{error}");
        let run_id = first.run_id().to_owned();
        drop(first);
        let second = StateDir::open(&path).unwrap();
        assert_eq!(second.run_id(), run_id, "the run id stays");
    }

    #[test]
    fn a_path_that_leaves_no_room_for_sockets_is_refused() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(LONGEST_PATH)));
        assert!(matches!(StateDir::open(&path), Err(StateDirError::TooLong { .. })));
    }

    #[test]
    fn the_default_is_below_the_runtime_directory_or_tmp() {
        assert_eq!(StateDir::default_path(Some("/run/user/7"), 4), Path::new("/run/user/7/dp-sidecar/4"));
        let uid = nix::unistd::geteuid();
        assert_eq!(StateDir::default_path(Some(""), 0), PathBuf::from(format!("/tmp/dp-sidecar-{uid}/0")));
    }
}
