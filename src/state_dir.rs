//! The state directory: private, used by one sidecar at a time, with a run id of its own.

mod place;

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};
use thiserror::Error;

use self::place::Unfit;
use crate::files;

/// Lock of the running sidecar; holds its pid.
pub const LOCK_FILE: &str = "lock";
/// Run id of the directory; marks the environment of all processes started for it.
pub const RUN_ID_FILE: &str = "run-id";
pub const ADMIN_SOCKET: &str = "admin.sock";
/// Where the state directories of root are by default.
const OF_ROOT: &str = "/var/lib";
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
    /// Another user can, or could, put something else in its place, or into it.
    #[error(
        "state directory {}: another user can change what is there: {}: {why}; change that, or give another \
         --state-dir",
        path.display(),
        component.display()
    )]
    Exposed { path: PathBuf, component: PathBuf, why: String },
    /// Other hosts see it, too.
    #[error(
        "state directory {}: it is on {kind}, which other hosts may see: their sidecars could take its locks, pids and \
         sockets for their own; give a --state-dir on a file system of this host",
        path.display()
    )]
    Networked { path: PathBuf, kind: &'static str },
    /// The file system refused.
    #[error("state directory: {}: {error}; --state-dir names another one", path.display())]
    Io { path: PathBuf, error: io::Error },
}

impl StateDirError {
    fn unfit(state_dir: &Path, unfit: Unfit) -> Self {
        let state_dir = state_dir.to_owned();
        match unfit {
            Unfit::Exposed { component, why } => Self::Exposed { path: state_dir, component, why },
            Unfit::Networked(kind) => Self::Networked { path: state_dir, kind },
            Unfit::Io { path, error } => Self::Io { path, error },
        }
    }
}

/// A state directory that belongs to this process until it is dropped.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    run_id: String,
    _locks: [File; 2],
}

impl StateDir {
    /// Where the state of the sidecar of `start_rank` is by default, a place that outlives logins and restarts of the
    /// machine: for root below `/var/lib`, for others below their state home (`XDG_STATE_HOME`, else `.local/state` of
    /// their home). Users without a home have none; they are refused at the place of root.
    pub fn default_path(variable: impl Fn(&str) -> Option<String>, start_rank: u16) -> PathBuf {
        let uid = Uid::effective();
        Self::default_of(uid.is_root(), variable, || Some(User::from_uid(uid).ok()??.dir), start_rank)
    }

    fn default_of(
        root: bool,
        variable: impl Fn(&str) -> Option<String>,
        home: impl Fn() -> Option<PathBuf>,
        start_rank: u16,
    ) -> PathBuf {
        let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let of_user = || {
            let home = || Some(absolute("HOME").or_else(&home)?.join(".local/state"));
            absolute("XDG_STATE_HOME").or_else(home)
        };
        let base = if root { None } else { of_user() };
        base.unwrap_or_else(|| OF_ROOT.into()).join("dp-sidecar").join(start_rank.to_string())
    }

