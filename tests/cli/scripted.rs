//! The subcommands, against an admin socket with scripted answers.

use std::collections::BTreeMap;

use dp_sidecar::admin::AdminServer;
use dp_sidecar::api::{
    AdminCommand, AdminError, Command, ControllerStatus, CoordinatorSnapshot, DeploymentStatus, EngineMemory,
    EngineStatus, EngineTimes, ErrorKind, FrontendSnapshot, FrontendStatus, NodeStatus, RelayVersion, Reply,
    ReportStatus, Response, Retain, SidecarStatus, SleepReport, Status, UpdateEvent, UpdateProgress,
    UpdateReport, UpdateRequest, UpdateSource, VersionReport, WeightsStatus,
};
use dp_sidecar::driver::handles::GroupKind;
use dp_sidecar::gpu::{GpuDevice, GpuReport};
use dp_sidecar_protocol::machine::weight_update::{PauseMode, Phase, RankProgress};
use dp_sidecar_protocol::{EngineIndex, UpdateId, WeightVersion};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::*;

/// A running sidecar with scripted answers.
struct Scripted {
    dir: tempfile::TempDir,
    stop: CancellationToken,
    server: tokio::task::JoinHandle<()>,
}

impl Scripted {
    fn start(answer: impl Fn(Command, Reply) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = AdminServer::bind(dir.path()).unwrap();
        let (commands, mut queue) = mpsc::channel(8);
        let stop = CancellationToken::new();
        let server = tokio::spawn(server.serve(commands, stop.clone()));
        tokio::spawn(async move {
            while let Some(AdminCommand { command, reply }) = queue.recv().await {
                answer(command, reply);
            }
        });
        Self { dir, stop, server }
    }

    fn command(&self, line: &str) -> super::Command {
        let mut command = command(line);
        command.arg("--state-dir").arg(self.dir.path());
        command
    }

    async fn output(&self, line: &str) -> Output {
        output(&mut self.command(line)).await
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("admin.sock")).await.unwrap()
    }

    async fn end(self) {
        self.stop.cancel();
        timeout(PATIENCE, self.server).await.unwrap().unwrap();
    }
}

fn report(status: ReportStatus, reason: Option<&str>) -> UpdateReport {
    UpdateReport {
        id: UpdateId("u1".to_owned()),
        status,
        version: WeightVersion("v2".to_owned()),
        previous: WeightVersion("v1".to_owned()),
        reason: reason.map(str::to_owned),
        fenced: Vec::new(),
        total_s: 1.25,
        paused_s: 0.5,
        asleep: false,
        bytes: 4096,
        engines: BTreeMap::from([(
            EngineIndex(1),
            EngineTimes { load_ms: Some(77), ..EngineTimes::default() },
        )]),
        phases: BTreeMap::new(),
        warnings: Vec::new(),
    }
}

