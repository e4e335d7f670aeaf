//! The coordinator task with engines' sockets over libzmq.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar::api::CoordinatorSnapshot;
use dp_sidecar::driver::coordinator::{EVENTS, spawn};
use dp_sidecar::driver::edge::{self, EdgeState};
use dp_sidecar::driver::handles::{
    CoordinatorCommand, CoordinatorHandle, EdgeHandle, EdgePrepare, ForFrontendCoordinator, GroupKind, ask,
};
use dp_sidecar::transport::PrivateDir;
use dp_sidecar_protocol::layout::{Layout, VllmVersion};
use dp_sidecar_protocol::machine::coordinator::Adopted;
use dp_sidecar_protocol::output::{OutputsView, start_wave_message, stats_message, wave_complete_message};
use dp_sidecar_protocol::stats::{Load, SchedulerStats};
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Wave};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

const PATIENCE: Duration = Duration::from_secs(10);
/// Long enough for a message that must not come to have come.
const SILENCE_MS: i32 = 100;

fn layout() -> Layout {
    Layout::for_version(VllmVersion::new(0, 32, 0)).unwrap()
}

struct Setup {
    handle: CoordinatorHandle,
    edge: EdgeHandle,
    context: zmq::Context,
    tracker: TaskTracker,
    dir: TempDir,
}

impl Setup {
    fn new(kind: GroupKind, size: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let private = PrivateDir::create(dir.path().join("ipc")).unwrap();
        let tracker = TaskTracker::new();
        let (reports, events) = mpsc::channel(EVENTS);
        let edge = edge::spawn(private, reports, &tracker);
        let edges = vec![((0..size).map(EngineIndex).collect(), edge.handle.clone())];
        let handle = spawn(kind, size, edges, events, &tracker);
        Self { handle, edge: edge.handle, context: zmq::Context::new(), tracker, dir }
    }

    async fn tell(&self, command: CoordinatorCommand) {
        self.handle.commands.send(command).await.unwrap();
    }

    async fn prepare(&self, rank: u16, life: u64) -> (String, String) {
        let (rank, incarnation) = (EngineIndex(rank), Incarnation(life));
        self.edge.ask_within(PATIENCE, EdgePrepare { rank, incarnation }).await.unwrap()
    }

    async fn engine(&self, rank: u16, life: u64) -> Engine {
        let addresses = self.prepare(rank, life).await;
        self.connect(&addresses)
    }

    fn connect(&self, (input, output): &(String, String)) -> Engine {
        let subscriber = self.context.socket(zmq::XSUB).unwrap();
        let push = self.context.socket(zmq::PUSH).unwrap();
        for socket in [&subscriber, &push] {
            socket.set_linger(0).unwrap();
        }
        subscriber.connect(input).unwrap();
        subscriber.send("\x01", 0).unwrap();
        push.connect(output).unwrap();
        Engine { subscriber, push }
    }

    async fn attach(&self, frontend: u64, queue: usize) -> mpsc::Receiver<ForFrontendCoordinator> {
        let (sink, messages) = mpsc::channel(queue);
        let frontend = FrontendId(frontend);
        self.tell(CoordinatorCommand::AddFrontend { frontend, sink }).await;
        messages
    }

    async fn until(&self, what: &str, condition: impl Fn(&CoordinatorSnapshot) -> bool) {
        let mut snapshot = self.handle.snapshot.clone();
        let waited = timeout(PATIENCE, snapshot.wait_for(|now| condition(now))).await;
        assert!(waited.is_ok(), "{what} did not happen: {:?}", self.handle.snapshot.borrow());
    }

    async fn end(self) {
        let asked = ask(&self.handle.commands, "coordinator", "shutdown".to_owned(), PATIENCE, |reply| {
            CoordinatorCommand::Shutdown { reply }
        });
        asked.await.unwrap();
        drop(self.edge);
        self.tracker.close();
        timeout(PATIENCE, self.tracker.wait()).await.unwrap();
    }
}

struct Engine {
    subscriber: zmq::Socket,
    push: zmq::Socket,
}

impl Engine {
    /// What is published next, or `None` after a while. Reading blocks, so it has a thread.
    async fn next_within(&self, ms: i32) -> Option<Vec<Vec<u8>>> {
        tokio::task::block_in_place(|| {
            self.subscriber.set_rcvtimeo(ms).unwrap();
            self.subscriber.recv_multipart(0).ok()
        })
    }

    async fn next(&self) -> Vec<Vec<u8>> {
        self.next_within(10_000).await.expect("nothing published")
    }

    fn report(&self, frame: &Bytes) {
        self.push.send(&frame[..], 0).unwrap();
    }
}

fn start_dp_wave(wave: u8, exclude: Option<u8>) -> Vec<Vec<u8>> {
    vec![vec![2], vec![0x92, wave, exclude.unwrap_or(0xc0)]]
}

