//! The keeper, with real processes: scripts that ignore SIGTERM, hide in sessions of their own and
//! clean their environment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use dp_sidecar::state_dir::StateDir;
use dp_sidecar::supervisor::client::KeeperError;
use dp_sidecar::supervisor::keeper::wire::ExitReport;
use dp_sidecar::supervisor::procfs::{Process, Selector};
use dp_sidecar::supervisor::{ExitStatus, KeeperClient, KeeperEvent, KeeperOptions, SpawnSpec};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::TaskTracker;

/// Longer than anything here may take; a test that reaches it has failed.
const PATIENCE: Duration = Duration::from_secs(30);

struct Bench {
    state: StateDir,
    options: KeeperOptions,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(orphan_grace: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("s")).unwrap();
        let options = options(&state, orphan_grace);
        Self { state, options, _dir: dir }
    }

    async fn start(&self) -> (KeeperClient, mpsc::Receiver<KeeperEvent>) {
        KeeperClient::connect_or_start(self.options.clone()).await.unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.state.path().join(name)
    }

    /// All processes of this state directory.
    fn marked(&self) -> Vec<Process> {
        let selector = Selector { run_id: self.state.run_id().to_owned(), ..Selector::default() };
        selector.find().unwrap()
    }

    async fn until_nothing_is_left(&self) {
        eventually("no marked process is left", || self.marked().is_empty()).await;
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for process in self.marked() {
            process.signal(rustix::process::Signal::KILL);
        }
        let pid = std::fs::read_to_string(self.path("keeper.pid")).unwrap_or_default();
        if let Some(Ok(pid)) = pid.lines().next().map(str::parse::<i32>)
            && let Ok(line) = std::fs::read(format!("/proc/{pid}/cmdline"))
            && String::from_utf8_lossy(&line).contains(self.state.run_id())
        {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn options(state: &StateDir, orphan_grace: Duration) -> KeeperOptions {
    KeeperOptions {
        state_dir: state.path().to_owned(),
        exe: env!("CARGO_BIN_EXE_sidecar").into(),
        run_id: state.run_id().to_owned(),
        orphan_grace,
        kill_grace: Duration::from_millis(500),
        configuration: "a deployment".to_owned(),
        keep: ["engine-0", "engine-1", "frontend"].map(str::to_owned).into(),
        tasks: TaskTracker::new(),
    }
}

fn script(name: &str, text: &str) -> SpawnSpec {
    SpawnSpec {
        name: name.to_owned(),
        incarnation: 1,
        argv: ["/bin/sh", "-c", text].map(str::to_owned).to_vec(),
        env: BTreeMap::from([("PATH".to_owned(), std::env::var("PATH").unwrap())]),
        cwd: None,
        stop_order: 1,
    }
}

/// Waits for something that another process does, where no event tells.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let limit = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < limit, "not within {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn event(events: &mut mpsc::Receiver<KeeperEvent>) -> KeeperEvent {
    timeout(PATIENCE, events.recv()).await.expect("an event comes in time").expect("the client lives")
}

async fn exit_of(events: &mut mpsc::Receiver<KeeperEvent>, name: &str) -> ExitReport {
    loop {
        if let KeeperEvent::Exited(report) = event(events).await
            && report.name == name
        {
            return report;
        }
    }
}

fn exists(path: &Path) -> bool {
    path.exists()
}

#[tokio::test]
async fn a_child_runs_in_a_session_of_its_own_with_its_markers_and_its_end_is_told() {
    let bench = Bench::new(PATIENCE);
    let (client, mut events) = bench.start().await;
    let mut spec = script(
        "engine-0",
        "echo out; echo err >&2; echo child=$DP_SIDECAR_CHILD; echo foreign=$HOME; \
         cut -d' ' -f6 /proc/self/stat; sleep 0.1; exit 7",
    );
    spec.incarnation = 3;
    let pid = client.spawn(spec).await.unwrap();
    assert_eq!(
        event(&mut events).await,
        KeeperEvent::Spawned { name: "engine-0".to_owned(), incarnation: 3, pid }
    );
    let report = exit_of(&mut events, "engine-0").await;
    assert_eq!(report.status, ExitStatus::Code { code: 7 });
    assert_eq!((report.pid, report.incarnation), (pid, 3));
    assert!(!report.requested);
    assert_eq!(
        report.last_lines,
        ["out", "err", "child=engine-0:3", "foreign=", &pid.to_string()],
        "the environment is the given one, the session the child's own"
    );
    let log = std::fs::read_to_string(bench.path("logs/engine-0.log")).unwrap();
    assert!(log.contains("out\nerr\n") && log.contains("ended: exit code 7"), "{log}");
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_refused_with_its_name() {
    let bench = Bench::new(PATIENCE);
    let (client, _events) = bench.start().await;
    let mut spec = script("engine-0", "");
    spec.argv = vec!["/no/such/vllm".to_owned()];
    let error = client.spawn(spec).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/vllm: No such file"), "{error}");
    for name in ["../x", ""] {
        let refused = client.spawn(script(name, "exit 0")).await;
        assert!(matches!(refused, Err(KeeperError::Refused { .. })));
    }
    assert!(client.list().await.unwrap().is_empty());
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_child_blocks_no_signals_and_ends_at_once_when_it_is_told_to() {
    let bench = Bench::new(PATIENCE);
    let (client, mut events) = bench.start().await;
    // Without a shell, which would reset the mask itself.
    let plain = |name: &str, line: &str| SpawnSpec {
        argv: line.split(' ').map(str::to_owned).collect(),
        ..script(name, "")
    };
    client.spawn(plain("mask", "grep SigBlk /proc/self/status")).await.unwrap();
    let report = exit_of(&mut events, "mask").await;
    assert_eq!(report.last_lines, ["SigBlk:\t0000000000000000"]);
    client.spawn(plain("engine-0", "sleep 1000")).await.unwrap();
    client.stop("engine-0", PATIENCE * 10).await.unwrap();
    let report = exit_of(&mut events, "engine-0").await;
    assert_eq!(report.status, ExitStatus::Signal { signal: 15 });
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_child_that_ignores_sigterm_is_killed_after_its_grace_together_with_its_strays() {
    let bench = Bench::new(PATIENCE);
    let (client, mut events) = bench.start().await;
    let ready = bench.path("ready");
    // One stray in a session of its own, one that has also thrown its environment away.
    let text = format!(
        "trap '' TERM; setsid sleep 1000 & setsid env -i /bin/sh -c 'sleep 1000; true' & \
         touch {}; while :; do sleep 0.05; done",
        ready.display()
    );
    client.spawn(script("engine-0", &text)).await.unwrap();
    eventually("the script is ready", || exists(&ready) && bench.marked().len() >= 4).await;
    let before = std::time::Instant::now();
    client.stop("engine-0", Duration::from_millis(300)).await.unwrap();
    let report = exit_of(&mut events, "engine-0").await;
    assert!(before.elapsed() >= Duration::from_millis(300), "its grace was kept");
    assert_eq!(report.status, ExitStatus::Signal { signal: 9 });
    assert!(report.requested);
    assert!(report.strays_killed >= 3, "{report:?}");
    assert!(report.left.is_empty());
    assert!(bench.marked().is_empty(), "all of it is gone when its end is told");
    assert!(client.list().await.unwrap().is_empty());
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn what_a_child_leaves_behind_when_it_dies_is_removed_before_its_end_is_told() {
    let bench = Bench::new(PATIENCE);
    let (client, mut events) = bench.start().await;
    let ready = bench.path("ready");
    // A daemon: its parent is gone, its session is its own.
    let text = format!(
        "(setsid /bin/sh -c 'trap \"\" TERM; touch {}; while :; do sleep 0.05; done' &) ; \
         while ! [ -e {} ]; do sleep 0.02; done; echo last words; kill -9 $$",
        ready.display(),
        ready.display()
    );
    client.spawn(script("engine-1", &text)).await.unwrap();
    let report = exit_of(&mut events, "engine-1").await;
    assert!(exists(&ready));
    assert_eq!(report.status, ExitStatus::Signal { signal: 9 });
    assert_eq!(report.last_lines, ["last words"]);
    assert!(report.strays_killed >= 1, "{report:?}");
    assert!(bench.marked().is_empty());
    // The name is free again.
    client.spawn(script("engine-1", "exit 0")).await.unwrap();
    assert_eq!(exit_of(&mut events, "engine-1").await.status, ExitStatus::Code { code: 0 });
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_name_is_not_given_twice_while_its_child_lives() {
    let bench = Bench::new(PATIENCE);
    let (client, _events) = bench.start().await;
    client.spawn(script("engine-0", "sleep 1000")).await.unwrap();
    let error = client.spawn(script("engine-0", "exit 0")).await.unwrap_err();
    assert!(error.to_string().contains("is not gone yet"), "{error}");
    let error = client.stop("engine-9", PATIENCE).await.unwrap_err();
    assert!(error.to_string().contains("no child"), "{error}");
    client.shutdown(Duration::ZERO).await.unwrap();
    bench.until_nothing_is_left().await;
}

#[tokio::test]
async fn a_shutdown_stops_the_frontend_before_the_engines_and_only_their_main_processes_are_asked() {
    let bench = Bench::new(PATIENCE);
    let (client, mut events) = bench.start().await;
    let order = bench.path("order");
    let polite = |name: &str, stop_order: u32| {
        // The inner shell must be asked by the outer one, not by the keeper.
        let text = format!(
            "(trap 'echo {name}-inner >> {0}; exit 0' TERM; touch {0}.{name}; \
               while :; do sleep 0.02; done) & inner=$!; \
             trap 'sleep 0.2; echo {name} >> {0}; kill $inner; wait $inner; exit 0' TERM; \
             while :; do sleep 0.02; done",
            order.display()
        );
        SpawnSpec { stop_order, ..script(name, &text) }
    };
    client.spawn(polite("engine-0", 1)).await.unwrap();
    client.spawn(polite("frontend", 0)).await.unwrap();
    for name in ["engine-0", "frontend"] {
        let path = bench.path(&format!("order.{name}"));
        eventually("the scripts are ready", || exists(&path)).await;
    }
    client.shutdown(PATIENCE).await.unwrap();
    let text = std::fs::read_to_string(&order).unwrap();
    assert_eq!(
        text.lines().collect::<Vec<_>>(),
        ["frontend", "frontend-inner", "engine-0", "engine-0-inner"]
    );
    for name in ["frontend", "engine-0"] {
        let report = exit_of(&mut events, name).await;
        assert_eq!(report.status, ExitStatus::Code { code: 0 });
        assert_eq!(report.strays_killed, 0, "{report:?}");
        assert!(report.requested);
    }
    assert!(timeout(PATIENCE, events.recv()).await.unwrap().is_none(), "the client has ended");
    assert_eq!(client.pid(), None);
    assert!(!exists(&bench.path("keeper.sock")));
    assert!(matches!(client.list().await, Err(KeeperError::Gone { .. })));
    bench.options.tasks.close();
    timeout(PATIENCE, bench.options.tasks.wait()).await.unwrap();
}

#[tokio::test]
async fn a_keeper_killed_with_9_is_replaced_and_its_children_are_gone_before_that_is_told() {
    let bench = Bench::new(PATIENCE);
    let (client, mut events) = bench.start().await;
    let first = client.pid().unwrap();
    let ready = bench.path("ready");
    let stubborn = format!(
        "trap '' TERM; (setsid sleep 1000 &); touch {}; while :; do sleep 0.05; done",
        ready.display()
    );
    client.spawn(script("engine-0", &stubborn)).await.unwrap();
    client.spawn(script("engine-1", "sleep 1000")).await.unwrap();
    eventually("the scripts run", || exists(&ready)).await;
    kill(Pid::from_raw(first.cast_signed()), Signal::SIGKILL).unwrap();
    let mut ended = Vec::new();
    let second = loop {
        match event(&mut events).await {
            KeeperEvent::Exited(report) => {
                assert_eq!(report.status, ExitStatus::Unknown);
                ended.push(report.name);
            }
            KeeperEvent::Replaced { pid } => break pid,
            KeeperEvent::Spawned { .. } => {}
            KeeperEvent::Failed { error } => panic!("{error}"),
        }
    };
    ended.sort();
    assert_eq!(ended, ["engine-0", "engine-1"]);
    assert!(bench.marked().is_empty(), "nothing is left of the old children");
    assert_ne!(first, second);
    assert_eq!(client.pid(), Some(second));
    client.spawn(script("engine-0", "exit 4")).await.unwrap();
    assert_eq!(exit_of(&mut events, "engine-0").await.status, ExitStatus::Code { code: 4 });
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn without_an_owner_everything_is_stopped_after_the_orphan_grace() {
    let bench = Bench::new(Duration::from_millis(600));
    let (client, events) = bench.start().await;
    let keeper = client.pid().unwrap();
    client.spawn(script("engine-0", "trap '' TERM; while :; do sleep 0.05; done")).await.unwrap();
    client.spawn(script("engine-1", "sleep 1000")).await.unwrap();
    eventually("both run", || bench.marked().len() >= 2).await;
    let before = std::time::Instant::now();
    drop((client, events));
    bench.until_nothing_is_left().await;
    assert!(before.elapsed() >= Duration::from_millis(600));
    eventually("the keeper is gone, too", || {
        Process::read(keeper.cast_signed()).is_none_or(|process| process.is_dead())
    })
    .await;
    assert!(!exists(&bench.path("keeper.sock")));
}

/// The owner of the next test, in a process of its own.
#[tokio::test]
#[ignore = "started by the test below"]
async fn owner_process() {
    let state = StateDir::open(Path::new(&std::env::var("OWNER_STATE_DIR").unwrap())).unwrap();
    let options = options(&state, Duration::from_millis(600));
    let (client, _events) = KeeperClient::connect_or_start(options).await.unwrap();
    client.spawn(script("engine-0", "trap '' TERM; while :; do sleep 0.05; done")).await.unwrap();
    std::fs::write(state.path().join("owner-ready"), "").unwrap();
    sleep(PATIENCE).await;
}

fn start_owner(dir: &Path) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "keeper::owner_process", "--ignored"])
        .env("OWNER_STATE_DIR", dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn an_owner_killed_with_9_leaves_nothing_behind_after_the_orphan_grace() {
    let bench = Bench::new(Duration::from_millis(600));
    let dir = bench.path("owned");
    let mut owner = start_owner(&dir);
    eventually("the owner has a child", || exists(&dir.join("owner-ready"))).await;
    let run_id = std::fs::read_to_string(dir.join("run-id")).unwrap();
    let selector = Selector { run_id: run_id.trim().to_owned(), ..Selector::default() };
    assert!(!selector.find().unwrap().is_empty());
    owner.kill().unwrap();
    owner.wait().unwrap();
    eventually("everything is gone", || selector.find().unwrap().is_empty()).await;
    eventually("the keeper is gone", || !exists(&dir.join("keeper.sock"))).await;
}

const STUBBORN: &str = "trap '' TERM; while :; do sleep 0.05; done";

/// A keeper that has these children, and no owner.
async fn abandoned(bench: &Bench, children: &[(&str, &str)]) -> u32 {
    let (client, events) = bench.start().await;
    let keeper = client.pid().unwrap();
    for (name, text) in children {
        client.spawn(SpawnSpec { incarnation: 7, ..script(name, text) }).await.unwrap();
    }
    drop((client, events));
    // Its orphan grace is long: the keeper still lives.
    assert!(Process::read(keeper.cast_signed()).is_some_and(|process| !process.is_dead()));
    keeper
}

#[tokio::test]
async fn a_new_owner_of_the_same_deployment_goes_on_with_the_children_of_the_one_before() {
    let bench = Bench::new(PATIENCE);
    let keeper = abandoned(&bench, &[("engine-0", STUBBORN)]).await;
    let running = bench.marked();
    let (client, mut events) = bench.start().await;
    assert_eq!(client.pid(), Some(keeper));
    let child = client.inherited().child("engine-0").expect("it goes on").clone();
    assert_eq!((child.incarnation, child.stopping), (7, false));
    assert_eq!(bench.marked().first().map(|p| p.pid), running.first().map(|p| p.pid));
    assert!(running.iter().any(|process| process.pid == child.pid.cast_signed()));
    client.stop("engine-0", Duration::from_millis(50)).await.unwrap();
    let report = exit_of(&mut events, "engine-0").await;
    assert_eq!((report.incarnation, report.pid, report.requested), (7, child.pid, true));
    client.spawn(script("engine-0", "exit 0")).await.unwrap();
    exit_of(&mut events, "engine-0").await;
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn an_end_that_no_owner_was_there_to_hear_of_is_told_to_the_next_one() {
    let bench = Bench::new(PATIENCE);
    let go = bench.path("go");
    let text = format!("while [ ! -e {} ]; do sleep 0.05; done; echo last word; exit 3", go.display());
    abandoned(&bench, &[("engine-0", &text), ("engine-1", STUBBORN)]).await;
    std::fs::write(&go, "").unwrap();
    eventually("the child is gone", || {
        let selector = Selector {
            run_id: bench.state.run_id().to_owned(),
            child: Some("engine-0:7".to_owned()),
            ..Selector::default()
        };
        selector.find().unwrap().is_empty()
    })
    .await;
    // The keeper looks at its children before it looks at a new connection; but the end of the process and
    // the report of it are not the same moment.
    let (client, mut events) = bench.start().await;
    let report = match client.inherited().exit("engine-0") {
        Some(report) => report.clone(),
        None => exit_of(&mut events, "engine-0").await,
    };
    assert_eq!((report.incarnation, report.status), (7, ExitStatus::Code { code: 3 }));
    assert_eq!(report.last_lines.last().map(String::as_str), Some("last word"));
    let left: Vec<&str> = client.inherited().children.iter().map(|c| c.name.as_str()).collect();
    assert!(left.contains(&"engine-1"), "{left:?}");
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_child_that_the_new_owner_does_not_want_is_gone_before_it_begins() {
    let bench = Bench::new(PATIENCE);
    let keeper = abandoned(&bench, &[("engine-0", STUBBORN), ("engine-9", STUBBORN)]).await;
    let (client, _events) = bench.start().await;
    assert_eq!(client.pid(), Some(keeper));
    let names: Vec<String> = client.list().await.unwrap().into_iter().map(|child| child.name).collect();
    assert_eq!(names, ["engine-0"]);
    assert_eq!(client.inherited().children.len(), 1);
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_new_owner_of_another_deployment_stops_what_the_one_before_has_left() {
    let mut bench = Bench::new(PATIENCE);
    let first = abandoned(&bench, &[("engine-0", STUBBORN)]).await;
    bench.options.configuration = "another model".to_owned();
    let (client, mut events) = bench.start().await;
    assert!(bench.marked().is_empty(), "nothing is left from before");
    assert_ne!(client.pid(), Some(first));
    assert!(client.inherited().children.is_empty());
    client.spawn(script("engine-0", "exit 0")).await.unwrap();
    exit_of(&mut events, "engine-0").await;
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn leftovers_of_a_dead_keeper_and_a_dead_owner_are_removed_at_the_next_start() {
    let bench = Bench::new(PATIENCE);
    // What is left when both were killed: a marked process, a stale socket, a stale pid file.
    let mut left = Command::new("/bin/sh")
        .args(["-c", "trap '' TERM; while :; do sleep 0.05; done"])
        .env("DP_SIDECAR_RUN_ID", bench.state.run_id())
        .spawn()
        .unwrap();
    drop(std::os::unix::net::UnixListener::bind(bench.path("keeper.sock")).unwrap());
    std::fs::write(bench.path("keeper.pid"), format!("{}\n", left.id())).unwrap();
    let (client, _events) = bench.start().await;
    let status = left.wait().unwrap();
    assert!(!status.success());
    assert!(bench.marked().is_empty());
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_keeper_that_does_not_answer_is_killed_and_replaced() {
    let bench = Bench::new(PATIENCE);
    let (client, events) = bench.start().await;
    let first = client.pid().unwrap();
    client.spawn(script("engine-0", "sleep 1000")).await.unwrap();
    kill(Pid::from_raw(first.cast_signed()), Signal::SIGSTOP).unwrap();
    drop((client, events));
    let (client, _events) = bench.start().await;
    assert_ne!(client.pid(), Some(first));
    assert!(bench.marked().is_empty());
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_launcher_whose_processes_have_ended_is_not_waited_for() {
    let bench = Bench::new(PATIENCE);
    let (client, mut events) = bench.start().await;
    // As vLLM's: it ends its engine core at once, and then computes.
    let text = "sleep 1000 & core=$!; trap 'kill $core; wait; while :; do :; done' TERM; echo up; wait";
    client.spawn(script("engine-0", text)).await.unwrap();
    let log = bench.path("logs/engine-0.log");
    let says = |text: &str| std::fs::read_to_string(&log).unwrap_or_default().contains(text);
    eventually("it is up", || says("\nup\n")).await;
    let begun = Instant::now();
    client.stop("engine-0", PATIENCE).await.unwrap();
    let report = exit_of(&mut events, "engine-0").await;
    assert!(report.requested && begun.elapsed() < PATIENCE / 2, "{:?}: {report:?}", begun.elapsed());
    assert!(says("its processes have ended: killed"));
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_pid_file_that_names_somebody_else_is_refused_and_nobody_is_signalled() {
    let bench = Bench::new(PATIENCE);
    let mut stranger = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
    let pid = stranger.id();
    let file = std::fs::File::create(bench.path("keeper.pid")).unwrap();
    file.lock().unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap();
    let here = format!("{pid}\n{boot}{}", namespace.display());
    for (text, expected) in [
        (format!("{pid}\n"), "does not say which process it names"),
        (
            format!("{pid}\nanother\npid:[1]\n1\n/bin/sleep\n"),
            "names a process by its boot id another, expected",
        ),
        (format!("{pid}\n{boot}pid:[1]\n1\n/bin/sleep\n"), "by its pid namespace pid:[1], expected"),
        (format!("{here}\n1\n/bin/sleep\n"), "by its start time 1, expected"),
    ] {
        std::fs::write(bench.path("keeper.pid"), text).unwrap();
        let refused = KeeperClient::connect_or_start(bench.options.clone()).await.unwrap_err().to_string();
        assert!(
            refused.contains("keeper.pid, which a living keeper has locked") && refused.contains(expected),
            "{refused}"
        );
        assert!(stranger.try_wait().unwrap().is_none(), "it was signalled");
    }
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[tokio::test]
async fn garbage_on_the_keepers_socket_harms_nobody() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let bench = Bench::new(PATIENCE);
    let (client, mut events) = bench.start().await;
    let mut stream = tokio::net::UnixStream::connect(bench.path("keeper.sock")).await.unwrap();
    stream.write_all(&[0xff; 64]).await.unwrap();
    let mut rest = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut rest)).await.unwrap().ok();
    assert!(rest.is_empty(), "it is cut off without an answer");
    client.spawn(script("engine-0", "exit 0")).await.unwrap();
    exit_of(&mut events, "engine-0").await;
    client.shutdown(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn much_output_is_kept_in_bounds_and_the_last_lines_come_with_the_end() {
    let bench = Bench::new(PATIENCE);
    let (client, mut events) = bench.start().await;
    let text = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; echo the end";
    client.spawn(script("engine-0", text)).await.unwrap();
    let report = exit_of(&mut events, "engine-0").await;
    assert_eq!(report.last_lines.len(), 50);
    assert_eq!(report.last_lines.last().unwrap(), "the end");
    assert_eq!(report.last_lines[48], "line 19999");
    client.shutdown(Duration::ZERO).await.unwrap();
}