fn status() -> Box<Status> {
    let engine = |rank: u16, state: &str| EngineStatus {
        rank: EngineIndex(rank),
        pid: Some(4000 + u32::from(rank)),
        vllm_version: Some("0.32.0".to_owned()),
        state: state.to_owned(),
        incarnation: 1,
        weight_version: Some("v1".to_owned()),
        waiting: 2,
        running: 3,
        kv_cache_usage: 0.256,
        in_flight: 5,
        ..EngineStatus::default()
    };
    let mut failed = engine(1, "starting");
    failed.last_error = Some("exit code 1, its last lines:\n  out of memory".to_owned());
    failed.restarts = 2;
    failed.pid = None;
    Box::new(Status {
        sidecar: SidecarStatus {
            pid: 77,
            version: "0.1.0".to_owned(),
            uptime_s: 3700,
            state: "serving".to_owned(),
            state_dir: "/run/x".to_owned(),
            keeper_pid: Some(78),
            relay_pid: Some(79),
        },
        deployment: DeploymentStatus {
            kind: GroupKind::Lockstep,
            size: 2,
            start_rank: 0,
            size_local: 2,
            model: Some("tiny-moe".to_owned()),
            http: Some("127.0.0.1:8000".to_owned()),
        },
        engines: vec![engine(0, "admitted"), failed],
        frontends: vec![FrontendStatus {
            attachment: FrontendSnapshot {
                address: "127.0.0.1:7200".to_owned(),
                id: Some(1),
                state: "attached".to_owned(),
                api_servers: 2,
                detail: None,
                attachments: 3,
            },
            in_flight: 5,
        }],
        coordinator: CoordinatorSnapshot {
            wave: dp_sidecar_protocol::Wave(9),
            running: true,
            ..CoordinatorSnapshot::default()
        },
        weights: WeightsStatus {
            version: "v1".to_owned(),
            dir: Some("/models/a".to_owned()),
            updates: "no: rank 1: its model was loaded from pytorch_model.bin".to_owned(),
            last_update: Some(report(
                ReportStatus::RolledBack,
                Some("rank 1, worker 0: load: tensor x missing"),
            )),
        },
        controller: ControllerStatus { holder: Some("update u2".to_owned()), paused: true },
        gpus: GpuReport {
            source: "fake".to_owned(),
            driver_version: Some("570.1".to_owned()),
            devices: vec![GpuDevice {
                name: Some("H".to_owned()),
                memory_used: Some(1 << 30),
                memory_total: Some(4 << 30),
                ..GpuDevice::default()
            }],
            ..GpuReport::default()
        },
        nodes: vec![
            NodeStatus {
                size_local: 1,
                host: "a".to_owned(),
                link: "here".to_owned(),
                ..NodeStatus::default()
            },
            NodeStatus {
                start_rank: 1,
                size_local: 1,
                host: "b".to_owned(),
                address: Some("10.0.0.2".to_owned()),
                link: "down".to_owned(),
                since_s: Some(61),
                rtt_us: Some(80),
                detail: Some("connection reset".to_owned()),
            },
        ],
        leader: None,
        missing: None,
    })
}

#[tokio::test]
async fn status_is_a_table_for_people_and_json_for_programs() {
    let scripted = Scripted::start(|command, reply| match command {
        Command::Status => reply.send(Ok(Response::Status(status()))),
        other => panic!("{other:?}"),
    });
    let output = scripted.output("status").await;
    let expected = "\
sidecar 0.1.0  serving  pid 77  keeper 78  up 1 h 1 min
ranks 0 to 1 of 2  moe, lockstep ranks  tiny-moe
frontend of this sidecar at http://127.0.0.1:8000
weights v1 from /models/a
updates no: rank 1: its model was loaded from pytorch_model.bin
last update u1: ROLLED BACK to the previous weights, v1 -> v2, 1.2 s, engines paused 0.50 s
  because rank 1, worker 0: load: tensor x missing
controlled by update u2
the engines are PAUSED
wave 9  running

nodes
  ranks  host address  link       for   rtt detail
  rank 0 a    -        here         -     -
  rank 1 b    10.0.0.2 down 1 min 1 s 80 us connection reset

engines
  rank state     pid vllm   weights waiting running  kv in flight held restarts
     0 admitted 4000 0.32.0 v1            2       3 26%         5    0        0
     1 starting    - 0.32.0 v1            2       3 26%         5    0        2
  rank 1, last failure: exit code 1, its last lines:
      out of memory

frontends
  address        state    slots in flight attached detail
  127.0.0.1:7200 attached     2         5       3x

devices
  driver 570.1
  index name uuid        memory use temp ecc errors pids
      0 H    -    1.0 / 4.0 GiB   -    -          - -
";
    assert_eq!(text(&output.stdout), expected);
    let output = scripted.output("status --json").await;
    let parsed: Status = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(parsed, *status());
    scripted.end().await;
}

#[tokio::test]
async fn a_watched_status_is_shown_again_and_again() {
    let scripted = Scripted::start(|command, reply| match command {
        Command::Status => reply.send(Ok(Response::Status(status()))),
        other => panic!("{other:?}"),
    });
    let mut child = scripted.command("status --watch").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut pictures = 0;
    while pictures < 2 {
        let line = timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap();
        pictures += u32::from(line.unwrap().starts_with("sidecar 0.1.0"));
    }
    child.kill().await.unwrap();
    scripted.end().await;
}

