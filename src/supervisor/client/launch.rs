//! Finding, starting and removing keepers.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use super::{KeeperError, KeeperOptions};
use crate::supervisor::identity::{Identity, IdentityError};
use crate::supervisor::keeper::{self, LOG_FILE, PID_FILE, READY_LINE, SOCKET};
use crate::supervisor::procfs::{CHILD_MARKER, KEEPER_MARKER, RUN_MARKER};

/// How long a keeper may take from its start to its ready line.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long a connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// How long the kernel may take to end a killed keeper.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// The keeper's own log is moved away when it has this many bytes at a start.
const LOG_LIMIT: u64 = 4 * 1024 * 1024;

/// Connects to a living keeper, if there is one.
pub(super) async fn connect(state_dir: &Path) -> Option<UnixStream> {
    let connecting = UnixStream::connect(state_dir.join(SOCKET));
    timeout(CONNECT_LIMIT, connecting).await.ok()?.ok()
}

/// Starts a keeper and connects to it.
pub(super) async fn start(options: &KeeperOptions, run_id: &str) -> Result<(Child, UnixStream), KeeperError> {
    let failed = |detail: String| options.failed(detail);
    let log_path = options.state_dir.join(LOG_FILE);
    if fs::metadata(&log_path).is_ok_and(|log| log.len() > LOG_LIMIT) {
        let _ = fs::rename(&log_path, log_path.with_extension("log.1"));
    }
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&log_path)
        .map_err(|error| failed(format!("{}: {error}", log_path.display())))?;
    let mut keeper = Command::new(&options.exe)
        .arg("keeper")
        .arg("--state-dir")
        .arg(&options.state_dir)
        .arg("--run-id")
        .arg(run_id)
        .arg("--orphan-grace")
        .arg(seconds(options.orphan_grace))
        .arg("--kill-grace")
        .arg(seconds(options.kill_grace))
        .env_remove(RUN_MARKER)
        .env_remove(CHILD_MARKER)
        .env_remove(KEEPER_MARKER)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .kill_on_drop(false)
        .spawn()
        .map_err(|error| failed(format!("{}: {error}", options.exe.display())))?;
    let Some(stdout) = keeper.stdout.take() else {
        return Err(failed("no pipe from its stdout".to_owned()));
    };
    let mut line = String::new();
    let mut reader = BufReader::new(stdout);
    let ready = timeout(START_LIMIT, reader.read_line(&mut line)).await;
    let problem = match ready {
        Ok(Ok(_)) if line.trim_end() == READY_LINE => None,
        Ok(Ok(0)) => Some("it ended before it was ready".to_owned()),
        Ok(Ok(_)) => Some(format!("unexpected greeting {line:?}")),
        Ok(Err(error)) => Some(format!("its greeting cannot be read: {error}")),
        Err(_) => Some(format!("not ready within {START_LIMIT:?}")),
    };
    if let Some(problem) = problem {
        let _ = keeper.start_kill();
        let status = timeout(KILL_LIMIT, keeper.wait()).await;
        let status = match status {
            Ok(Ok(status)) => format!(" ({status})"),
            _ => String::new(),
        };
        return Err(failed(format!(
            "{problem}{status}; last lines of {}: {}",
            log_path.display(),
            last_lines(&log_path)
        )));
    }
    match connect(&options.state_dir).await {
        Some(stream) => Ok((keeper, stream)),
        None => {
            let _ = keeper.start_kill();
            let _ = timeout(KILL_LIMIT, keeper.wait()).await;
            Err(failed("it does not accept a connection".to_owned()))
        }
    }
}

fn seconds(duration: Duration) -> String {
    duration.as_secs_f64().to_string()
}

fn last_lines(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let start = text.len().saturating_sub(1500);
    let text = String::from_utf8_lossy(&text[start..]).into_owned();
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
}

/// Who the keeper says it is: what it has written of itself, if one lives (it holds the lock on that file).
fn living(state_dir: &Path) -> io::Result<Option<Result<Identity, IdentityError>>> {
    if !keeper::is_alive(state_dir) {
        return Ok(None);
    }
    let text = fs::read_to_string(state_dir.join(PID_FILE))?;
    Ok(Some(Identity::parse(&text)))
}

/// Refuses a keeper of another pid namespace or host: its processes are not those that the same pids name here.
pub(super) fn check_here(state_dir: &Path) -> io::Result<()> {
    let Some(identity) = living(state_dir)? else {
        return Ok(());
    };
    identity.and_then(|identity| identity.check_here()).map_err(|error| elsewhere(&error))
}

fn elsewhere(error: &IdentityError) -> io::Error {
    io::Error::other(format!(
        "{PID_FILE}, which a living keeper has locked, {error}; stop the sidecar that started it, in its container or \
         on its host, or give another --state-dir"
    ))
}

/// Kills a keeper that lives but does not answer, and nobody else. Returns whether no keeper is left.
pub(super) async fn kill_unresponsive(state_dir: &Path) -> io::Result<bool> {
    let mut limit = None;
    while let Some(identity) = living(state_dir)? {
        let limit = match limit {
            Some(limit) => limit,
            None => {
                let keeper =
                    identity.and_then(|identity| identity.find()).map_err(|error| elsewhere(&error))?;
                if let Some(keeper) = keeper {
                    tracing::warn!(pid = keeper.pid, "a keeper that does not answer is killed");
                    keeper.signal(Signal::KILL);
                }
                *limit.insert(Instant::now() + KILL_LIMIT)
            }
        };
        if Instant::now() >= limit {
            return Ok(false);
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(true)
}
