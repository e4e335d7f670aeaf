//! Starts sidecars, asks them, and leaves nothing behind.

use std::fs::File;
use std::io::Write as _;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub(crate) use dp_sidecar_testkit::free_port;
use dp_sidecar_testkit::frontend::FakeFrontend;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

pub(crate) use super::fakes::{complete_all, complete_on_all_ranks, engine, frontend};
pub(crate) use super::models::{Model, fake_vllm, model};
pub(crate) use super::status::{frontend_state, states, weight_versions};

/// Patience for what should take well under a second; CI machines are small and shared.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// The prompt of `NewRequest::new`.
pub(crate) const PROMPT: [u64; 3] = [1, 2, 3];

/// Environment variable that marks every process of a run.
const RUN_MARKER: &str = "DP_SIDECAR_RUN_ID";

/// Calls `look` until it gives something. `what` and the last state go into the failure.
#[track_caller]
pub(crate) fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    match until_ok(limit, || look().ok_or(())) {
        Ok(value) => value,
        Err(()) => panic!("not in {limit:?}: {what}"),
    }
}

/// Calls `look` until it succeeds, or gives its last error.
pub(crate) fn until_ok<T, E>(limit: Duration, mut look: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let end = Instant::now() + limit;
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => pause(Duration::from_millis(15)),
        }
    }
}

#[allow(clippy::disallowed_methods, reason = "between two looks at a condition")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// A directory with room for unix sockets in it (their paths are short).
pub(crate) fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("dps-").tempdir_in("/tmp").unwrap()
}

/// How to start a sidecar.
pub(crate) struct Setup {
    args: Vec<String>,
    vllm: Vec<String>,
    env: Vec<(String, String)>,
    size: u16,
    spawns: bool,
    lifeline: bool,
    /// What a shell does before it becomes the sidecar.
    first: &'static str,
    port: u16,
    directory: tempfile::TempDir,
}

impl Setup {
    /// A sidecar that starts fake engines of `model`.
    pub(crate) fn spawning(size: u16, model: &Model) -> Self {
        let mut setup = Self::new(size);
        setup.spawns = true;
        setup.vllm = vec![model.path.display().to_string()];
        setup.args.push("--vllm-bin".to_owned());
        setup.args.push(fake_vllm().display().to_string());
        setup
    }

    /// A sidecar that waits for engines.
    pub(crate) fn waiting(size: u16, moe: bool) -> Self {
        let mut setup = Self::new(size);
        let port = setup.port.to_string();
        let kind = if moe { "moe" } else { "dense" };
        for arg in ["--data-parallel-rpc-port", &port, "--model-kind", kind] {
            setup.args.push(arg.to_owned());
        }
        setup
    }

    fn new(size: u16) -> Self {
        let args = [
            "--dp-rank",
            "0",
            "--data-parallel-size",
            &size.to_string(),
            "--shutdown-timeout",
            "2s",
            "--kill-grace",
            "2s",
            "--orphan-grace",
            "2s",
        ];
        Self {
            args: args.map(str::to_owned).to_vec(),
            vllm: Vec::new(),
            env: Vec::new(),
            size,
            spawns: false,
            lifeline: false,
            first: "",
            port: free_port(),
            directory: directory(),
        }
    }