#[tokio::test]
async fn an_update_shows_its_steps_and_ends_with_the_code_of_its_outcome() {
    for (outcome, code, words) in [
        (ReportStatus::Committed, 0, "committed"),
        (ReportStatus::Refused, 10, "REFUSED, no engine was touched"),
        (ReportStatus::RolledBack, 11, "ROLLED BACK"),
        (ReportStatus::Degraded, 12, "DEGRADED"),
    ] {
        let scripted = Scripted::start(move |command, reply| match command {
            Command::Update(request) => {
                assert_eq!(
                    request,
                    UpdateRequest {
                        source: UpdateSource::Leader,
                        retain: Retain::None,
                        version: Some(WeightVersion("v2".to_owned())),
                        mode: PauseMode::Abort,
                        pause_deadline_ms: Some(2500),
                        strict_dtype: true,
                        ..UpdateRequest::new("/models/new")
                    }
                );
                for (phase, done) in [("staging", 0), ("staging", 2048), ("loading", 1)] {
                    let step = UpdateProgress {
                        phase: phase.to_owned(),
                        message: format!("{phase} the weights"),
                        done,
                        total: 4096,
                        event: None,
                    };
                    reply.progress(step);
                }
                let reason = (outcome != ReportStatus::Committed).then_some("rank 1: x");
                reply.send(Ok(Response::Update(report(outcome, reason))));
            }
            other => panic!("{other:?}"),
        });
        let line = "update --path /models/new --source leader --retain none --version v2 --mode abort --pause-deadline 2.5s --strict-dtype";
        let output = scripted.output(line).await;
        assert_eq!(output.status.code(), Some(code));
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert!(
            stderr.starts_with(
                "staging: staging the weights (0 of 4096)\n\
                 loading: loading the weights (1 of 4096)\n"
            ),
            "{stderr}"
        );
        let final_text = if code == 0 { &stdout } else { &stderr };
        assert!(final_text.contains(words), "{final_text}");
        scripted.end().await;
    }
}

#[tokio::test]
async fn updates_are_followed_ended_and_listed() {
    let scripted = Scripted::start(|command, reply| match command {
        Command::UpdateFollow { id } if id == Some(UpdateId("u7".to_owned())) => {
            let ranks = BTreeMap::from([(EngineIndex(1), RankProgress::Loading)]);
            let event = Some(UpdateEvent::Progress { phase: Phase::Loading, ranks });
            let (phase, message) = ("staging".to_owned(), String::new());
            reply.progress(UpdateProgress { phase, message, done: 1, total: 2, event });
            reply.send(Ok(Response::Update(report(ReportStatus::Committed, None))));
        }
        Command::UpdateFollow { .. } => {
            reply.send(Err(AdminError::new(ErrorKind::Unavailable, "update u1 is not running")));
        }
        Command::UpdateAbort => reply.send(Ok(Response::Done)),
        Command::UpdateHistory { .. } => {
            reply.send(Ok(Response::Updates(vec![report(ReportStatus::RolledBack, Some("x"))])));
        }
        other => panic!("{other:?}"),
    });
    let followed = scripted.output("update --follow u7 --events").await;
    let lines: Vec<serde_json::Value> =
        text(&followed.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&lines[0]["event"], &lines[1]["status"]), (&"progress".into(), &"committed".into()));
    // It has ended already: its report is found.
    assert_eq!(scripted.output("update --follow u1").await.status.code(), Some(11));
    assert_eq!(scripted.output("update --follow u2").await.status.code(), Some(15));
    assert_eq!(scripted.output("update --abort").await.status.code(), Some(0));
    let listed = scripted.output("update --history").await;
    assert!(text(&listed.stdout).contains("ROLLED BACK"), "{}", text(&listed.stdout));
    assert!(text(&listed.stdout).contains("77"), "{}", text(&listed.stdout));
    for line in ["update", "update --source upload:", "update --source upload:a --path /x"] {
        assert_eq!(scripted.output(line).await.status.code(), Some(2), "{line}");
    }
    scripted.end().await;
}

