//! The whole `sidecar` program with fake vLLM processes: however it ends, nothing is left.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use dp_sidecar::admin::client::AdminClient;
use dp_sidecar::api::{Command as AdminCommand, Response, Status};
use dp_sidecar::supervisor::procfs::{Process, Selector};
use dp_sidecar_testkit::engine::weights;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep, timeout};

/// Longer than anything here may take; a test that reaches it has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// The fake `vllm`, built next to the sidecar.
async fn fake_vllm() -> &'static Path {
    static BUILT: OnceCell<PathBuf> = OnceCell::const_new();
    BUILT
        .get_or_init(|| async {
            let sidecar = Path::new(env!("CARGO_BIN_EXE_sidecar"));
            let target = sidecar.parent().unwrap();
            let path = target.join("fake-vllm");
            if !path.exists() {
                let status = Command::new(env!("CARGO"))
                    .args(["build", "-q", "-p", "dp-sidecar-testkit", "--bins"])
                    .arg("--target-dir")
                    .arg(target.parent().unwrap())
                    .status()
                    .await
                    .unwrap();
                assert!(status.success());
            }
            path
        })
        .await
}

struct Hosted {
    dir: tempfile::TempDir,
    process: Child,
}

impl Hosted {
    async fn start(options: &str) -> Self {
        let vllm = fake_vllm().await.to_owned();
        Self::start_with(options, &vllm)
    }

