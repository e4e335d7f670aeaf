//! A manager of attachments over ranks and a coordinator that are played here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar::api::{CoordinatorSnapshot, FrontendSnapshot};
use dp_sidecar::driver::attachment::{AttachmentConfig, spawn};
use dp_sidecar::driver::handles::{
    AdoptRoute, AttachmentCommand, AttachmentHandle, CloseRoutes, CoordinatorCommand, CoordinatorHandle,
    Deployment, EngineFacts, Envelope, ForFrontendCoordinator, GroupKind, HandleError, OpenRoute, Origin,
    RankAsk, RankHandle, RankSnapshot, RouteLost, Slots, ask, queue,
};
use dp_sidecar::transport::Connected;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Slot};
use dp_sidecar_testkit::Reporter;
use dp_sidecar_testkit::frontend::{FakeFrontend, FrontendError, FrontendOptions};
use parking_lot::Mutex;
use rmpv::Value;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// Real vLLM takes its time to start on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// What the ranks and the coordinator were asked.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) opened: Vec<(u16, u32, FrontendId)>,
    pub(crate) closed: Vec<(u16, FrontendId)>,
    /// Those whose API servers the rank was to tell.
    pub(crate) orphaned: Vec<(u16, FrontendId)>,
    pub(crate) waves: Vec<u64>,
    pub(crate) sinks: BTreeMap<FrontendId, mpsc::Sender<ForFrontendCoordinator>>,
    pub(crate) removed: Vec<FrontendId>,
    /// Who hears of lost routes.
    pub(crate) attachments: Option<mpsc::Sender<AttachmentCommand>>,
}

pub(crate) struct Fixture {
    pub(crate) handle: AttachmentHandle,
    pub(crate) seen: Arc<Mutex<Seen>>,
    pub(crate) deployment: watch::Sender<Deployment>,
    pub(crate) slots: Vec<watch::Sender<RankSnapshot>>,
    pub(crate) state_dir: TempDir,
    pub(crate) handles: Vec<RankHandle>,
    coordinator: CoordinatorHandle,
    tracker: TaskTracker,
    /// Kills the manager and its tasks.
    alive: DropGuard,
    ranks: TaskTracker,
}

pub(crate) fn encode(value: &Value) -> Bytes {
    let mut out = Vec::new();
    rmpv::encode::write_value(&mut out, value).unwrap();
    out.into()
}

