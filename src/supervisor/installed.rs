//! Which vLLM would run, found out without importing it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::time::timeout;
use tracing::debug;

use super::command::VllmLaunch;

/// Limit for the answer: an interpreter on a cold network file system is slow.
const VERSION_LIMIT: Duration = Duration::from_secs(30);
/// Prints the version of the installed vLLM without importing it.
const VERSION_QUERY: &str = "import importlib.metadata as m; print(m.version('vllm'))";
/// Longest answer that is read.
const ANSWER: u64 = 4096;

/// Asks the interpreter of the `vllm` program.
///
/// # Errors
/// Says what stood in the way; then the version is unknown before an engine has started.
pub async fn vllm_version(launch: &VllmLaunch) -> Result<String, String> {
    let bin = launch.find(&launch.bin).ok_or("no such program")?;
    let (program, args) = interpreter(&bin)?;
    let program = launch.find(&program).unwrap_or(program);
    let mut command = Command::new(&program);
    command
        .args(args)
        .args(["-c", VERSION_QUERY])
        .env_clear()
        .envs(&launch.env)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    if let Some(cwd) = &launch.cwd {
        command.current_dir(cwd);
    }
    let named = |text: String| format!("{}: {text}", program.display());
    let mut child = command.spawn().map_err(|error| named(error.to_string()))?;
    let stdout = child.stdout.take().ok_or_else(|| named("no pipe from its stdout".to_owned()))?;
    let answer = async {
        let mut text = String::new();
        stdout.take(ANSWER).read_to_string(&mut text).await?;
        child.wait().await.map(|status| (status, text))
    };
    let (status, text) = timeout(VERSION_LIMIT, answer)
        .await
        .map_err(|_| named(format!("no answer within {VERSION_LIMIT:?}")))?
        .map_err(|error| named(error.to_string()))?;
    let version = text.trim();
    if !status.success() || version.is_empty() {
        return Err(named(format!("it has no package vllm ({status})")));
    }
    debug!(vllm = version, python = %program.display(), "version found");
    Ok(version.to_owned())
}

/// The interpreter named in a script's first line, and its arguments.
fn interpreter(script: &Path) -> Result<(PathBuf, Vec<String>), String> {
    let mut start = Vec::new();
    File::open(script)
        .and_then(|file| file.take(ANSWER).read_to_end(&mut start))
        .map_err(|error| format!("{}: {error}", script.display()))?;
    let text = String::from_utf8_lossy(&start);
    let mut lines = text.lines();
    let unknown = || format!("{}: its first line names no Python", script.display());
    let mut words = lines
        .next()
        .and_then(|line| line.strip_prefix("#!"))
        .ok_or_else(unknown)?
        .split_whitespace()
        .map(str::to_owned);
    let mut program = PathBuf::from(words.next().ok_or_else(unknown)?);
    if program.ends_with("env") {
        let mut rest = words.by_ref().skip_while(|word| word == "-S");
        program = rest.next().ok_or_else(unknown)?.into();
    } else if program.ends_with("sh") {
        // How pip writes paths that are too long for a first line: '''exec' "/path/python" "$0" "$@"
        let exec = lines.next().and_then(|line| line.strip_prefix("'''exec' ")).ok_or_else(unknown)?;
        let path = exec.strip_suffix(" \"$0\" \"$@\"").unwrap_or(exec).trim_matches('"');
        return Ok((path.into(), Vec::new()));
    }
    let name = program.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if name.starts_with("python") || name.starts_with("pypy") {
        Ok((program, words.collect()))
    } else {
        Err(unknown())
    }
}
