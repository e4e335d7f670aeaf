//! Secrets: that of the deployment, which is proven with keyed hashes and never sent, and that of HTTP clients. Neither
//! is ever printed.

use std::fmt;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use thiserror::Error;
use uuid::Uuid;

use crate::files;

/// Shortest secret, in bytes.
pub const SHORTEST: usize = 16;
/// Longest, so that a wrong file is noticed.
pub const LONGEST: usize = 4096;
/// Makes the key of the peer link from the secret; another use of the same secret gets another key.
const CONTEXT: &str = "dp-sidecar peer link authentication key, version 1";

/// The key made of the shared secret. [`blake3::Hash`] compares in constant time.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(blake3::Hash);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// The file holds no usable secret.
#[derive(Debug, Error)]
pub enum TokenError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Too short or too long.
    #[error("holds {length} bytes without surrounding white space, expected {SHORTEST} to {LONGEST}")]
    Length { length: usize },
}

impl Token {
    /// Makes the key of a secret.
    ///
    /// # Errors
    /// [`TokenError::Length`].
    pub fn new(secret: &[u8]) -> Result<Self, TokenError> {
        let secret = secret.trim_ascii();
        if !(SHORTEST..=LONGEST).contains(&secret.len()) {
            return Err(TokenError::Length { length: secret.len() });
        }
        Ok(Self(blake3::derive_key(CONTEXT, secret).into()))
    }

    /// Reads the secret out of a file; white space at its ends does not count. Also says whether others than
    /// the owner may read the file.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn read(path: &Path) -> Result<(Self, bool), TokenError> {
        let file = std::fs::File::open(path)?;
        let loose = file.metadata()?.mode() & 0o077 != 0;
        let mut secret = Vec::new();
        file.take(2 * LONGEST as u64).read_to_end(&mut secret)?;
        let token = Self::new(&secret);
        secret.fill(0);
        Ok((token?, loose))
    }

    /// The secret in a file of the state directory, made by whoever needs it first. Blocks.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn made_in(path: &Path) -> Result<Self, TokenError> {
        if files::read(path)?.is_none() {
            let secret = [Uuid::new_v4(), Uuid::new_v4()].map(|random| random.simple().to_string()).concat();
            let (directory, name) = (path.parent().unwrap_or(path), path.file_name().unwrap_or_default());
            files::replace_durably(directory, &name.to_string_lossy(), secret.as_bytes())?;
        }
        Ok(Self::read(path)?.0)
    }

    /// Key for [`blake3::keyed_hash`].
    pub(super) fn key(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_secret_of_a_file_counts_without_its_last_newline_and_loose_modes_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        fs::write(&path, "0123456789abcdef\n").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let (token, loose) = Token::read(&path).unwrap();
        assert!(!loose);
        assert_eq!(token, Token::new(b"0123456789abcdef").unwrap());
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        assert!(Token::read(&path).unwrap().1);
    }

    #[test]
    fn a_short_secret_is_refused_and_none_is_printed() {
        let error = Token::new(b"too short").unwrap_err();
        assert!(matches!(error, TokenError::Length { length: 9 }), "{error}");
        assert!(Token::new(&[b'x'; 5000]).is_err());
        let token = Token::new(b"a secret of twenty-7 bytes!").unwrap();
        assert_eq!(format!("{token:?}"), "Token(..)");
    }
}
