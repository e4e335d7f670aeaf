//! The keeper: a process of its own that owns the vLLM processes of one state directory, so that
//! they outlive neither the sidecar for long nor the keeper itself.
//!
//! One thread, one `poll` loop, no runtime: a death signal (PDEATHSIG) belongs to the thread that
//! forked, and a program this small has little to fail. What it promises:
//!
//! * Every child runs in a session of its own, marked in its environment, its output in a log file
//!   of bounded size.
//! * The end of a child is reported when the child *and everything it left behind* is gone.
//! * Without an owner on the socket for the orphan grace it stops all children and ends. So it does
//!   when told, and on SIGTERM or SIGINT (the second one kills at once).
//! * If the keeper itself is killed its direct children get SIGTERM from the kernel; the sidecar
//!   finds the rest by the marker ([`super::client`]).

pub mod child;
pub mod connection;
pub mod output;
pub mod server;
pub mod wire;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use self::server::Keeper;
use super::identity::Identity;
use crate::shared_memory::{self, SHM_DIR};
use crate::{files, net};

/// Socket of the keeper inside the state directory.
pub const SOCKET: &str = "keeper.sock";
/// Which process the keeper is, inside the state directory; the living keeper holds a lock on this file.
pub const PID_FILE: &str = "keeper.pid";
/// The keeper's own log inside the state directory.
pub const LOG_FILE: &str = "keeper.log";
/// Folder of the children's logs inside the state directory.
pub const LOGS: &str = "logs";
/// What the keeper writes to stdout when it listens.
pub const READY_LINE: &str = "keeper ready";

/// How a keeper is started.
#[derive(Clone, Debug)]
pub struct KeeperConfig {
    /// The state directory.
    pub state_dir: PathBuf,
    /// Stop everything after this long without an owner.
    pub orphan_grace: Duration,
    /// Grace between SIGTERM and SIGKILL when the keeper stops children on its own.
    pub kill_grace: Duration,
    /// Marks all processes of this state directory.
    pub run_id: String,
}

/// Runs the keeper until everything is stopped. Call it on the main thread of a process that has no
/// other threads.
pub fn run(config: KeeperConfig) -> io::Result<()> {
    // A session of its own: a signal to the launcher's process group or terminal does not reach it.
    // Fails only if it leads one already.
    let _ = nix::unistd::setsid();
    std::env::set_current_dir(&config.state_dir)?;
    // Only one keeper of a state directory can have it.
    let own = Identity::own()?.to_string();
    let Some(lock) = files::lock_with(&config.state_dir.join(PID_FILE), &own)? else {
        return Err(io::Error::other(format!("{PID_FILE}: another keeper holds the lock")));
    };
    // Without it the segments with weights are in danger from others when this sidecar is dead, and nothing else.
    let holds = shared_memory::hold(Path::new(SHM_DIR), &config.run_id, &config.state_dir);
    let _held = holds.inspect_err(|error| tracing::warn!(%error, "the segments with weights are not locked"));
    prctl::set_child_subreaper(true)?;
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD] {
        mask.add(signal);
    }
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let logs = config.state_dir.join(LOGS);
    fs::create_dir_all(&logs)?;
    let listener = net::bind(&config.state_dir.join(SOCKET))?;
    announce()?;
    tracing::info!(pid = std::process::id(), run_id = config.run_id, "keeper listens");
    let result = Keeper::new(config.clone(), listener, signals, logs).run();
    // The lock is still held: nobody else can have bound the socket meanwhile.
    let _ = fs::remove_file(config.state_dir.join(SOCKET));
    drop(lock);
    tracing::info!("keeper ends");
    result
}

/// Whether a keeper of this state directory lives, wherever.
pub fn is_alive(state_dir: &Path) -> bool {
    let locked = File::open(state_dir.join(PID_FILE)).map(|file| file.try_lock());
    matches!(locked, Ok(Err(TryLockError::WouldBlock)))
}

/// Tells the sidecar, which holds the other end of stdout, and lets go of that pipe.
fn announce() -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    // Nobody may be reading when the keeper is started by hand.
    let _ = writeln!(stdout, "{READY_LINE}");
    let _ = stdout.flush();
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}

/// Reads what is there, at most `limit` bytes. False: the other end is closed.
fn read_available(from: impl Read, limit: u64, into: &mut Vec<u8>) -> io::Result<bool> {
    match from.take(limit).read_to_end(into) {
        Ok(count) => Ok(count as u64 == limit),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error),
    }
}