fn load(waiting: u64, step: u64) -> Bytes {
    let stats = SchedulerStats {
        load: Load { waiting, ..Load::default() },
        step_counter: step,
        ..SchedulerStats::default()
    };
    stats_message(&layout(), EngineIndex(0), stats.encode(), 0.0)
}

/// What a frontend's DP coordinator is told, in words.
async fn told(messages: &mut mpsc::Receiver<ForFrontendCoordinator>) -> String {
    let message = timeout(PATIENCE, messages.recv()).await.unwrap().unwrap();
    let view = OutputsView::parse(&message.frame).unwrap();
    assert_eq!(view.engine_index, message.rank);
    let stats = view.stats().map(|stats| stats.unwrap());
    let what = match (stats, view.wave_complete, view.start_wave) {
        (Some(stats), None, None) => format!("waiting {}", stats.load.waiting),
        (None, Some(wave), None) => format!("wave complete {wave}"),
        (None, None, Some(wave)) => format!("start wave {wave}"),
        other => panic!("{other:?}"),
    };
    format!("rank {}: {what}", message.rank)
}

async fn all_told(messages: &mut mpsc::Receiver<ForFrontendCoordinator>, last: &str) -> Vec<String> {
    let mut all = Vec::new();
    while all.last().is_none_or(|told| told != last) {
        all.push(told(messages).await);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_comes_when_all_have_subscribed_and_a_request_wakes_all() {
    let setup = Setup::new(GroupKind::Lockstep, 2);
    let zero = setup.engine(0, 1).await;
    setup.until("one subscription", |s| s.subscribed == 1).await;
    assert_eq!(zero.next_within(SILENCE_MS).await, None, "READY too early");
    let one = setup.engine(1, 1).await;
    for engine in [&zero, &one] {
        assert_eq!(engine.next().await, [b"READY"]);
    }

    let rank = EngineIndex(1);
    setup.tell(CoordinatorCommand::Wake { rank }).await;
    for engine in [&zero, &one] {
        assert_eq!(engine.next().await, start_dp_wave(0, None));
    }
    zero.report(&start_wave_message(&layout(), EngineIndex(0), Wave(0), 0.0));
    setup.until("running", |s| s.running).await;
    for engine in [&zero, &one] {
        assert_eq!(engine.next().await, start_dp_wave(0, Some(0)));
    }
    setup.tell(CoordinatorCommand::Wake { rank }).await;
    // Commands keep their order, reports of engines have none with them: the answer to a repeated preparation says that
    // the wake was handled while the wave ran.
    setup.prepare(1, 1).await;
    zero.report(&wave_complete_message(&layout(), EngineIndex(0), Wave(0), 0.0));
    setup.until("the end of the wave", |s| !s.running && s.wave == Wave(1)).await;
    assert_eq!(one.next_within(SILENCE_MS).await, None, "woken though it ran");
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_is_started_again_goes_on_with_the_wave_the_frontends_know() {
    let setup = Setup::new(GroupKind::Lockstep, 2);
    let mut frontend = setup.attach(1, 64).await;
    let zero = setup.engine(0, 1).await;
    let _one = setup.engine(1, 1).await;
    assert_eq!(zero.next().await, [b"READY"]);
    for rank in [EngineIndex(0), EngineIndex(1)] {
        setup.tell(CoordinatorCommand::Admitted { rank }).await;
    }
    setup.until("in step", |s| s.in_step).await;
    let steer_away = ["rank 0: waiting 100000", "rank 1: waiting 100000"];
    let mut expected: Vec<&str> = steer_away.to_vec();
    expected.extend(["rank 0: waiting 0", "rank 1: waiting 0"]);
    assert_eq!(all_told(&mut frontend, "rank 1: waiting 0").await, expected);

    for rank in [EngineIndex(0), EngineIndex(1)] {
        let incarnation = Incarnation(1);
        setup.tell(CoordinatorCommand::EngineDown { rank, incarnation }).await;
    }
    let mut expected: Vec<&str> = steer_away.to_vec();
    expected.push("rank 0: wave complete 0");
    let told = all_told(&mut frontend, "rank 0: wave complete 0").await;
    assert_eq!(told, expected);

    let zero = setup.engine(0, 2).await;
    assert!(!setup.handle.snapshot.borrow().in_step);
    let one = setup.engine(1, 2).await;
    for engine in [&zero, &one] {
        assert_eq!(engine.next().await, [b"READY"]);
        assert_eq!(engine.next().await, start_dp_wave(1, None));
    }
    zero.report(&wave_complete_message(&layout(), EngineIndex(0), Wave(1), 0.0));
    setup.until("in step", |s| s.in_step && s.wave == Wave(2)).await;
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frontend_that_does_not_read_gets_the_newest_and_delays_nobody() {
    let setup = Setup::new(GroupKind::Independent, 1);
    let engine = setup.engine(0, 1).await;
    assert_eq!(engine.next().await, [b"READY"]);
    let rank = EngineIndex(0);
    setup.tell(CoordinatorCommand::Admitted { rank }).await;
    let mut slow = setup.attach(1, 1).await;
    let mut quick = setup.attach(2, 8).await;
    for step in 1..=500 {
        engine.report(&load(step, step));
        let last = format!("rank 0: waiting {step}");
        all_told(&mut quick, &last).await;
    }
    let slow = all_told(&mut slow, "rank 0: waiting 500").await;
    assert!(slow.len() <= 3, "it was sent {slow:?}");
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_does_not_read_delays_nobody() {
    let setup = Setup::new(GroupKind::Lockstep, 2);
    let zero = setup.engine(0, 1).await;
    // Rank 1 speaks just enough ZMTP to subscribe, and never reads again.
    let (input, _output) = setup.prepare(1, 1).await;
    let stuck = tokio::task::block_in_place(|| subscribe_and_stop(&input));
    assert_eq!(zero.next().await, [b"READY"]);
    let rank = EngineIndex(0);
    for wave in 0..3000 {
        setup.tell(CoordinatorCommand::Wake { rank }).await;
        let frames = zero.next().await;
        let mut payload = &frames[1][..];
        let payload = rmpv::decode::read_value(&mut payload).unwrap();
        assert_eq!(payload[0].as_u64(), Some(wave), "{payload}");
        zero.report(&wave_complete_message(&layout(), rank, Wave(wave), 0.0));
        setup.until("the end of a wave", |s| s.wave > Wave(wave)).await;
    }
    drop(stuck);
    setup.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_goes_on_with_the_wave_and_wakes_the_group() {
    let mut setup = Setup::new(GroupKind::Lockstep, 2);
    // The edge of a node whose sidecar is away.
    let private = PrivateDir::create(setup.dir.path().join("away")).unwrap();
    let (reports, mut events) = mpsc::channel(1);
    let mut edge = edge::spawn(private, reports, &setup.tracker);
    let mut engines = Vec::new();
    for rank in [EngineIndex(0), EngineIndex(1)] {
        let prepare = EdgePrepare { rank, incarnation: Incarnation(1) };
        let addresses = edge.handle.ask_within(PATIENCE, prepare).await.unwrap();
        engines.push(setup.connect(&addresses));
    }
    engines[0].report(&wave_complete_message(&layout(), EngineIndex(0), Wave(41), 0.0));
    let heard = |state: &EdgeState| state.subscribed.len() == 2 && state.wave == Some((Wave(42), false));
    let state = timeout(PATIENCE, edge.state.wait_for(heard)).await.unwrap().unwrap().clone();
    // What had left the edge is lost.
    assert!(timeout(PATIENCE, events.recv()).await.unwrap().is_some());

    let ranks: Vec<EngineIndex> = state.subscribed.keys().copied().collect();
    let edges = vec![(ranks.clone(), edge.handle.clone())];
    setup.handle = spawn(GroupKind::Lockstep, 2, edges, events, &setup.tracker);
    let adopted = |rank| Adopted { rank, incarnation: Incarnation(1), ready: true, admitted: true };
    let adopted: Vec<Adopted> = ranks.into_iter().map(adopted).collect();
    setup.tell(CoordinatorCommand::Adopt { wave: state.wave, engines: adopted }).await;
    setup.until("the adoption", |s| s.wave == Wave(42) && s.subscribed == 2 && s.in_step).await;
    for engine in &engines {
        let mut published = engine.next().await;
        // Its subscription may come a second time, out of the edge's queue.
        if published == [b"READY"] {
            published = engine.next().await;
        }
        assert_eq!(published, start_dp_wave(42, None), "not woken in the group's wave");
    }
    engines[0].report(&wave_complete_message(&layout(), EngineIndex(0), Wave(42), 0.0));
    setup.until("the end of the wave", |s| s.wave == Wave(43) && !s.running).await;
    drop(edge);
    setup.end().await;
}

fn subscribe_and_stop(address: &str) -> UnixStream {
    let mut stream = UnixStream::connect(address.strip_prefix("ipc://").unwrap()).unwrap();
    let mut greeting = vec![0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0x7f, 3, 0];
    greeting.extend_from_slice(b"NULL");
    greeting.resize(64, 0);
    stream.write_all(&greeting).unwrap();
    let mut body = b"\x05READY\x0bSocket-Type\0\0\0\x04XSUB".to_vec();
    body.insert(0, u8::try_from(body.len()).unwrap());
    body.insert(0, 4);
    stream.write_all(&body).unwrap();
    let mut answer = [0; 64];
    stream.read_exact(&mut answer).unwrap();
    stream.write_all(&[0, 1, 1]).unwrap();
    stream
}
