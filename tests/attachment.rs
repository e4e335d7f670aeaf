//! The attachment tasks against fake frontends over libzmq. The ranks and the coordinator are played
//! by the test, so that only the attachment is looked at.
#![allow(clippy::unwrap_used, reason = "test helpers")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar::driver::attachment::{AttachmentConfig, spawn};
use dp_sidecar::driver::handles::{
    AttachmentCommand, AttachmentHandle, CoordinatorCommand, CoordinatorHandle, CoordinatorSnapshot,
    Deployment, EngineFacts, ForFrontendCoordinator, FrontendSnapshot, GroupKind, HandleError, RankCommand,
    RankHandle, RankSnapshot, RouteLost, ask,
};
use dp_sidecar::transport::{Dealer, Push};
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Slot};
use dp_sidecar_testkit::Reporter;
use dp_sidecar_testkit::frontend::{FakeFrontend, FrontendError, FrontendOptions};
use parking_lot::Mutex;
use rmpv::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Real vLLM takes its time to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the ranks and the coordinator were asked.
#[derive(Default)]
struct Seen {
    opened: Vec<(u16, u32, FrontendId)>,
    closed: Vec<(u16, FrontendId)>,
    waves: Vec<u64>,
    sinks: BTreeMap<FrontendId, mpsc::Sender<ForFrontendCoordinator>>,
    removed: Vec<FrontendId>,
}

struct Fixture {
    handle: AttachmentHandle,
    seen: Arc<Mutex<Seen>>,
    deployment: watch::Sender<Deployment>,
    slots: Vec<watch::Sender<RankSnapshot>>,
    tracker: TaskTracker,
    ranks: TaskTracker,
}

fn encode(value: &Value) -> Bytes {
    let mut out = Vec::new();
    rmpv::encode::write_value(&mut out, value).unwrap();
    out.into()
}

/// A ready response with an address that no frontend may see.
fn registration(rank: u16) -> Bytes {
    encode(&Value::Map(vec![
        ("max_model_len".into(), 256.into()),
        ("num_gpu_blocks".into(), 64.into()),
        ("dp_stats_address".into(), "ipc://of-the-sidecar".into()),
        ("dtype".into(), "bfloat16".into()),
        ("block_size".into(), 16.into()),
        ("vllm_version".into(), "0.32.0".into()),
        ("world_size".into(), 1.into()),
        ("data_parallel_size".into(), 1.into()),
        ("data_parallel_rank".into(), rank.into()),
    ]))
}

fn deployment(size: u16, kind: GroupKind, known: u16) -> Deployment {
    with_hash(size, kind, known, "fake-parallel-config")
}

fn with_hash(size: u16, kind: GroupKind, known: u16, hash: &str) -> Deployment {
    let engines = (0..known).map(|rank| {
        let facts = EngineFacts {
            registration: registration(rank),
            parallel_config_hash: (kind == GroupKind::Lockstep).then(|| hash.to_owned()),
            num_gpu_blocks: None,
            layout: Layout::newest(),
        };
        (EngineIndex(rank), facts)
    });
    Deployment { kind, size, engines: engines.collect() }
}