    /// More flags; one that is there already gets the new value.
    pub(crate) fn args(mut self, args: &[&str]) -> Self {
        if let [name, value] = args
            && let Some(at) = self.args.iter().position(|arg| arg == name && *name != "--frontend")
        {
            self.args[at + 1] = (*value).to_owned();
            return self;
        }
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// Its stdin is its lifeline.
    pub(crate) fn lifeline(mut self) -> Self {
        self.lifeline = true;
        self.args(&["--lifeline", "stdin"])
    }

    /// Starts it out of a shell that first does this.
    pub(crate) fn first(mut self, commands: &'static str) -> Self {
        self.first = commands;
        self
    }

    /// Another handshake port than the free one it would get.
    pub(crate) fn port(mut self, port: u16) -> Self {
        let old = self.port.to_string();
        for arg in &mut self.args {
            if *arg == old {
                *arg = port.to_string();
            }
        }
        self.port = port;
        self
    }

    /// One of several nodes: ranks `start` to `start + local - 1`, with a leader at `leader`.
    pub(crate) fn node(mut self, start: u16, local: u16, leader: &str, token: &Path) -> Self {
        self.args[1] = start.to_string();
        let (local, token) = (local.to_string(), token.display().to_string());
        // Addresses of their own, as hosts have them.
        let address = format!("127.0.0.{}", start + 1);
        self.args(&[
            "-dpl",
            &local,
            "--leader",
            leader,
            "--auth-token-file",
            &token,
            "--peer-address",
            &address,
        ])
    }

    /// A frontend to attach to.
    pub(crate) fn frontend(self, frontend: &FakeFrontend) -> Self {
        let address = frontend.host_port().to_owned();
        self.args(&["--frontend", &address])
    }

    /// An environment variable of the sidecar and what it starts.
    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Faults of the fake engines, and a place to change them later.
    pub(crate) fn faults(self, faults: &str) -> Self {
        let control = self.control_dir();
        std::fs::create_dir_all(&control).unwrap();
        self.env("FAKE_VLLM_FAULTS", faults).env("FAKE_VLLM_CONTROL", control.display().to_string())
    }

    fn control_dir(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// Starts it.
    pub(crate) fn start(self) -> Sidecar {
        let state = self.directory.path().join("s");
        let log = self.directory.path().join("sidecar.log");
        Sidecar { child: self.launch(&state, &log), state, log, ended: None, setup: self }
    }

    fn launch(&self, state: &Path, log: &Path) -> Child {
        let append = |path: &Path| File::options().create(true).append(true).open(path).unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("{}\nexec \"$0\" \"$@\"", self.first), env!("CARGO_BIN_EXE_sidecar")])
            .args(&self.args)
            .arg("--state-dir")
            .arg(state)
            .env("RUST_LOG", "info,dp_sidecar=debug,zeromq=off")
            .env("FAKE_VLLM_STEP_MS", "2")
            .env_remove("XDG_RUNTIME_DIR")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(if self.lifeline { Stdio::piped() } else { Stdio::null() })
            .stdout(append(&self.directory.path().join("sidecar.out")))
            .stderr(append(log));
        if self.spawns {
            command.arg("--").args(&self.vllm);
        }
        command.spawn().unwrap()
    }
}

/// A running sidecar.
pub(crate) struct Sidecar {
    child: Child,
    state: PathBuf,
    log: PathBuf,
    ended: Option<ExitStatus>,
    setup: Setup,
}

/// What a subcommand said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Said {
    /// stdout as JSON: the last line that is an object.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .ok()
            .or_else(|| self.stdout.lines().rev().find_map(|line| serde_json::from_str(line).ok()))
            .unwrap_or_else(|| panic!("no JSON: {self:?}"))
    }

    /// Everything it said.
    pub(crate) fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

/// A `sidecar update` beside the test. It is ended with the test if it has not ended by itself.
pub(crate) struct Updating {
    child: Child,
    log: File,
}

impl Updating {
    /// Its exit code, once it has ended.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        self.child.try_wait().unwrap().map(|status| status.code().unwrap_or(-1))
    }

    /// Waits for its end; its exit code, and all that it said.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> Said {
        let code = until("end of the update command", SOON, || self.ended());
        let mut stdout = String::new();
        self.log.seek(SeekFrom::Start(0)).unwrap();
        self.log.read_to_string(&mut stdout).unwrap();
        Said { code, stdout, stderr: String::new() }
    }
}

impl Drop for Updating {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Sidecar {
    /// Its pid.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    /// State directory of the sidecar.
    pub(crate) fn state_dir(&self) -> &Path {
        &self.state
    }

    /// DP ranks of the whole deployment.
    pub(crate) fn size(&self) -> u16 {
        self.setup.size
    }

