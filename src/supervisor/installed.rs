//! What the Python of the `vllm` program says, without importing vLLM: its version, and where a model's configuration
//! is.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::time::timeout;
use tracing::{debug, info};

use super::command::VllmLaunch;

/// Limit for the answer: an interpreter on a cold network file system is slow.
const VERSION_LIMIT: Duration = Duration::from_secs(30);
/// Prints the version of the installed vLLM without importing it.
const VERSION_QUERY: &str = "import importlib.metadata as m; print(m.version('vllm'))";
/// Limit for a configuration: a few kilobytes, after several redirections.
const CONFIG_LIMIT: Duration = Duration::from_secs(60);
/// Prints the path of a model's configuration in the Hugging Face cache, after fetching it as vLLM would: by
/// `config.json`, or by Mistral's `params.json` where that is not in the repository (`get_config` in
/// `vllm/transformers_utils/config.py`, 0.32.0).
const CONFIG_QUERY: &str = "\
import sys
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
def fetch(file):
    return hf_hub_download(sys.argv[1], file, revision=sys.argv[2] or None)
try:
    try:
        path = fetch('config.json')
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        path = fetch('params.json')
except Exception as error:
    sys.exit(' '.join([type(error).__name__ + ':', *str(error).split()]))
print(path)
";
/// Longest answer that is read.
const ANSWER: u64 = 4096;
/// Longest complaint that is read; a traceback's last line is its point.
const COMPLAINT: u64 = 64 << 10;

/// Asks for the version.
///
/// # Errors
/// Says what stood in the way; then the version is unknown before an engine has started.
pub async fn vllm_version(launch: &VllmLaunch) -> Result<String, String> {
    let version = ask(launch, &[VERSION_QUERY], VERSION_LIMIT).await?;
    debug!(vllm = version, "version found");
    Ok(version)
}

/// Fetches the configuration of a model of the hub, with the cache, endpoint and token that the environment names;
/// where it is.
///
/// # Errors
/// Says what stood in the way.
pub async fn fetch_config(
    launch: &VllmLaunch,
    model: &str,
    revision: Option<&str>,
) -> Result<PathBuf, String> {
    info!(model, "not in the Hugging Face cache; its configuration is fetched");
    let query = [CONFIG_QUERY, model, revision.unwrap_or_default()];
    ask(launch, &query, CONFIG_LIMIT).await.map(PathBuf::from)
}

/// What the interpreter of the `vllm` program prints when it runs `query`, a program and its arguments.
async fn ask(launch: &VllmLaunch, query: &[&str], limit: Duration) -> Result<String, String> {
    let bin = launch.find(&launch.bin).ok_or("no such program")?;
    let (program, args) = interpreter(&bin)?;
    let program = launch.find(&program).unwrap_or(program);
    let mut command = Command::new(&program);
    command
        .args(args)
        .arg("-c")
        .args(query)
        .env_clear()
        .envs(&launch.env)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if let Some(cwd) = &launch.cwd {
        command.current_dir(cwd);
    }
    let named = |text: String| format!("{}: {text}", program.display());
    let mut child = command.spawn().map_err(|error| named(error.to_string()))?;
    let pipes = child.stdout.take().zip(child.stderr.take());
    let (stdout, stderr) = pipes.ok_or_else(|| named("no pipes from it".to_owned()))?;
    let answer = async {
        let (mut text, mut complaint) = (String::new(), Vec::new());
        let (mut stdout, mut stderr) = (stdout.take(ANSWER), stderr.take(COMPLAINT));
        tokio::try_join!(stdout.read_to_string(&mut text), stderr.read_to_end(&mut complaint))?;
        child.wait().await.map(|status| (status, text, complaint))
    };
    let (status, text, complaint) = timeout(limit, answer)
        .await
        .map_err(|_| named(format!("no answer within {limit:?}")))?
        .map_err(|error| named(error.to_string()))?;
    let text = text.trim();
    if status.success() && !text.is_empty() {
        return Ok(text.to_owned());
    }
    let complaint = String::from_utf8_lossy(&complaint);
    let last = complaint.lines().map(str::trim).rfind(|line| !line.is_empty());
    Err(named(last.map_or_else(|| status.to_string(), str::to_owned)))
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