/// A ready response with an address that no frontend may see.
pub(crate) fn registration(rank: u16) -> Bytes {
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

pub(crate) fn deployment(size: u16, kind: GroupKind, known: u16) -> Deployment {
    with_hash(size, kind, known, "fake-parallel-config")
}

pub(crate) fn with_hash(size: u16, kind: GroupKind, known: u16, hash: &str) -> Deployment {
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

/// Routes that are open.
type Open = Arc<Mutex<BTreeSet<(FrontendId, u32)>>>;

/// Plays a rank task: connects the routes with its identity and notices when they are lost.
pub(crate) async fn rank(
    index: u16,
    mut commands: mpsc::Receiver<Envelope<RankAsk>>,
    seen: Arc<Mutex<Seen>>,
    tasks: TaskTracker,
) {
    let mut routes: BTreeMap<FrontendId, CancellationToken> = BTreeMap::new();
    let open = Open::default();
    while let Some(Envelope { ask, reply, .. }) = commands.recv().await {
        match ask {
            RankAsk::OpenRoute(route) => {
                seen.lock().opened.push((index, route.api_server, route.frontend));
                let stop = routes.entry(route.frontend).or_default().clone();
                let (key, open, seen) = ((route.frontend, route.api_server), open.clone(), seen.clone());
                let serve = async move {
                    let identity = EngineIndex(index).identity().0;
                    let limit = route.connect_timeout;
                    let dealer = Connected::dealer(&route.input_address, &identity, limit).await;
                    let push = Connected::push(&route.output_address, limit).await;
                    let (Ok(dealer), Ok(_push)) = (dealer, push) else {
                        reply.send::<OpenRoute>(Err(HandleError::failed("no connection")));
                        return;
                    };
                    let (mut outputs, mut inputs) = dealer.split();
                    outputs.send(vec![route.registration.clone()]).await.unwrap();
                    open.lock().insert(key);
                    reply.send::<OpenRoute>(Ok(Slot(1)));
                    while inputs.recv().await.is_ok() {}
                    let lost = RouteLost {
                        frontend: route.frontend,
                        rank: EngineIndex(index),
                        api_server: route.api_server,
                        reason: "closed".to_owned(),
                    };
                    let attachments = seen.lock().attachments.clone();
                    if open.lock().remove(&key)
                        && let Some(attachments) = attachments
                    {
                        let _ = attachments.send(AttachmentCommand::RouteLost(lost)).await;
                    }
                };
                tasks.spawn(stop.run_until_cancelled_owned(serve));
            }
            RankAsk::AdoptRoute(AdoptRoute { frontend, api_server }) => {
                let found = open.lock().contains(&(frontend, api_server)).then_some(Slot(1));
                let found = found.ok_or_else(|| HandleError::failed("there is no such route"));
                reply.send::<AdoptRoute>(found);
            }
            RankAsk::CloseRoutes(CloseRoutes { frontend, orphaned }) => {
                open.lock().retain(|(of, _)| *of != frontend);
                if let Some(stop) = routes.remove(&frontend) {
                    stop.cancel();
                }
                seen.lock().closed.push((index, frontend));
                if orphaned {
                    seen.lock().orphaned.push((index, frontend));
                }
                reply.send::<CloseRoutes>(Ok(()));
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    routes.values().for_each(CancellationToken::cancel);
}

pub(crate) async fn coordinator(mut commands: mpsc::Receiver<CoordinatorCommand>, seen: Arc<Mutex<Seen>>) {
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

pub(crate) fn fixture(size: u16, kind: GroupKind, slots: u32) -> Fixture {
    let tracker = TaskTracker::new();
    let ranks = TaskTracker::new();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let mut handles = Vec::new();
    let mut snapshots = Vec::new();
    for index in 0..size {
        let (commands, inbox) = queue("rank");
        let slots = Slots { all: slots, ..Slots::default() };
        let (sender, snapshot) = watch::channel(RankSnapshot { slots, ..RankSnapshot::default() });
        ranks.spawn(rank(index, inbox, seen.clone(), ranks.clone()));
        snapshots.push(sender);
        handles.push(RankHandle { rank: EngineIndex(index), commands, snapshot });
    }
    let (commands, inbox) = mpsc::channel(64);
    ranks.spawn(coordinator(inbox, seen.clone()));
    let (_, snapshot) = watch::channel(CoordinatorSnapshot::default());
    let (deployment, known) = watch::channel(deployment(size, kind, size));
    let state_dir = tempfile::tempdir().unwrap();
    let coordinator = CoordinatorHandle { commands, snapshot };
    let config = settings(&state_dir);
    let (handle, alive) = manage(config, &tracker, handles.clone(), coordinator.clone(), known);
    seen.lock().attachments = Some(handle.commands.clone());
    let slots = snapshots;
    Fixture { handle, seen, deployment, slots, state_dir, handles, coordinator, tracker, alive, ranks }
}

/// Starts the manager on a runtime of its own, so that it can be killed with all of its tasks.
fn manage(
    config: AttachmentConfig,
    tracker: &TaskTracker,
    handles: Vec<RankHandle>,
    coordinator: CoordinatorHandle,
    deployment: watch::Receiver<Deployment>,
) -> (AttachmentHandle, DropGuard) {
    let (started, starting) = std::sync::mpsc::channel();
    let (tracker, killed) = (tracker.clone(), CancellationToken::new());
    let alive = killed.clone().drop_guard();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            started.send(spawn(config, &tracker, handles, coordinator, deployment)).unwrap();
            killed.cancelled().await;
        });
    });
    (starting.recv().unwrap(), alive)
}

fn settings(state_dir: &TempDir) -> AttachmentConfig {
    let stall = Duration::from_millis(800);
    AttachmentConfig { stall, state_dir: Some(state_dir.path().to_owned()), ..AttachmentConfig::default() }
}

impl Fixture {
    pub(crate) async fn ask(
        &self,
        command: impl FnOnce(tokio::sync::oneshot::Sender<Result<(), HandleError>>) -> AttachmentCommand,
    ) -> Result<(), HandleError> {
        let commands = &self.handle.commands;
        ask(commands, "attachment", "test".to_owned(), PATIENCE, command).await
    }

    pub(crate) async fn add(&self, address: &str) {
        let address = address.to_owned();
        self.ask(|reply| AttachmentCommand::Add { address, origin: Origin::Command, reply }).await.unwrap();
    }

    pub(crate) async fn remove(&self, address: &str) -> Result<(), HandleError> {
        let address = address.to_owned();
        self.ask(|reply| AttachmentCommand::Remove { address, reply }).await
    }

    /// Waits until the frontend is in a state, with a detail that has all these parts.
    pub(crate) async fn until(&self, address: &str, state: &str, parts: &[&str]) -> FrontendSnapshot {
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

    /// The manager and its tasks end as if they were killed; a successor starts.
    pub(crate) async fn restart(&mut self) {
        let before = std::mem::replace(&mut self.tracker, TaskTracker::new());
        let known = self.deployment.subscribe();
        let config = settings(&self.state_dir);
        let (handles, coordinator) = (self.handles.clone(), self.coordinator.clone());
        std::mem::replace(&mut self.alive, CancellationToken::new().drop_guard()).disarm().cancel();
        before.close();
        timeout(PATIENCE, before.wait()).await.unwrap();
        (self.handle, self.alive) = manage(config, &self.tracker, handles, coordinator, known);
        self.seen.lock().attachments = Some(self.handle.commands.clone());
    }

    pub(crate) async fn shut_down(self) {
        self.ask(|reply| AttachmentCommand::Shutdown { reply }).await.unwrap();
        self.tracker.close();
        timeout(PATIENCE, self.tracker.wait()).await.unwrap();
        let Self { handle, handles, coordinator, ranks, .. } = self;
        drop((handle, handles, coordinator));
        ranks.close();
        timeout(PATIENCE, ranks.wait()).await.unwrap();
    }
}

pub(crate) fn options(size: u16) -> FrontendOptions {
    FrontendOptions { size, ..FrontendOptions::default() }
}

pub(crate) fn frontend(options: FrontendOptions) -> FakeFrontend {
    FakeFrontend::bind(options, Reporter::quiet()).unwrap()
}

/// Its startup, on a thread of its own.
pub(crate) async fn start(mut frontend: FakeFrontend) -> (FakeFrontend, Result<usize, FrontendError>) {
    tokio::task::spawn_blocking(move || {
        let result = frontend.startup(PATIENCE).map(|seen| seen.len());
        (frontend, result)
    })
    .await
    .unwrap()
}

/// Pumps the first API server until it has heard ENGINE_CORE_DEAD.
pub(crate) async fn hears_of_death(mut frontend: FakeFrontend) -> bool {
    tokio::task::spawn_blocking(move || {
        matches!(frontend.server().pump_for(PATIENCE), Err(FrontendError::EngineDead { .. }))
    })
    .await
    .unwrap()
}

pub(crate) async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let waited = timeout(PATIENCE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what} did not come");
}