    /// Handshake address for engines that the test starts.
    pub(crate) fn handshake(&self) -> String {
        format!("tcp://127.0.0.1:{}", self.setup.port)
    }

    /// Runs a subcommand.
    pub(crate) fn command(&self, args: &[&str]) -> Said {
        let output = Command::new(env!("CARGO_BIN_EXE_sidecar"))
            .args(args)
            .arg("--state-dir")
            .arg(&self.state)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        Said {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// An update that runs while the test goes on.
    pub(crate) fn begin_update(&self, checkpoint: &Path, args: &[&str]) -> Updating {
        let log = tempfile::tempfile().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_sidecar"))
            .args(["update", "--path"])
            .arg(checkpoint)
            .args(args)
            .arg("--state-dir")
            .arg(&self.state)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log.try_clone().unwrap())
            .spawn()
            .unwrap();
        Updating { child, log }
    }

    /// Waits until an update is at work whose holder's name has `part`: its id, or its phase.
    #[track_caller]
    pub(crate) fn await_update(&self, part: &str) -> Value {
        self.await_status(&format!("update {part}"), |status| {
            status["controller"]["holder"].as_str().is_some_and(|holder| holder.contains(part))
        })
    }

    /// `sidecar status --json`, if it answers.
    pub(crate) fn status(&self) -> Option<Value> {
        let said = self.command(&["status", "--json"]);
        // 6: a rank has failed.
        matches!(said.code, 0 | 6).then(|| said.json())
    }

    /// Waits until its status satisfies `condition`.
    #[track_caller]
    pub(crate) fn await_status(&self, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let mut last = None;
        let found = until_ok(SOON, || {
            last = self.status();
            match &last {
                Some(status) if condition(status) => Ok(status.clone()),
                _ => Err(()),
            }
        });
        match found {
            Ok(status) => status,
            Err(()) => panic!(
                "not in {SOON:?}: {what}\nlast status: {}\n{}",
                last.map_or_else(|| "none".to_owned(), |status| format!("{status:#}")),
                self.log_tail()
            ),
        }
    }

    /// Waits until all engines are admitted.
    #[track_caller]
    pub(crate) fn await_admitted(&self) -> Value {
        let size = usize::from(self.setup.size);
        self.await_status("all engines admitted", |status| states(status) == vec!["admitted"; size])
    }

    /// Waits until the frontend at `address` is attached.
    #[track_caller]
    pub(crate) fn await_attached(&self, address: &str) -> Value {
        self.await_status(&format!("frontend {address} attached"), |status| {
            frontend_state(status, address).as_deref() == Some("attached")
        })
    }

    /// All that it and its relay process have logged.
    pub(crate) fn log(&self) -> String {
        let read = |path: &Path| strip_colours(&std::fs::read_to_string(path).unwrap_or_default());
        read(&self.state.join("logs/relay.log")) + &read(&self.log)
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        format!("log of the sidecar:\n{}", lines[lines.len().saturating_sub(60)..].join("\n"))
    }

    /// Waits for a line of the log that contains all `parts`; `rank 1` is also found as `rank=1`.
    #[track_caller]
    pub(crate) fn await_log(&self, parts: &[&str]) -> String {
        let found = until_ok(SOON, || {
            self.log()
                .lines()
                .find(|line| parts.iter().all(|part| says(line, part)))
                .map(str::to_owned)
                .ok_or(())
        });
        match found {
            Ok(line) => line,
            Err(()) => panic!("not logged in {SOON:?}: {parts:?}\n{}", self.log_tail()),
        }
    }

    /// Faults of the running engine of `rank` from now on.
    pub(crate) fn set_faults(&self, rank: u16, faults: &str) {
        let control = self.setup.control_dir();
        let path = control.join(format!("rank-{rank}"));
        let fresh = control.join(format!(".rank-{rank}"));
        std::fs::write(&fresh, faults).unwrap();
        std::fs::rename(fresh, path).unwrap();
    }

    /// Ends its stdin.
    pub(crate) fn cut_lifeline(&mut self) {
        drop(self.child.stdin.take());
    }

    /// A byte on its stdin, which means nothing.
    pub(crate) fn write_lifeline(&mut self) {
        if let Some(stdin) = &mut self.child.stdin {
            let _ = stdin.write_all(b"\n");
        }
    }

    /// A signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn await_end(&mut self) -> ExitStatus {
        let end = until_ok(SOON, || self.child.try_wait().unwrap().ok_or(()));
        match end {
            Ok(status) => {
                self.ended = Some(status);
                status
            }
            Err(()) => panic!("the sidecar did not end in {SOON:?}\n{}", self.log_tail()),
        }
    }

