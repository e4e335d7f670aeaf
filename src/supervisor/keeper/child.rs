//! One child of the keeper: started in a session of its own, marked, watched until it and all it
//! left behind are gone.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal as NixSignal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, getppid, setsid};
use rustix::process::Signal;

use super::KeeperConfig;
use super::output::{LOG_LIMIT, LogFile, Output};
use super::wire::{ChildInfo, ExitReport, ExitStatus, SpawnSpec};
use crate::supervisor::command::{engine_rank, log_line};
use crate::supervisor::procfs::{
    self, CHILD_MARKER, KEEPER_MARKER, Process, RUN_MARKER, Selector, keeper_mark,
};

/// How long SIGKILL may take before the keeper gives up on a process and reports it as left.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long a launcher that was told to stop may go on when its engine cores have ended: vLLM's has nothing left to do
/// then but to end its interpreter, which takes seconds of computing (0.32.0, on CPU: 4 s of an idle core).
const ALONE_LIMIT: Duration = Duration::from_secs(1);
/// Pause between two looks at whether it has any.
const ALONE_PERIOD: Duration = Duration::from_millis(100);
/// Pause between two looks at what is left of a child.
pub const SWEEP_PERIOD: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Running,
    /// SIGTERM was sent.
    Stopping {
        kill_at: Instant,
    },
    /// The main process was killed, or has ended: everything else of the child is being killed.
    Sweeping {
        give_up_at: Instant,
    },
}

/// A child and its state.
#[derive(Debug)]
pub struct Child {
    name: String,
    incarnation: u64,
    pid: i32,
    /// When everything is stopped, lower numbers go first.
    pub stop_order: u32,
    life: Life,
    status: Option<ExitStatus>,
    requested: bool,
    killed: BTreeSet<i32>,
    /// An engine's: it is there for the processes that it has started.
    launcher: bool,
    /// Since when it has none of them, while it stops.
    alone: Option<Instant>,
    /// What it writes.
    pub output: Output,
    log_path: PathBuf,
    selector: Selector,
}

/// Whether a name can be part of a file name without surprises.
pub fn is_valid_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 64
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