#[tokio::test]
async fn refusals_and_failures_have_codes_of_their_own() {
    for (kind, code) in [
        (ErrorKind::Busy, 13),
        (ErrorKind::Invalid, 2),
        (ErrorKind::Unavailable, 15),
        (ErrorKind::Failed, 15),
        (ErrorKind::Timeout, 5),
    ] {
        let scripted = Scripted::start(move |command, reply| match command {
            Command::Pause { .. } => {
                let error = AdminError::new(kind, "update u2 holds the engines");
                reply.send(Err(error));
            }
            other => panic!("{other:?}"),
        });
        let output = scripted.output("pause").await;
        assert_eq!(output.status.code(), Some(code), "{kind:?}");
        assert_eq!(text(&output.stderr), "error: update u2 holds the engines\n");
        scripted.end().await;
    }
    let nowhere = tempfile::tempdir().unwrap();
    let line = format!("resume --state-dir {}", nowhere.path().display());
    let output = sidecar(&line).await;
    assert_eq!(output.status.code(), Some(14));
    assert!(text(&output.stderr).contains("no sidecar answers at"));
    let output = sidecar(&format!("version --json --state-dir {}", nowhere.path().display())).await;
    assert_eq!(output.status.code(), Some(14));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        said,
        serde_json::json!({ "command": env!("CARGO_PKG_VERSION") }),
        "and nothing else is known"
    );
}

#[tokio::test]
async fn the_small_commands_reach_the_sidecar() {
    let scripted = Scripted::start(|command, reply| match command {
        Command::Pause { mode, deadline_ms } => {
            assert_eq!((mode, deadline_ms), (PauseMode::Keep, Some(3000)));
            reply.send(Ok(Response::Done));
        }
        Command::Resume | Command::Stop => {
            reply.send(Ok(Response::Done));
        }
        Command::Sleep { level, mode, deadline_ms } => {
            assert_eq!((level, mode, deadline_ms), (2, PauseMode::Abort, None));
            let engine = EngineMemory {
                asleep: vec!["weights".to_owned(), "kv_cache".to_owned()],
                without_weights: true,
                ..EngineMemory::default()
            };
            let (engines, version) = (vec![engine], "unknown".to_owned());
            reply.send(Ok(Response::Sleep(SleepReport { engines, paused: true, version })));
        }
        Command::Wake { tags } => {
            let failed = tags.is_empty().then(|| "it does not answer".to_owned());
            let engine = EngineMemory { error: failed, ..EngineMemory::default() };
            let (engines, version) = (vec![engine], "v1".to_owned());
            reply.send(Ok(Response::Sleep(SleepReport { engines, paused: false, version })));
        }
        Command::FrontendAdd { address } => {
            assert_eq!(address, "h:1");
            reply.send(Ok(Response::Done));
        }
        Command::FrontendRemove { address } => {
            assert_eq!(address, "h:2");
            reply.send(Ok(Response::Done));
        }
        Command::FrontendList => {
            reply.send(Ok(Response::Frontends(status().frontends)));
        }
        Command::Version => {
            let report = VersionReport {
                sidecar: "0.1.0".to_owned(),
                relays: [
                    (0, RelayVersion::Version("0.0.9".to_owned())),
                    (2, RelayVersion::Unknown("not connected".to_owned())),
                ]
                .into(),
                vllm: [(0, "0.32.0".to_owned())].into(),
                weights: "v1".to_owned(),
            };
            reply.send(Ok(Response::Version(report)));
        }
        // A dropped reply: the sidecar stops.
        Command::Status => {}
        other => panic!("{other:?}"),
    });
    for (line, expected) in [
        ("pause --mode keep --pause-deadline 3", "all engines are paused"),
        ("resume", "all engines are resumed"),
        (
            "sleep --level 2 --mode abort",
            "rank 0 asleep: weights, kv_cache, without weights\nweights unknown\nnext: ",
        ),
        ("sleep --level 2 --mode abort --json", "\"without_weights\": true"),
        ("wake --tag weights --tag kv_cache", "rank 0 awake\nweights v1\nthe engines serve\n"),
        ("stop --no-wait", "the sidecar stops"),
        ("frontend add h:1", "will attach to frontend h:1"),
        ("frontend remove h:2", "frontend h:2 is removed"),
        ("frontend list", "127.0.0.1:7200 attached"),
        ("frontend list --json", "\"api_servers\": 2"),
        ("version", "engine 0  vLLM 0.32.0"),
        ("version", "relay 0   0.0.9"),
        ("version", "relay 2   unknown: not connected"),
        ("version --json", "\"unknown\": \"not connected\""),
    ] {
        let output = scripted.output(line).await;
        let stdout = text(&output.stdout);
        assert!(output.status.success(), "{line}: {}", text(&output.stderr));
        assert!(stdout.contains(expected), "{line}: {stdout}");
    }
    let output = scripted.output("wake").await;
    assert_eq!(output.status.code(), Some(15));
    assert_eq!(text(&output.stderr), "error: rank 0: it does not answer\n");
    for wrong in ["sleep --level 0", "sleep --level 3", "wake --tag kv"] {
        assert_eq!(scripted.output(wrong).await.status.code(), Some(2), "{wrong}");
    }
    let output = scripted.output("status").await;
    assert_eq!(output.status.code(), Some(15));
    assert_eq!(text(&output.stderr), "error: the sidecar is stopping\n");
    let output = scripted.output("frontend add nowhere").await;
    assert_eq!(output.status.code(), Some(2));
    scripted.end().await;
}