    /// SIGTERM, and waits.
    #[track_caller]
    pub(crate) fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.await_end()
    }

    /// Starts it again as it was started before, in the same state directory.
    pub(crate) fn start_again(&mut self) {
        self.child = self.setup.launch(&self.state, &self.log);
        self.ended = None;
    }

    /// Starts it again with other flags.
    pub(crate) fn start_again_with(&mut self, args: &[&str]) {
        self.setup.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self.start_again();
    }

    /// Has it ended?
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Run id of its state directory.
    fn run_id(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.state.join("run-id")).ok()?;
        Some(text.trim().to_owned()).filter(|id| !id.is_empty())
    }

    /// Processes that carry its run marker: the keeper's children, and theirs.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let Some(id) = self.run_id() else {
            return Vec::new();
        };
        let marker = format!("{RUN_MARKER}={id}");
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let environ = std::fs::read(entry.path().join("environ")).unwrap_or_default();
            if environ.split(|byte| *byte == 0).any(|variable| variable == marker.as_bytes()) {
                found.push(pid);
            }
        }
        found
    }

    /// Its shared memory.
    fn segments(&self) -> Vec<PathBuf> {
        let Some(id) = self.run_id() else {
            return Vec::new();
        };
        let prefix = format!("dp-sidecar-{id}-");
        let all = std::fs::read_dir("/dev/shm").unwrap().flatten();
        all.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path())
            .collect()
    }

    /// Pid of its keeper.
    pub(crate) fn keeper(&self) -> Option<i32> {
        let pid = self.status()?["sidecar"]["keeper_pid"].as_i64()?;
        i32::try_from(pid).ok()
    }

    /// Waits until no process of this run is left.
    #[track_caller]
    pub(crate) fn await_nothing_left(&self) {
        let mut left = Vec::new();
        let done = until_ok(SOON, || {
            left = self.processes();
            if left.is_empty() && self.segments().is_empty() { Ok(()) } else { Err(()) }
        });
        let segments = self.segments();
        assert!(done.is_ok(), "left: processes {left:?}, segments {segments:?}\n{}", self.log_tail());
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log_tail());
            // `KEEP_LOG=FILE` keeps all of it.
            if let Some(path) = std::env::var_os("KEEP_LOG") {
                let _ = std::fs::copy(&self.log, path);
            }
        }
        let keeper = if self.ended.is_none() { self.keeper() } else { None };
        if self.child.try_wait().ok().flatten().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        // What this run started, and nothing else: by its own random marker.
        for pid in keeper.into_iter().chain(self.processes()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        for segment in self.segments() {
            let _ = std::fs::remove_file(segment);
        }
    }
}

/// Does a line of the log say this? A rank may be a field of it.
pub(crate) fn says(line: &str, part: &str) -> bool {
    line.contains(part)
        || part.strip_prefix("rank ").is_some_and(|rank| line.contains(&format!("rank={rank}")))
}

/// Did the process end with this exit code?
pub(crate) fn exited_with(status: ExitStatus, code: u8) -> bool {
    status.code() == Some(i32::from(code)) && status.signal().is_none()
}

fn strip_colours(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character == '\u{1b}' {
            for character in characters.by_ref() {
                if character == 'm' {
                    break;
                }
            }
        } else {
            plain.push(character);
        }
    }
    plain
}
