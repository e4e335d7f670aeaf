//! Who a process is, for a file that outlives it: pids are given again, after a restart of the machine, in another pid
//! namespace and on another host.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::procfs::Process;

/// A process that a file names, or a part of it, is not the one that is looked for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum IdentityError {
    #[error("does not say which process it names")]
    Unknown,
    #[error("names a process by its {what} {theirs}, expected {ours}")]
    Other { what: &'static str, theirs: String, ours: String },
}

/// A process, told apart from all others of all hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// First, where whoever looks into the file expects it.
    pid: i32,
    boot: String,
    pid_namespace: String,
    /// Clock ticks from boot.
    started: u64,
    exe: PathBuf,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, boot, pid_namespace, started, exe } = self;
        write!(f, "{pid}\n{boot}\n{pid_namespace}\n{started}\n{}\n", exe.display())
    }
}

impl Identity {
    /// That of this process.
    pub(crate) fn own() -> io::Result<Self> {
        let own = Process::own().ok_or_else(|| io::Error::other("/proc does not show this process"))?;
        Ok(Self {
            pid: own.pid,
            boot: boot()?,
            pid_namespace: pid_namespace()?,
            started: own.started,
            exe: std::env::current_exe()?,
        })
    }

    /// Reads what a process has written of itself.
    pub(crate) fn parse(text: &str) -> Result<Self, IdentityError> {
        let mut lines = text.lines();
        let mut identity = || {
            Some(Self {
                pid: lines.next()?.parse().ok()?,
                boot: lines.next()?.to_owned(),
                pid_namespace: lines.next()?.to_owned(),
                started: lines.next()?.parse().ok()?,
                exe: lines.next()?.into(),
            })
        };
        identity().ok_or(IdentityError::Unknown)
    }

    /// Whether pids mean the same here as where it was written.
    ///
    /// # Errors
    /// [`IdentityError::Other`]: what differs.
    pub(crate) fn check_here(&self) -> Result<(), IdentityError> {
        let known = |found: io::Result<String>| found.unwrap_or_else(|error| format!("unknown ({error})"));
        differs("boot id", &self.boot, &known(boot()))?;
        differs("pid namespace", &self.pid_namespace, &known(pid_namespace()))
    }

    /// The process, if it lives; nobody else who has got its pid.
    ///
    /// # Errors
    /// [`IdentityError::Other`]: what differs.
    pub(crate) fn find(&self) -> Result<Option<Process>, IdentityError> {
        self.check_here()?;
        let Some(found) = Process::read(self.pid).filter(|found| !found.is_dead()) else {
            return Ok(None);
        };
        differs("start time", &self.started.to_string(), &found.started.to_string())?;
        let same = self.has_program(fs::read_link(format!("/proc/{}/exe", self.pid)))?;
        Ok(same.then_some(found))
    }

    /// False: it is ending. Its memory is gone and with it the link to its program, while its files, and the locks on
    /// them, may still be there.
    fn has_program(&self, link: io::Result<PathBuf>) -> Result<bool, IdentityError> {
        let exe = match link {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            link => link.unwrap_or_default(),
        };
        // That of a program that was replaced has " (deleted)" behind it.
        let exe = exe.to_string_lossy();
        differs("program", &self.exe.to_string_lossy(), exe.strip_suffix(" (deleted)").unwrap_or(&exe))?;
        Ok(true)
    }
}

fn differs(what: &'static str, theirs: &str, ours: &str) -> Result<(), IdentityError> {
    if theirs == ours {
        return Ok(());
    }
    Err(IdentityError::Other { what, theirs: theirs.to_owned(), ours: ours.to_owned() })
}

fn boot() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn pid_namespace() -> io::Result<String> {
    Ok(fs::read_link("/proc/self/ns/pid")?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_what_it_wrote_of_itself_and_a_stranger_with_its_pid_is_not() {
        let own = Identity::own().unwrap();
        let read = Identity::parse(&own.to_string()).unwrap();
        assert_eq!(read, own);
        assert_eq!(read.find().unwrap().map(|found| found.pid), Some(own.pid));
        let other = |what: &str, change: fn(&mut Identity)| {
            let mut changed = own.clone();
            change(&mut changed);
            let error = changed.find().unwrap_err().to_string();
            assert!(error.contains(&format!("its {what} ")), "{error}");
        };
        other("boot id", |identity| identity.boot = "another".to_owned());
        other("pid namespace", |identity| identity.pid_namespace = "pid:[1]".to_owned());
        other("start time", |identity| identity.started += 1);
        other("program", |identity| identity.exe = "/bin/sh".into());
        assert_eq!(own.has_program(Err(io::ErrorKind::NotFound.into())), Ok(false), "it is ending");
        assert!(own.has_program(Err(io::ErrorKind::PermissionDenied.into())).is_err(), "nobody knows");
        let dead = Identity { pid: i32::MAX, ..own };
        assert_eq!(dead.find(), Ok(None));
        // A pid alone, as earlier versions wrote it, names nobody for sure.
        assert_eq!(Identity::parse("4242\n"), Err(IdentityError::Unknown));
    }
}