/// Plays a rank task: connects the routes with its identity and notices when they are lost.
async fn rank(
    index: u16,
    mut commands: mpsc::Receiver<RankCommand>,
    seen: Arc<Mutex<Seen>>,
    tasks: TaskTracker,
) {
    let mut routes: BTreeMap<FrontendId, CancellationToken> = BTreeMap::new();
    while let Some(command) = commands.recv().await {
        match command {
            RankCommand::OpenRoute { route, reply } => {
                seen.lock().opened.push((index, route.api_server, route.frontend));
                let stop = routes.entry(route.frontend).or_default().clone();
                let serve = async move {
                    let identity = EngineIndex(index).identity().0;
                    let limit = route.connect_timeout;
                    let dealer = Dealer::connect(&route.input_address, &identity, limit).await;
                    let push = Push::connect(&route.output_address, limit).await;
                    let (Ok(mut dealer), Ok(_push)) = (dealer, push) else {
                        let _ = reply.send(Err(HandleError::failed("no connection")));
                        return;
                    };
                    dealer.send(vec![route.registration.clone()]).await.unwrap();
                    let _ = reply.send(Ok(Slot(1)));
                    while dealer.recv().await.is_ok() {}
                    let lost = RouteLost {
                        frontend: route.frontend,
                        rank: EngineIndex(index),
                        api_server: route.api_server,
                        reason: "closed".to_owned(),
                    };
                    let _ = route.lost.send(lost).await;
                };
                tasks.spawn(stop.run_until_cancelled_owned(serve));
            }
            RankCommand::CloseRoutes { frontend, reply } => {
                if let Some(stop) = routes.remove(&frontend) {
                    stop.cancel();
                }
                seen.lock().closed.push((index, frontend));
                let _ = reply.send(Ok(()));
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    routes.values().for_each(CancellationToken::cancel);
}

async fn coordinator(mut commands: mpsc::Receiver<CoordinatorCommand>, seen: Arc<Mutex<Seen>>) {
    while let Some(command) = commands.recv().await {
        let mut seen = seen.lock();
        match command {
            CoordinatorCommand::AddFrontend { frontend, sink } => {
                seen.sinks.insert(frontend, sink);
            }
            CoordinatorCommand::RemoveFrontend { frontend } => {
                seen.sinks.remove(&frontend);
                seen.removed.push(frontend);
            }
            CoordinatorCommand::StartWave { wave, .. } => seen.waves.push(wave.0),
            other => panic!("unexpected {other:?}"),
        }
    }
}

fn fixture(size: u16, kind: GroupKind, slots: u32) -> Fixture {
    let tracker = TaskTracker::new();
    let ranks = TaskTracker::new();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let mut handles = Vec::new();
    let mut snapshots = Vec::new();
    for index in 0..size {
        let (commands, inbox) = mpsc::channel(64);
        let (sender, snapshot) =
            watch::channel(RankSnapshot { slots: (0, 0, slots), ..RankSnapshot::default() });
        ranks.spawn(rank(index, inbox, seen.clone(), ranks.clone()));
        snapshots.push(sender);
        handles.push(RankHandle { rank: EngineIndex(index), commands, snapshot });
    }
    let (commands, inbox) = mpsc::channel(64);
    ranks.spawn(coordinator(inbox, seen.clone()));
    let (_, snapshot) = watch::channel(CoordinatorSnapshot::default());
    let (deployment, known) = watch::channel(deployment(size, kind, size));
    let mut config = AttachmentConfig::default();
    config.machine.stall = Duration::from_millis(800);
    let handle = spawn(config, &tracker, handles, CoordinatorHandle { commands, snapshot }, known);
    Fixture { handle, seen, deployment, slots: snapshots, tracker, ranks }
}

impl Fixture {
    async fn ask(
        &self,
        command: impl FnOnce(tokio::sync::oneshot::Sender<Result<(), HandleError>>) -> AttachmentCommand,
    ) -> Result<(), HandleError> {
        let commands = &self.handle.commands;
        ask(commands, "attachment", "test".to_owned(), PATIENCE, command).await
    }

    async fn add(&self, address: &str) {
        let address = address.to_owned();
        self.ask(|reply| AttachmentCommand::Add { address, reply }).await.unwrap();
    }

    async fn remove(&self, address: &str) -> Result<(), HandleError> {
        let address = address.to_owned();
        self.ask(|reply| AttachmentCommand::Remove { address, reply }).await
    }

    /// Waits until the frontend is in a state, with a detail that has all these parts.
    async fn until(&self, address: &str, state: &str, parts: &[&str]) -> FrontendSnapshot {
        let mut snapshots = self.handle.snapshot.clone();
        let fits = |all: &Vec<FrontendSnapshot>| {
            all.iter()
                .find(|one| one.address == address && one.state == state)
                .filter(|one| {
                    let detail = one.detail.clone().unwrap_or_default();
                    parts.iter().all(|part| detail.contains(part))
                })
                .cloned()
        };
        let found = timeout(PATIENCE, snapshots.wait_for(|all| fits(all).is_some()))
            .await
            .map(|all| fits(&all.unwrap()).unwrap());
        found.unwrap_or_else(|_| {
            let all = self.handle.snapshot.borrow().clone();
            panic!("{address} is not {state} with {parts:?}: {all:#?}")
        })
    }

    async fn shut_down(self) {
        self.ask(|reply| AttachmentCommand::Shutdown { reply }).await.unwrap();
        self.tracker.close();
        timeout(PATIENCE, self.tracker.wait()).await.unwrap();
        let Self { handle, ranks, .. } = self;
        drop(handle);
        ranks.close();
        timeout(PATIENCE, ranks.wait()).await.unwrap();
    }
}

fn options(size: u16) -> FrontendOptions {
    FrontendOptions { size, ..FrontendOptions::default() }
}

fn frontend(options: FrontendOptions) -> FakeFrontend {
    FakeFrontend::bind(options, Reporter::quiet()).unwrap()
}

/// Its startup, on a thread of its own.
async fn start(mut frontend: FakeFrontend) -> (FakeFrontend, Result<usize, FrontendError>) {
    tokio::task::spawn_blocking(move || {
        let result = frontend.startup(PATIENCE).map(|seen| seen.len());
        (frontend, result)
    })
    .await
    .unwrap()
}

/// Pumps the first API server until it has heard ENGINE_CORE_DEAD.
async fn hears_of_death(mut frontend: FakeFrontend) -> bool {
    tokio::task::spawn_blocking(move || {
        matches!(frontend.server().pump_for(PATIENCE), Err(FrontendError::EngineDead { .. }))
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_frontends_with_three_api_servers_attach_and_a_removed_one_fails_fast() {
    let fixture = fixture(2, GroupKind::Independent, 4);
    let one = frontend(options(2));
    let two = frontend(FrontendOptions { api_servers: 2, ..options(2) });
    let addresses = [one.host_port().to_owned(), two.host_port().to_owned()];
    fixture.add(&addresses[0]).await;
    fixture.add(&addresses[1]).await;
    let ((one, first), (two, second)) = tokio::join!(start(one), start(two));
    assert_eq!((first.unwrap(), second.unwrap()), (2, 2));
    for (frontend, address) in [(&one, &addresses[0]), (&two, &addresses[1])] {
        let shown = fixture.until(address, "attached", &[]).await;
        assert_eq!(shown.api_servers as usize, frontend.servers.len());
        assert_eq!((shown.detail, shown.attachments), (None, 1));
        let stats = &frontend.coordinator.as_ref().unwrap().addresses().front;
        for server in &frontend.servers {
            for rank in 0..2 {
                let ready = &server.registrations()[&rank];
                let address =
                    ready.as_map().unwrap().iter().find(|(key, _)| key.as_str() == Some("dp_stats_address"));
                assert_eq!(address.unwrap().1.as_str(), Some(stats.as_str()));
            }
        }
    }
    let error = fixture.ask(|reply| AttachmentCommand::Add { address: addresses[0].clone(), reply });
    assert!(error.await.unwrap_err().to_string().contains("already"));

    fixture.remove(&addresses[0]).await.unwrap();
    assert!(hears_of_death(one).await);
    let left = fixture.handle.snapshot.borrow().clone();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].state, "attached");
    assert_eq!(fixture.seen.lock().closed.len(), 2);
    let error = fixture.remove(&addresses[0]).await.unwrap_err().to_string();
    assert!(error.contains(&addresses[1]), "{error}");
    fixture.shut_down().await;
    assert!(hears_of_death(two).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waves_and_stats_pass_between_the_engines_and_the_frontends_coordinator() {
    let fixture = fixture(2, GroupKind::Lockstep, 1);
    let moe = frontend(FrontendOptions { moe: true, ..options(2) });
    let address = moe.host_port().to_owned();
    fixture.add(&address).await;
    let (mut moe, started) = start(moe).await;
    started.unwrap();
    let shown = fixture.until(&address, "attached", &[]).await;
    let id = FrontendId(shown.id.unwrap());

    // Two ranks hear START_DP_WAVE; the coordinator task hears it once.
    moe = tokio::task::spawn_blocking(move || {
        moe.server().first_request(0).unwrap();
        moe
    })
    .await
    .unwrap();
    wait_for("START_DP_WAVE", || !fixture.seen.lock().waves.is_empty()).await;

    // wave_complete(0) of rank 1.
    let mut outputs = vec![Value::Nil; 9];
    outputs[0] = 1.into();
    outputs[1] = Value::Array(Vec::new());
    outputs[3] = Value::F64(1.0);
    outputs[6] = 0.into();
    let sink = fixture.seen.lock().sinks[&id].clone();
    sink.send(ForFrontendCoordinator { rank: EngineIndex(1), frame: encode(&Value::Array(outputs)) })
        .await
        .unwrap();
    let coordinator = moe.coordinator.as_ref().unwrap();
    wait_for("the next wave", || coordinator.state().wave == 1).await;
    assert_eq!(coordinator.state().died, None);
    assert_eq!(fixture.seen.lock().waves, [0]);
    drop(moe);
    wait_for("RemoveFrontend", || fixture.seen.lock().removed.contains(&id)).await;
    fixture.shut_down().await;
}

async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let waited = timeout(PATIENCE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what} did not come");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_frontend_is_attached_again_when_it_comes_back() {
    let fixture = fixture(2, GroupKind::Independent, 2);
    let first = frontend(options(2));
    let (address, host_port) = (first.address().to_owned(), first.host_port().to_owned());
    fixture.add(&host_port).await;
    // Killed before its engines came: nobody has run its startup.
    fixture.until(&host_port, "handshake", &[]).await;
    drop(first);
    fixture.until(&host_port, "waiting", &[]).await;
    for life in 1..3 {
        let (frontend, started) =
            start(frontend(FrontendOptions { address: address.clone(), ..options(2) })).await;
        assert_eq!(started.unwrap(), 2, "life {life}");
        let shown = fixture.until(&host_port, "attached", &[]).await;
        assert_eq!(shown.attachments, life);
        drop(frontend);
        fixture.until(&host_port, "waiting", &["nobody accepts"]).await;
        wait_for("the routes to be closed", || fixture.seen.lock().closed.len() as u64 == life * 2).await;
    }
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frontend_waits_for_the_deployment_and_is_told_what_is_missing() {
    let fixture = fixture(2, GroupKind::Independent, 2);
    fixture.deployment.send_replace(deployment(2, GroupKind::Independent, 1));
    let frontend = frontend(options(2));
    let address = frontend.host_port().to_owned();
    fixture.add(&address).await;
    fixture.until(&address, "waiting", &["waiting for ranks 1"]).await;
    fixture.deployment.send_replace(deployment(2, GroupKind::Independent, 2));
    start(frontend).await.1.unwrap();
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frontends_of_another_size_are_refused_by_name_and_the_others_go_on() {
    let fixture = fixture(2, GroupKind::Independent, 8);
    let fits = frontend(options(2));
    let large = frontend(options(3));
    let small = frontend(options(1));
    let addresses: Vec<String> =
        [&fits, &large, &small].map(|frontend| frontend.host_port().to_owned()).to_vec();
    for address in &addresses {
        fixture.add(address).await;
    }
    let small = tokio::spawn(start(small));
    let large = tokio::spawn(async move {
        let mut large = large;
        tokio::task::spawn_blocking(move || {
            let result = large.startup(Duration::from_secs(3));
            (large, result.is_err())
        })
        .await
        .unwrap()
    });
    let (fits, started) = start(fits).await;
    assert_eq!(started.unwrap(), 2);
    fixture.until(&addresses[0], "attached", &[]).await;
    fixture.until(&addresses[1], "refused", &["--data-parallel-size is probably larger than 2"]).await;
    let (small, result) = small.await.unwrap();
    assert!(matches!(result, Err(FrontendError::UnknownIdentity(_))));
    drop(small);
    fixture.until(&addresses[2], "refused", &["--data-parallel-size 1 while this deployment has 2"]).await;
    let (large, failed) = large.await.unwrap();
    assert!(failed);
    fixture.until(&addresses[0], "attached", &[]).await;
    drop((fits, large));
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_parallel_flags_and_other_models_are_refused_with_both_sides_named() {
    let fixture = fixture(2, GroupKind::Lockstep, 8);
    let moe = |size, hash: &str| FrontendOptions {
        moe: true,
        parallel_config_hash: hash.to_owned(),
        ..options(size)
    };
    let flags = frontend(moe(2, "other"));
    let size = frontend(moe(4, "fake-parallel-config"));
    let dense = frontend(options(2));
    let addresses: Vec<String> =
        [&flags, &size, &dense].map(|frontend| frontend.host_port().to_owned()).to_vec();
    for address in &addresses {
        fixture.add(address).await;
    }
    let refused = tokio::spawn(start(flags));
    let others: Vec<_> = [size, dense]
        .into_iter()
        .map(|mut frontend| {
            tokio::task::spawn_blocking(move || {
                let _ = frontend.startup(Duration::from_secs(3));
                frontend
            })
        })
        .collect();
    fixture.until(&addresses[1], "refused", &["--data-parallel-size 4", "this deployment has 2"]).await;
    fixture.until(&addresses[2], "refused", &["does it serve another model"]).await;
    let (flags, result) = refused.await.unwrap();
    assert!(matches!(result, Err(FrontendError::HashMismatch { .. })));
    drop(flags);
    fixture.until(&addresses[0], "refused", &["right after READY", "fake-parallel-config"]).await;
    for other in others {
        other.await.unwrap();
    }
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frontend_without_free_slots_waits_for_them_without_a_second_hello() {
    let fixture = fixture(1, GroupKind::Independent, 2);
    let many = frontend(FrontendOptions { api_servers: 3, ..options(1) });
    let address = many.host_port().to_owned();
    fixture.add(&address).await;
    let started = tokio::spawn(start(many));
    fixture.until(&address, "refused", &["3 API servers", "2 slots are free", "--frontend-slots"]).await;
    assert!(fixture.seen.lock().opened.is_empty());
    fixture.slots[0].send_modify(|snapshot| snapshot.slots = (0, 0, 3));
    let (many, started) = started.await.unwrap();
    started.unwrap();
    fixture.until(&address, "attached", &[]).await;
    drop(many);
    fixture.shut_down().await;
}

// === Against vLLM's own startup code ===

/// `scripts/frontend_reference.py`, in a process group of its own.
struct Reference {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Reference {
    /// `None` without an interpreter that has vLLM.
    fn start(port: u16, arguments: &[&str]) -> Option<Self> {
        let Some(python) = std::env::var_os("DP_SIDECAR_PYTHON") else {
            eprintln!("skipped: DP_SIDECAR_PYTHON is not set, see scripts/vllm_env.py");
            return None;
        };
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/frontend_reference.py");
        let mut child = Command::new(python)
            .arg(script)
            .args(["--port", &port.to_string()])
            .args(arguments)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Some(Self { child, lines })
    }

    /// The next event of this name; those before it are dropped.
    async fn event(&mut self, name: &str) -> serde_json::Value {
        let wanted = async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                // vLLM's own log lines go there, too.
                let Ok(event) = serde_json::from_str::<serde_json::Value>(&line) else {
                    continue;
                };
                if event["event"] == name {
                    return event;
                }
                assert_ne!(event["event"], "failed", "{event}");
            }
            panic!("the frontend ended without {name}");
        };
        let waited = timeout(PATIENCE, wanted).await;
        waited.unwrap_or_else(|_| panic!("no {name}"))
    }
}

impl Drop for Reference {
    /// SIGKILL to the frontend and its DP coordinator.
    fn drop(&mut self) {
        if let Some(pid) = self.child.id() {
            let group = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
            let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        }
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_startup_code_of_vllm_accepts_the_virtual_engines_again_and_again() {
    let port = free_port();
    let arguments = ["--api-servers", "2"];
    let Some(mut vllm) = Reference::start(port, &arguments) else {
        return;
    };
    let fixture = fixture(2, GroupKind::Independent, 2);
    let address = format!("127.0.0.1:{port}");
    fixture.add(&address).await;
    for life in 1..3 {
        let stats = vllm.event("listening").await["stats"].clone();
        assert!(stats.is_string());
        for _ in 0..4 {
            assert_eq!(vllm.event("registered").await["stats"], stats);
        }
        vllm.event("started").await;
        let shown = fixture.until(&address, "attached", &[]).await;
        assert_eq!((shown.attachments, shown.api_servers), (life, 2));
        if life == 1 {
            drop(vllm);
            fixture.until(&address, "waiting", &["nobody accepts"]).await;
            vllm = Reference::start(port, &arguments).unwrap();
        }
    }
    fixture.remove(&address).await.unwrap();
    assert_eq!(vllm.event("output").await["text"], "ENGINE_CORE_DEAD");
    fixture.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vllm_checks_the_config_hash_of_moe_engines_and_the_sidecar_says_which() {
    let port = free_port();
    let Some(mut vllm) = Reference::start(port, &["--moe"]) else {
        return;
    };
    let fixture = fixture(2, GroupKind::Lockstep, 2);
    let address = format!("127.0.0.1:{port}");
    fixture.add(&address).await;
    let hash = vllm.event("hash").await["value"].clone();
    let hash = hash.as_str().unwrap();
    let failed = timeout(PATIENCE, async {
        while let Some(line) = vllm.lines.next_line().await.unwrap() {
            if line.contains("Configuration mismatch") {
                return;
            }
        }
        panic!("no mismatch");
    });
    failed.await.unwrap();
    fixture.until(&address, "refused", &["right after READY", "fake-parallel-config"]).await;
    drop(vllm);
    // As if the engines had been started with the frontend's flags.
    let fits = with_hash(2, GroupKind::Lockstep, 2, hash);
    fixture.deployment.send_replace(fits);
    let mut vllm = Reference::start(port, &["--moe"]).unwrap();
    vllm.event("started").await;
    fixture.until(&address, "attached", &[]).await;
    fixture.shut_down().await;
    assert_eq!(vllm.event("output").await["text"], "ENGINE_CORE_DEAD");
}