async fn first_line(stream: UnixStream, request: &[u8]) -> serde_json::Value {
    let (read, mut write) = stream.into_split();
    write.write_all(request).await.unwrap();
    let mut line = String::new();
    timeout(PATIENCE, BufReader::new(read).read_line(&mut line)).await.unwrap().unwrap();
    serde_json::from_str(&line).unwrap()
}

#[tokio::test]
async fn what_is_no_request_is_answered_as_invalid() {
    let scripted = Scripted::start(|command, _| panic!("{command:?}"));
    let long = vec![b'x'; 100 * 1024];
    for (request, words) in [
        (&b"garbage\n"[..], "request: expected value"),
        (b"{\"version\":7,\"command\":{\"name\":\"new\"}}\n", "protocol version 7"),
        (b"{\"version\":2,\"command\":{\"name\":\"new\"}}\n", "unknown variant"),
        (&long, "max line length exceeded"),
    ] {
        let answer = first_line(scripted.connect().await, request).await;
        assert_eq!(answer["type"], "error");
        assert_eq!(answer["body"]["kind"], "invalid");
        let message = answer["body"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{message}");
    }
    scripted.end().await;
}

#[tokio::test]
async fn an_update_goes_on_when_its_client_is_gone() {
    let (told, mut heard) = mpsc::unbounded_channel();
    let scripted = Scripted::start(move |command, reply| match command {
        Command::Update(_) => {
            let told = told.clone();
            tokio::spawn(async move {
                told.send("started").unwrap();
                // Full or closed, it must not matter.
                while !reply.is_closed() {
                    reply.progress(UpdateProgress {
                        phase: "loading".to_owned(),
                        message: "x".repeat(1000),
                        done: 0,
                        total: 0,
                        event: None,
                    });
                    tokio::task::yield_now().await;
                }
                reply.send(Ok(Response::Update(report(ReportStatus::Committed, None))));
                told.send("ended").unwrap();
            });
        }
        other => panic!("{other:?}"),
    });
    let mut stream = scripted.connect().await;
    stream
        .write_all(b"{\"version\":2,\"command\":{\"name\":\"update\",\"path\":\"/m\",\"version\":null,\"mode\":\"wait\",\"pause_deadline_ms\":null,\"from_version\":null,\"id\":null}}\n")
        .await
        .unwrap();
    assert_eq!(timeout(PATIENCE, heard.recv()).await.unwrap(), Some("started"));
    let mut buffer = [0; 64];
    stream.read_exact(&mut buffer).await.unwrap();
    drop(stream);
    assert_eq!(timeout(PATIENCE, heard.recv()).await.unwrap(), Some("ended"));
    scripted.end().await;
}

#[tokio::test]
async fn a_stale_socket_is_no_obstacle_and_the_new_one_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = Path::join(dir.path(), "admin.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let _server = AdminServer::bind(dir.path()).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
