//! Files that are replaced as a whole, files that may be absent, and files that say which process runs. Everything here
//! blocks.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use nix::fcntl::OFlag;

/// What a file holds; `None` if there is no such file.
pub(crate) fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens a regular file for reading. Anything else is an error at once: a named pipe would block until it has a writer.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(ErrorKind::InvalidInput, "expected a regular file"))
}

/// What a regular file holds, see [`open_regular`].
pub(crate) fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Takes the absence of what was to be removed for success: `absent_is_fine(fs::remove_file(path))`.
pub(crate) fn absent_is_fine(removed: io::Result<()>) -> io::Result<()> {
    removed.or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// Replaces a file of `dir`, so that a reader finds the old bytes or the new ones. It survives the end of this
/// process, but not of the machine.
///
/// The temporary file is named after the file, not at random: what a killed process leaves is replaced by the next
/// write instead of remaining for ever.
pub(crate) fn replace(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    put(dir, name, |file| file.write_all(bytes))
}

/// As [`replace`]. Durable when it returns `Ok`.
///
/// # Errors
/// It was not replaced, or it was, and a crash of the machine may take that back.
pub(crate) fn replace_durably(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    replace_and_tell(dir, name, bytes)?.map_or(Ok(()), Err)
}

/// As [`replace`], for what cannot be taken back: gives why it may not survive a crash of the machine, if so.
///
/// # Errors
/// It was certainly not replaced.
pub(crate) fn replace_and_tell(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<Option<io::Error>> {
    replace_with(dir, name, bytes, File::sync_all)
}

fn replace_with(
    dir: &Path,
    name: &str,
    bytes: &[u8],
    sync_dir: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<Option<io::Error>> {
    let dir_file = File::open(dir)?;
    put(dir, name, |file| {
        file.write_all(bytes)?;
        file.sync_all()
    })?;
    Ok(sync_dir(&dir_file).err())
}

fn put(dir: &Path, name: &str, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.new"));
    let mut private = OpenOptions::new();
    private.create(true).write(true).truncate(true).mode(0o600);
    let result = private
        .open(&temporary)
        .and_then(|mut file| write(&mut file))
        .and_then(|()| fs::rename(&temporary, dir.join(name)));
    if result.is_err() {
        // What is left of it does no harm: it is never read.
        fs::remove_file(&temporary).ok();
    }
    result
}

/// Takes the lock on a private file, which then holds `text`. `None`: another process has it.
pub(crate) fn lock_with(path: &Path, text: &str) -> io::Result<Option<File>> {
    let mut file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => return Ok(None),
        locked => locked?,
    }
    file.set_len(0)?;
    file.write_all(text.as_bytes())?;
    Ok(Some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_read_and_nothing_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let (pipe, file, link) = (dir.path().join("pipe"), dir.path().join("file"), dir.path().join("link"));
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [&pipe, &dir.path().to_owned(), &"/dev/null".into()] {
            let error = read_regular(path).unwrap_err();
            assert_eq!(
                (error.kind(), error.to_string().as_str()),
                (ErrorKind::InvalidInput, "expected a regular file")
            );
        }
        fs::write(&file, "text").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(read_regular(&link).unwrap(), b"text");
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_or_stays_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        assert_eq!(read(&path).unwrap(), None);
        replace(dir.path(), "a", b"1").unwrap();
        replace_durably(dir.path(), "a", b"2").unwrap();
        assert_eq!(read(&path).unwrap().as_deref(), Some(&b"2"[..]));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
        fs::create_dir(dir.path().join("a.new")).unwrap();
        replace(dir.path(), "a", b"3").unwrap_err();
        replace_durably(dir.path(), "a", b"3").unwrap_err();
        assert_eq!(read(&path).unwrap().as_deref(), Some(&b"2"[..]));
    }

    #[test]
    fn a_directory_that_cannot_be_synced_is_told_although_the_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let broken = |_: &File| Err(io::Error::other("EIO"));
        let doubt = replace_with(dir.path(), "a", b"1", broken).unwrap();
        assert_eq!(doubt.unwrap().to_string(), "EIO");
        assert_eq!(read(&dir.path().join("a")).unwrap().as_deref(), Some(&b"1"[..]));
        assert!(replace_and_tell(dir.path(), "a", b"2").unwrap().is_none());
    }

    #[test]
    fn only_absence_is_forgiven() {
        let dir = tempfile::tempdir().unwrap();
        absent_is_fine(fs::remove_file(dir.path().join("none"))).unwrap();
        absent_is_fine(fs::remove_file(dir.path())).unwrap_err();
        assert!(read(dir.path()).is_err());
    }
}
