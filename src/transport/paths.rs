//! Private directories and `ipc://` addresses.

use std::fs::{DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use dp_sidecar_protocol::EngineIndex;

use super::TransportError;
use super::error::SUN_PATH_LIMIT;

/// A directory that only we may enter. Sockets without authentication live here.
#[derive(Clone, Debug)]
pub struct PrivateDir {
    path: PathBuf,
}

impl PrivateDir {
    /// Creates the directory with mode 0700, or takes an existing one of ours and sets that mode.
    ///
    /// # Errors
    /// The path cannot be created, is no directory, or belongs to another user.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, TransportError> {
        let path = path.into();
        let fail = |source| TransportError::Path { path: path.clone(), source };
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let found = std::fs::symlink_metadata(&path).map_err(fail)?;
                if !found.is_dir() {
                    return Err(fail(io::Error::from(ErrorKind::NotADirectory)));
                }
                if found.uid() != nix::unistd::geteuid().as_raw() {
                    return Err(fail(io::Error::new(
                        ErrorKind::PermissionDenied,
                        format!("it belongs to user {}", found.uid()),
                    )));
                }
                std::fs::set_permissions(&path, Permissions::from_mode(0o700)).map_err(fail)?;
            }
            Err(error) => return Err(fail(error)),
        }
        Ok(Self { path })
    }

    /// Names for the sockets of one life of an engine, by their kind. No other life has or had them: engines may
    /// outlive their sidecar and even its state directory, and connect for ever to the addresses that they know.
    pub fn fresh_addresses(
        &self,
        rank: EngineIndex,
    ) -> impl Fn(&str) -> Result<String, TransportError> + use<'_> {
        // Forty bits: the name has to fit beside the longest state directory.
        let life = uuid::Uuid::new_v4().as_u128() >> 88;
        move |kind| self.ipc_address(&format!("{rank}.{life:010x}.{kind}"))
    }

    /// The `ipc://` address of a socket file in this directory.
    ///
    /// # Errors
    /// The path would be longer than the 107 bytes that fit a unix socket's address.
    pub fn ipc_address(&self, file_name: &str) -> Result<String, TransportError> {
        let path = self.path.join(file_name);
        check_socket_path(&path)?;
        let text = path.to_str().ok_or_else(|| TransportError::address(path.display(), "not valid UTF-8"))?;
        Ok(format!("ipc://{text}"))
    }
}

/// Checks that the kernel will take this path for a unix socket.
///
/// # Errors
/// It is longer than 107 bytes.
pub fn check_socket_path(path: &Path) -> Result<(), TransportError> {
    let length = path.as_os_str().len();
    if length > SUN_PATH_LIMIT {
        return Err(TransportError::PathTooLong { path: path.to_owned(), length });
    }
    Ok(())
}

/// Removes a socket file that nobody listens on any more.
///
/// # Errors
/// A live process listens there, or the file is something else than a socket we may remove.
pub fn unlink_stale_socket(path: &Path) -> Result<(), TransportError> {
    check_socket_path(path)?;
    match UnixStream::connect(path) {
        Ok(_) => Err(TransportError::InUse { address: path.display().to_string() }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(path)
            .map_err(|source| TransportError::Path { path: path.to_owned(), source }),
        Err(source) => Err(TransportError::Path { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_private_directory_is_closed_to_others() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("s");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        let dir = PrivateDir::create(&path).unwrap();
        let mode = std::fs::metadata(dir.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn lives_of_one_engine_have_no_address_in_common_and_fit_the_longest_state_directory() {
        let dir = PrivateDir { path: format!("/{}/ipc", "x".repeat(79)).into() };
        let rank = EngineIndex(u16::MAX);
        let (one, other) = (dir.fresh_addresses(rank), dir.fresh_addresses(rank));
        assert_eq!(one("i999").unwrap(), one("i999").unwrap());
        assert_ne!(one("i999").unwrap(), other("i999").unwrap());
    }

    #[test]
    fn a_path_of_107_bytes_is_taken_and_one_of_108_is_refused_with_its_length() {
        let long = |length: usize| PathBuf::from(format!("/{}", "x".repeat(length - 1)));
        check_socket_path(&long(107)).unwrap();
        let error = check_socket_path(&long(108)).unwrap_err().to_string();
        assert!(error.contains("108") && error.contains("107"), "{error}");
    }

    #[test]
    fn a_stale_socket_is_removed_and_a_live_one_is_not() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("s");
        unlink_stale_socket(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(unlink_stale_socket(&path), Err(TransportError::InUse { .. })));
        drop(listener);
        unlink_stale_socket(&path).unwrap();
        assert!(!path.exists());
    }
}