    /// Creates the directory (0700) if need be, where no other user can redirect it, takes its locks, and reads or
    /// makes its run id.
    pub fn open(path: &Path) -> Result<Self, StateDirError> {
        let length = path.as_os_str().len();
        if length > LONGEST_PATH {
            return Err(StateDirError::TooLong { path: path.to_owned(), length });
        }
        let io_error = |path: &Path| {
            let path = path.to_owned();
            move |error| StateDirError::Io { path, error }
        };
        let unfit = |unfit| StateDirError::unfit(path, unfit);
        // Before anything is made at the end of a path that somebody else decides about, and once it is all there.
        place::check_way(path).map_err(unfit)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error(path))?;
        let path = place::check_way(path).map_err(unfit)?;
        let unfit = |unfit| StateDirError::unfit(&path, unfit);
        let metadata = fs::metadata(&path).map_err(io_error(&path))?;
        let expected = Uid::effective().as_raw();
        if metadata.uid() != expected {
            return Err(StateDirError::Foreign { path, owner: metadata.uid(), expected });
        }
        place::check_file_system(&path).map_err(unfit)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).map_err(io_error(&path))?;
        // It may have been open to others before.
        place::check_entries(&path, expected).map_err(unfit)?;
        let lock_path = path.join(LOCK_FILE);
        let own = format!("{}\n", std::process::id());
        let Some(lock) = files::lock_with(&lock_path, &own).map_err(io_error(&lock_path))? else {
            let pid = fs::read_to_string(&lock_path).unwrap_or_default();
            let pid = Some(pid.trim()).filter(|pid| !pid.is_empty()).unwrap_or("unknown").to_owned();
            return Err(StateDirError::InUse { path, pid });
        };
        // Unlike the file in it, the directory itself cannot be removed while it is in use without this being known
        // here, and systemd-tmpfiles leaves a locked one alone.
        let directory = File::open(&path).map_err(io_error(&path))?;
        match directory.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(StateDirError::InUse { path, pid: "unknown".to_owned() });
            }
            Err(TryLockError::Error(error)) => return Err(io_error(&path)(error)),
        }
        let id_path = path.join(RUN_ID_FILE);
        let run_id = match fs::read_to_string(&id_path) {
            Ok(text) if uuid::Uuid::parse_str(text.trim()).is_ok() => text.trim().to_owned(),
            _ => {
                let id = uuid::Uuid::new_v4().to_string();
                files::replace_durably(&path, RUN_ID_FILE, format!("{id}\n").as_bytes())
                    .map_err(io_error(&id_path))?;
                id
            }
        };
        Ok(Self { path, run_id, _locks: [lock, directory] })
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
    fn the_lock_holds_although_its_file_is_removed() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("s");
        let _first = StateDir::open(&path).unwrap();
        fs::remove_file(path.join(LOCK_FILE)).unwrap();
        let error = StateDir::open(&path).unwrap_err();
        assert!(matches!(error, StateDirError::InUse { .. }), "{error}");
    }

    #[test]
    fn a_directory_that_others_could_write_is_made_private_unless_they_have_been_there() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("open/s");
        fs::create_dir_all(&path).unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        mode(&path, 0o777);
        drop(StateDir::open(&path).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        if Uid::effective().is_root() {
            fs::write(path.join("admin.sock"), "").unwrap();
            std::os::unix::fs::chown(path.join("admin.sock"), Some(65_533), None).unwrap();
            let error = StateDir::open(&path).unwrap_err().to_string();
            assert!(
                error.contains("s/admin.sock: it belongs to uid 65533, expected 0; change that"),
                "{error}"
            );
        }
        mode(path.parent().unwrap(), 0o777);
        let error = StateDir::open(&path).unwrap_err().to_string();
        assert!(error.contains("/open: others may write there (mode 0777); change that, or give"), "{error}");
        let new = base.path().join("open/new");
        StateDir::open(&new).unwrap_err();
        assert!(!new.exists(), "nothing is made there");
    }

    #[test]
    fn the_default_outlives_logins_and_restarts_of_the_machine() {
        let default = |root, variables: &[(&str, &str)], home: Option<&str>| {
            let variable = |name: &str| {
                variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            };
            let path = StateDir::default_of(root, variable, || home.map(PathBuf::from), 4);
            path.to_str().unwrap().to_owned()
        };
        let home = ("HOME", "/home/u");
        assert_eq!(default(false, &[home], None), "/home/u/.local/state/dp-sidecar/4");
        assert_eq!(default(false, &[], Some("/home/v")), "/home/v/.local/state/dp-sidecar/4");
        assert_eq!(default(false, &[home, ("XDG_STATE_HOME", "/data")], None), "/data/dp-sidecar/4");
        for relative in ["", "state"] {
            let path = default(false, &[home, ("XDG_STATE_HOME", relative)], None);
            assert_eq!(path, "/home/u/.local/state/dp-sidecar/4");
        }
        assert_eq!(default(true, &[home, ("XDG_STATE_HOME", "/data")], None), "/var/lib/dp-sidecar/4");
        assert_eq!(default(false, &[("XDG_RUNTIME_DIR", "/run/user/7")], None), "/var/lib/dp-sidecar/4");
    }
}