impl Child {
    /// Starts the process.
    pub fn spawn(spec: &SpawnSpec, config: &KeeperConfig, logs: &Path) -> io::Result<Self> {
        let run_id = config.run_id.as_str();
        let Some((program, args)) = spec.argv.split_first() else {
            return Err(io::Error::other("empty command line"));
        };
        let mark = format!("{}:{}", spec.name, spec.incarnation);
        let (reader, writer) = io::pipe()?;
        fcntl(reader.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .envs(&spec.env)
            .env(RUN_MARKER, run_id)
            .env(CHILD_MARKER, &mark)
            .env(KEEPER_MARKER, keeper_mark(&config.state_dir)?)
            // setproctitle, which vLLM uses, writes its titles over the environment that
            // /proc/<pid>/environ shows; this variable makes it leave the markers alone.
            .env("SPT_NOENV", "1")
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        if let Some(cwd) = &spec.cwd {
            command.current_dir(cwd);
        }
        die_with_the_keeper(&mut command);
        let process = command.spawn()?;
        // `process` is dropped without being waited for: the keeper reaps by pid.
        let pid = i32::try_from(process.id()).map_err(io::Error::other)?;
        let log_path = logs.join(format!("{}.log", spec.name));
        let mut output = Output::new(reader, LogFile::open(log_path.clone(), LOG_LIMIT));
        output.note(&format!("started {mark}, pid {pid}: {}", log_line(&spec.argv)));
        Ok(Self {
            name: spec.name.clone(),
            incarnation: spec.incarnation,
            pid,
            stop_order: spec.stop_order,
            life: Life::Running,
            status: None,
            requested: false,
            killed: BTreeSet::new(),
            launcher: engine_rank(&spec.name).is_some(),
            alone: None,
            output,
            log_path,
            selector: Selector {
                run_id: run_id.to_owned(),
                child: Some(mark),
                sessions: BTreeSet::from([pid]),
                orphans_of: None,
            },
        })
    }

    /// Pid of the main process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// For the list of children.
    pub fn info(&self) -> ChildInfo {
        ChildInfo {
            name: self.name.clone(),
            incarnation: self.incarnation,
            pid: self.pid.unsigned_abs(),
            stopping: self.life != Life::Running,
            log_path: self.log_path.clone(),
        }
    }

    /// SIGTERM to the main process only (vLLM's launcher stops its own processes in order), SIGKILL
    /// to everything after `grace`. Asked again, the earlier end counts.
    pub fn stop(&mut self, now: Instant, grace: Duration) {
        self.requested = true;
        let wanted = now + grace;
        match self.life {
            Life::Running => {
                self.output.note(&format!("told to stop within {grace:?}"));
                if let Some(main) = Process::read(self.pid) {
                    main.signal(Signal::TERM);
                }
                self.life = Life::Stopping { kill_at: wanted };
            }
            Life::Stopping { kill_at } => {
                self.life = Life::Stopping { kill_at: kill_at.min(wanted) };
            }
            Life::Sweeping { .. } => {}
        }
    }

    /// When [`Child::step`] has something to do even if nothing happens.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        match self.life {
            Life::Running => None,
            Life::Stopping { kill_at } if self.launcher => Some(kill_at.min(now + ALONE_PERIOD)),
            Life::Stopping { kill_at } => Some(kill_at),
            Life::Sweeping { .. } => Some(now + SWEEP_PERIOD),
        }
    }

    /// Looks after the child. Returns its report when all of it is gone.
    pub fn step(&mut self, now: Instant) -> Option<ExitReport> {
        if self.status.is_none() {
            self.status = self.exit_status();
            if self.status.is_some() && !matches!(self.life, Life::Sweeping { .. }) {
                self.life = Life::Sweeping { give_up_at: now + KILL_LIMIT };
            }
        }
        if let Life::Stopping { kill_at } = self.life {
            let why = if now >= kill_at {
                Some("still there after its grace: killed")
            } else if self.launcher && self.is_left_alone(now) {
                Some("its processes have ended: killed")
            } else {
                None
            };
            if let Some(why) = why {
                self.output.note(why);
                self.life = Life::Sweeping { give_up_at: now + KILL_LIMIT };
            }
        }
        let Life::Sweeping { give_up_at } = self.life else {
            return None;
        };
        // The main process, once dead, stays a zombie until all else is gone: its pid, and with it
        // the session and group number, cannot be given to anybody else meanwhile.
        let left = self.sweep();
        if now < give_up_at && !(left.is_empty() && self.status.is_some()) {
            return None;
        }
        if self.status.is_some() {
            let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
        }
        self.output.pump();
        let status = self.status.unwrap_or(ExitStatus::Unknown);
        self.output.note(&format!("ended: {status}"));
        self.killed.remove(&self.pid);
        Some(ExitReport {
            name: self.name.clone(),
            incarnation: self.incarnation,
            pid: self.pid.unsigned_abs(),
            status,
            requested: self.requested,
            last_lines: self.output.last_lines(),
            strays_killed: u32::try_from(self.killed.len()).unwrap_or(u32::MAX),
            left: left.iter().map(|pid| pid.unsigned_abs()).collect(),
        })
    }

    fn is_left_alone(&mut self, now: Instant) -> bool {
        if procfs::has_children(self.pid).unwrap_or(true) {
            self.alone = None;
            return false;
        }
        now >= *self.alone.get_or_insert(now) + ALONE_LIMIT
    }

    /// Kills what is left of the child; returns it.
    fn sweep(&mut self) -> Vec<i32> {
        match self.selector.find() {
            Ok(found) => {
                for process in &found {
                    if process.signal(Signal::KILL) {
                        self.killed.insert(process.pid);
                    }
                }
                found.iter().map(|process| process.pid).collect()
            }
            Err(error) => {
                tracing::error!(%error, child = self.name, "processes cannot be listed");
                vec![self.pid]
            }
        }
    }

    /// How the main process ended, without reaping it.
    fn exit_status(&self) -> Option<ExitStatus> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(Pid::from_raw(self.pid)), flags) {
            Ok(WaitStatus::Exited(_, code)) => Some(ExitStatus::Code { code }),
            Ok(WaitStatus::Signaled(_, signal, _)) => Some(ExitStatus::Signal { signal: signal as i32 }),
            Ok(_) => None,
            // Not our child any more: cannot happen, and must not hang if it does.
            Err(_) => Some(ExitStatus::Unknown),
        }
    }
}

/// Makes the child the leader of a session of its own that gets SIGTERM when the keeper dies.
///
/// PDEATHSIG is bound to the *thread* that forks; the keeper has only one, which lives as long as
/// the keeper.
#[expect(unsafe_code, reason = "there is no safe way to run setsid and prctl between fork and exec")]
fn die_with_the_keeper(command: &mut Command) {
    let keeper = Pid::this();
    let no_signals = SigSet::empty();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed. The closure makes the
    // system calls setsid, sigprocmask, prctl and getppid, allocates nothing, takes no lock and
    // cannot panic: the error values carry a number only.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            // The keeper blocks the signals that it reads from its descriptor, and a mask outlives
            // exec: with it the child would never see a SIGTERM.
            no_signals.thread_set_mask()?;
            prctl::set_pdeathsig(NixSignal::SIGTERM)?;
            if getppid() != keeper {
                // The keeper died before the signal was armed.
                return Err(io::Error::from_raw_os_error(nix::errno::Errno::ESRCH as i32));
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_no_plain_file_name_is_invalid() {
        for name in ["engine-0", "frontend", "a.b_c"] {
            assert!(is_valid_name(name), "{name}");
        }
        for name in ["", "..", ".x", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(!is_valid_name(name), "{name}");
        }
    }
}