    fn start_with(options: &str, vllm: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        std::fs::create_dir(&model).unwrap();
        std::fs::write(model.join("config.json"), r#"{"model_type":"llama"}"#).unwrap();
        weights::write_checkpoint(&model.join("model.safetensors"), &[("a", &[1], 1)]).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_sidecar"))
            .args(["--dp-rank", "0", "-dp", "2", "--orphan-grace", "1s"])
            .args(["--kill-grace", "3s"])
            .args(options.split_whitespace())
            .arg("--state-dir")
            .arg(dir.path().join("s"))
            .arg("--vllm-bin")
            .arg(vllm)
            .arg("--")
            .arg(&model)
            .env("SIDECAR_SHUTDOWN_TIMEOUT", "1s")
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self { dir, process }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    async fn status(&self) -> Option<Status> {
        let mut client = AdminClient::connect(&self.state()).await.ok()?;
        match client.call(AdminCommand::Status).await {
            Ok(Response::Status(status)) => Some(*status),
            _ => None,
        }
    }

    async fn until(&self, what: &str, condition: impl Fn(&Status) -> bool) -> Status {
        let limit = Instant::now() + PATIENCE;
        loop {
            let status = self.status().await;
            if let Some(status) = status.as_ref().filter(|status| condition(status)) {
                return status.clone();
            }
            assert!(Instant::now() < limit, "not within {PATIENCE:?}: {what}: {status:?}");
            sleep(Duration::from_millis(50)).await;
        }
    }

    async fn serving(&self) -> Status {
        self.until("both engines are admitted", |status| {
            status.engines.iter().filter(|engine| engine.state == "admitted").count() == 2
        })
        .await
    }

    fn marked(&self) -> Vec<Process> {
        let run_id = std::fs::read_to_string(self.state().join("run-id")).unwrap_or_default();
        if run_id.is_empty() {
            return Vec::new();
        }
        let selector = Selector { run_id: run_id.trim().to_owned(), ..Selector::default() };
        selector.find().unwrap()
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.process.id().unwrap()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// Waits for the end; returns the exit code and what was written to stderr.
    async fn end(&mut self) -> (Option<i32>, String) {
        let mut stderr = self.process.stderr.take().unwrap();
        let mut text = String::new();
        timeout(PATIENCE, stderr.read_to_string(&mut text)).await.unwrap().unwrap();
        let status = timeout(PATIENCE, self.process.wait()).await.unwrap();
        (status.unwrap().code(), text)
    }

    async fn until_nothing_is_left(&self) {
        let limit = Instant::now() + PATIENCE;
        let keeper = || {
            let pid = std::fs::read_to_string(self.state().join("keeper.pid")).ok()?;
            Process::read(pid.lines().next()?.parse().ok()?).filter(|process| !process.is_dead())
        };
        while !self.marked().is_empty() || keeper().is_some() {
            assert!(Instant::now() < limit, "left: {:?} {:?}", self.marked(), keeper());
            sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Hosted {
    fn drop(&mut self) {
        for process in self.marked() {
            process.signal(rustix::process::Signal::KILL);
        }
    }
}

fn last_word(stderr: &str) -> serde_json::Value {
    serde_json::from_str(stderr.lines().last().unwrap()).unwrap()
}

#[tokio::test]
async fn sigterm_stops_everything_and_ends_with_0() {
    let mut hosted = Hosted::start("").await;
    hosted.serving().await;
    assert!(hosted.marked().len() >= 2);
    hosted.signal(Signal::SIGTERM);
    let (code, stderr) = hosted.end().await;
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(last_word(&stderr), serde_json::json!({"exit": 0, "reason": "SIGTERM", "node_rank": 0}));
    assert!(hosted.marked().is_empty(), "nothing is left when it ends");
    hosted.until_nothing_is_left().await;
}

#[tokio::test]
async fn requests_in_flight_finish_before_sigterm_takes_effect() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let options = format!("--serve --host 127.0.0.1 --port {port} --shutdown-timeout 30s");
    let mut hosted = Hosted::start(&options).await;
    hosted
        .until("the frontend is attached", |status| {
            status.frontends.iter().any(|frontend| frontend.attachment.state == "attached")
                && status.engines.iter().all(|engine| engine.state == "admitted")
        })
        .await;
    let ask = tokio::spawn(async move {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let body = r#"{"model":"m","prompt":[1,2,3],"max_tokens":400}"#;
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer
    });
    hosted
        .until("a request is in flight", |status| status.engines.iter().any(|engine| engine.in_flight > 0))
        .await;
    hosted.signal(Signal::SIGTERM);
    let answer = ask.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("\"finish_reason\":\"length\""), "{answer}");
    let (code, stderr) = hosted.end().await;
    assert_eq!(code, Some(0), "{stderr}");
    hosted.until_nothing_is_left().await;
}

#[tokio::test]
async fn the_stop_command_ends_it_as_sigterm_does() {
    let mut hosted = Hosted::start("").await;
    hosted.serving().await;
    let mut client = AdminClient::connect(&hosted.state()).await.unwrap();
    let answer = client.call(AdminCommand::Stop).await.unwrap();
    assert_eq!(answer, Response::Done);
    let (code, stderr) = hosted.end().await;
    assert_eq!(code, Some(0), "{stderr}");
    hosted.until_nothing_is_left().await;
}

#[tokio::test]
async fn the_end_of_the_lifeline_stops_everything_and_ends_with_7() {
    let mut hosted = Hosted::start("--lifeline stdin").await;
    hosted.serving().await;
    drop(hosted.process.stdin.take());
    let (code, stderr) = hosted.end().await;
    assert_eq!(code, Some(7), "{stderr}");
    assert_eq!(last_word(&stderr)["reason"], "end of the lifeline");
    hosted.until_nothing_is_left().await;
}

#[tokio::test]
async fn a_sidecar_killed_with_9_leaves_its_engines_for_the_grace_and_then_nothing() {
    let mut hosted = Hosted::start("").await;
    hosted.serving().await;
    hosted.process.kill().await.unwrap();
    assert!(hosted.marked().len() >= 2, "the engines outlive the sidecar");
    hosted.until_nothing_is_left().await;
}

#[tokio::test]
async fn a_keeper_killed_with_9_costs_its_engines_and_new_ones_serve() {
    let mut hosted = Hosted::start("").await;
    let before = hosted.serving().await;
    let keeper = before.sidecar.keeper_pid.unwrap();
    kill(Pid::from_raw(keeper.cast_signed()), Signal::SIGKILL).unwrap();
    let pids = |status: &Status| -> BTreeSet<Option<u32>> {
        status.engines.iter().map(|engine| engine.pid).collect()
    };
    let after = hosted
        .until("new engines serve", |status| {
            status.engines.iter().all(|engine| engine.state == "admitted")
                && status.sidecar.keeper_pid.is_some_and(|pid| pid != keeper)
                && pids(status).is_disjoint(&pids(&before))
        })
        .await;
    for pid in pids(&before).into_iter().flatten() {
        assert!(Process::read(pid.cast_signed()).is_none_or(|process| process.is_dead()), "{pid} is gone");
    }
    assert_eq!(after.engines.len(), 2);
    hosted.signal(Signal::SIGTERM);
    assert_eq!(hosted.end().await.0, Some(0));
    hosted.until_nothing_is_left().await;
}

#[tokio::test]
async fn a_second_sidecar_in_the_same_state_directory_is_refused_and_the_first_goes_on() {
    let mut hosted = Hosted::start("").await;
    hosted.serving().await;
    let second = Command::new(env!("CARGO_BIN_EXE_sidecar"))
        .args(["--dp-rank", "0", "--model-kind", "dense", "--state-dir"])
        .arg(hosted.state())
        .output();
    let second = timeout(PATIENCE, second).await.unwrap().unwrap();
    assert_eq!(second.status.code(), Some(8));
    hosted.serving().await;
    hosted.signal(Signal::SIGINT);
    assert_eq!(hosted.end().await.0, Some(0));
    hosted.until_nothing_is_left().await;
}

#[tokio::test]
async fn an_engine_that_exits_during_its_start_is_told_with_its_last_lines() {
    let dir = tempfile::tempdir().unwrap();
    let vllm = dir.path().join("vllm");
    std::fs::write(&vllm, "#!/bin/sh\necho loading; echo no such tensor >&2; exit 3\n").unwrap();
    std::fs::set_permissions(&vllm, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let before = std::time::Instant::now();
    let mut hosted = Hosted::start_with("--max-restarts 0", &vllm);
    let (code, stderr) = hosted.end().await;
    assert_eq!(code, Some(6), "{stderr}");
    assert!(before.elapsed() < Duration::from_secs(20), "no timeout is waited out");
    let reason = last_word(&stderr)["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("exit code 3"), "{reason}");
    assert!(reason.contains("no such tensor"), "{reason}");
    hosted.until_nothing_is_left().await;
}

#[tokio::test]
async fn a_second_sigterm_waits_for_nothing_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let vllm = dir.path().join("vllm");
    let ready = dir.path().join("ready");
    let script =
        format!("#!/bin/sh\ntrap '' TERM\ntouch {}\nwhile :; do sleep 0.05; done\n", ready.display());
    std::fs::write(&vllm, script).unwrap();
    std::fs::set_permissions(&vllm, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut hosted = Hosted::start_with("--shutdown-timeout 1000s", &vllm);
    hosted.until("the engines are starting", |_| ready.exists()).await;
    let stopping = std::time::Instant::now();
    hosted.signal(Signal::SIGTERM);
    hosted.until("it stops", |status| status.sidecar.state == "stopping").await;
    hosted.signal(Signal::SIGTERM);
    let (code, stderr) = hosted.end().await;
    assert_eq!(code, Some(128 + 15), "{stderr}");
    assert!(stopping.elapsed() < Duration::from_secs(20));
    hosted.until_nothing_is_left().await;
}
