//! The first process of a pid namespace, as a container starts it: all processes that lose their parent become its
//! children, and stay zombies until it takes note of their end. The sidecar has no time for that, and nobody has told
//! it of these children; so it runs as a child of this loop, which hands signals on and ends with it.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::exit_code;

/// Signals that are for the sidecar.
const PASSED_ON: [Signal; 6] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2];
/// `si_code` of a signal that the kernel sends, as for a key of the terminal.
const FROM_KERNEL: i32 = 0x80;

/// Whether this process is the first one of its pid namespace.
pub fn is_first() -> bool {
    std::process::id() == 1
}

/// Lets this process hear what its parent may have blocked: a mask is inherited, [`run`]'s too.
///
/// # Errors
/// The mask cannot be set.
pub fn unblock_signals() -> io::Result<()> {
    Ok(SigSet::empty().thread_set_mask()?)
}

/// Runs this command line in a child until that ends; returns its exit code.
///
/// # Errors
/// The child cannot be started, or signals cannot be read.
pub fn run() -> io::Result<u8> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    for signal in PASSED_ON {
        mask.add(signal);
    }
    // First, so that none is missed; the child unblocks them.
    mask.thread_block()?;
    let signals = SignalFd::new(&mask)?;
    let mut args = std::env::args_os();
    let mut command = Command::new(std::env::current_exe()?);
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    let child = command.args(args).spawn()?;
    let child = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    loop {
        let info = match signals.read_signal() {
            Ok(Some(info)) => info,
            Ok(None) | Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        };
        let signal = i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok());
        match signal {
            Some(Signal::SIGCHLD) => {
                if let Some(code) = reap(child) {
                    return Ok(code);
                }
            }
            // A key of the terminal is for all processes of its group: the child has got it, too, and takes a second
            // one for impatience.
            Some(Signal::SIGINT | Signal::SIGQUIT) if info.ssi_code == FROM_KERNEL => {}
            Some(signal) => {
                // It may have ended a moment ago.
                let _ = kill(child, signal);
            }
            None => {}
        }
    }
}

/// Takes note of all that have ended; the exit code if `child` is one of them.
fn reap(child: Pid) -> Option<u8> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => {
                return Some(u8::try_from(code).unwrap_or(exit_code::INTERNAL));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                return Some(exit_code::signal(u8::try_from(signal as i32).unwrap_or_default()));
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}
