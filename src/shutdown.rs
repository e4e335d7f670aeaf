//! What ends a run from outside: signals and the lifeline.

use std::fmt;
use std::io::{self, Read};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::config::Lifeline;
use crate::tasks::{Task, named, rehearse};

/// Why the run is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// SIGTERM, SIGINT or SIGHUP, the end of the terminal.
    Signal(i32),
    /// The lifeline ended.
    Lifeline,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(name) => f.write_str(name.as_str()),
                Err(_) => write!(f, "signal {number}"),
            },
            Self::Lifeline => f.write_str("end of the lifeline"),
        }
    }
}

/// What was asked for from outside so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The first reason to end, if there is one.
    pub why: Option<Why>,
    /// How often; from the second time on nothing more is drained.
    pub times: u32,
}

/// Watches signals and the lifeline. The task ends when the last receiver is dropped.
pub fn watch_outside(lifeline: Lifeline, tasks: &TaskTracker) -> io::Result<watch::Receiver<Asked>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // `nohup` has asked that this one be ignored, and a handler would undo that.
    let mut hangup = if hangup_is_ignored()? { None } else { Some(signal(SignalKind::hangup())?) };
    let (sender, receiver) = watch::channel(Asked::default());
    let (end, mut ended) = tokio::sync::oneshot::channel();
    if lifeline == Lifeline::Stdin {
        // A thread of its own: it may stay in its read until the process ends, which a thread of
        // the runtime must not.
        std::thread::Builder::new().name("lifeline".to_owned()).spawn(move || {
            let mut buffer = [0; 256];
            let mut stdin = io::stdin().lock();
            loop {
                let read = stdin.read(&mut buffer);
                rehearse(Task::Lifeline);
                match read {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            // Nobody may be waiting any more.
            let _ = end.send(());
        })?;
    }
    tasks.spawn(named(Task::Outside, async move {
        let mut lifeline_lives = lifeline == Lifeline::Stdin;
        loop {
            let why = tokio::select! {
                Some(()) = terminate.recv() => Why::Signal(SignalKind::terminate().as_raw_value()),
                Some(()) = interrupt.recv() => Why::Signal(SignalKind::interrupt().as_raw_value()),
                Some(()) = async { hangup.as_mut()?.recv().await } => Why::Signal(SignalKind::hangup().as_raw_value()),
                _ = &mut ended, if lifeline_lives => {
                    lifeline_lives = false;
                    Why::Lifeline
                }
                () = sender.closed() => return,
            };
            sender.send_modify(|asked| {
                asked.why.get_or_insert(why);
                asked.times = asked.times.saturating_add(1);
            });
        }
    }));
    Ok(receiver)
}

/// Whether this process was started with SIGHUP ignored.
fn hangup_is_ignored() -> io::Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    Ok(mask & 1 << (SignalKind::hangup().as_raw_value() - 1) != 0)
}
