//! The rank task between an engine and frontends of libzmq, at the socket level.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod sizes;

use std::time::{Duration, Instant};

use bytes::Bytes;
use dp_sidecar::driver::handles::{
    Admission, Admit, AdoptRoute, Call, EngineFacts, EngineReady, GroupKind, HeldCall, NodeEvent, OpenRoute,
    Prepare, RankEvent, RankHandle, Release, RouteLost, SlotAddresses, Verdict,
};
use dp_sidecar::driver::rank::{self, RankConfig};
use dp_sidecar::transport::PrivateDir;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::machine::virtual_engine::Limits;
use dp_sidecar_protocol::output::{EngineOutput, FinishReason, NewOutput, NewOutputs};
use dp_sidecar_protocol::request::{FrontendMessage, NewRequest, check_frontend_message, encode_abort};
use dp_sidecar_protocol::utility::{UtilityCall, UtilityOutput};
use dp_sidecar_protocol::{CallId, ClientIndex, EngineIndex, Frames, FrontendId, Incarnation, Slot, Wave};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const LIMIT: Duration = Duration::from_secs(5);
const RANK: EngineIndex = EngineIndex(1);
const SLOTS: u32 = 2;

struct Bed {
    handle: RankHandle,
    events: mpsc::Receiver<RankEvent>,
    held: mpsc::Receiver<HeldCall>,
    wake: mpsc::Receiver<EngineIndex>,
    lost: mpsc::Receiver<RouteLost>,
    tracker: TaskTracker,
    stop: CancellationToken,
    context: zmq::Context,
    incarnation: u64,
    _base: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut RankConfig)) -> Self {
        let base = tempfile::tempdir().unwrap();
        let dir = PrivateDir::create(base.path().join("z")).unwrap();
        let tracker = TaskTracker::new();
        let (events_in, events) = mpsc::channel(8);
        let (held_in, held) = mpsc::channel(8);
        let (wake_in, wake) = mpsc::channel(8);
        let mut config = RankConfig::new(RANK, SLOTS, Limits::default(), GroupKind::Lockstep, dir);
        change(&mut config);
        let (lost_in, lost) = mpsc::channel(8);
        let (reports, mut reported) = mpsc::channel(8);
        let stop = config.stop.clone();
        tokio::spawn(async move {
            while let Some(event) = reported.recv().await {
                match event {
                    NodeEvent::Rank(event) => drop(events_in.send(event).await),
                    NodeEvent::Held(call) => drop(held_in.send(call).await),
                    NodeEvent::RouteLost(loss) => drop(lost_in.send(loss).await),
                    NodeEvent::Wake(rank) => drop(wake_in.try_send(rank)),
                    other => panic!("not of a rank: {other:?}"),
                }
            }
        });
        Self {
            handle: rank::spawn(config, &tracker, reports),
            events,
            held,
            wake,
            lost,
            tracker,
            stop,
            context: zmq::Context::new(),
            incarnation: 0,
            _base: base,
        }
    }

    async fn event(&mut self) -> RankEvent {
        let event = tokio::time::timeout(LIMIT, self.events.recv()).await;
        event.unwrap().unwrap()
    }

    async fn start_engine(&mut self) -> Engine {
        self.incarnation += 1;
        let incarnation = Incarnation(self.incarnation);
        let addresses: SlotAddresses = self.handle.ask_within(LIMIT, Prepare { incarnation }).await.unwrap();
        let engine = Engine::connect(&self.context, &addresses);
        let RankEvent::Registered { frame, .. } = self.event().await else {
            panic!("no registration");
        };
        assert_eq!(frame, Bytes::from_static(b"\x80"));
        let facts = Box::new(EngineFacts::of(Layout::newest()));
        self.handle.commands.tell(EngineReady { incarnation, facts }).await.unwrap();
        self.handle.commands.tell(Admit { incarnation }).await.unwrap();
        engine
    }

    async fn attach(&mut self, id: u64) -> Frontend {
        let frontend = Frontend::bind(&self.context);
        let slot = self.open(&frontend, id).await.unwrap();
        assert_eq!(frontend.recv_input(), vec![RANK.identity().0.to_vec(), b"ready".to_vec()]);
        Frontend { slot, ..frontend }
    }

    async fn open(
        &mut self,
        frontend: &Frontend,
        id: u64,
    ) -> Result<Slot, dp_sidecar::driver::handles::HandleError> {
        let route = OpenRoute {
            frontend: FrontendId(id),
            api_server: 0,
            input_address: frontend.input_address.clone(),
            output_address: frontend.output_address.clone(),
            registration: Bytes::from_static(b"ready"),
            connect_timeout: LIMIT,
        };
        self.handle.ask_within(LIMIT, route).await
    }

    async fn admission(&self, open: bool) {
        self.handle.ask_within(LIMIT, Admission { open }).await.unwrap();
    }

    async fn until(&mut self, what: impl Fn(&dp_sidecar::driver::handles::RankSnapshot) -> bool) {
        let waiting = self.handle.snapshot.wait_for(what);
        tokio::time::timeout(LIMIT, waiting).await.unwrap().unwrap();
    }

    async fn stop(self) {
        self.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(LIMIT, self.tracker.wait()).await.unwrap();
    }
}

fn socket(context: &zmq::Context, kind: zmq::SocketType) -> zmq::Socket {
    let socket = context.socket(kind).unwrap();
    socket.set_linger(1000).unwrap();
    socket.set_rcvtimeo(5000).unwrap();
    socket
}

struct Engine {
    inputs: Vec<zmq::Socket>,
    outputs: Vec<zmq::Socket>,
}

impl Engine {
    fn connect(context: &zmq::Context, addresses: &SlotAddresses) -> Self {
        let inputs = addresses.inputs.iter().map(|address| {
            let input = socket(context, zmq::DEALER);
            input.set_identity(&RANK.identity().0).unwrap();
            input.connect(address).unwrap();
            input.send(&b"\x80"[..], 0).unwrap();
            input
        });
        let outputs = addresses.outputs.iter().map(|address| {
            let output = socket(context, zmq::PUSH);
            output.connect(address).unwrap();
            output
        });
        Self { inputs: inputs.collect(), outputs: outputs.collect() }
    }

    fn recv(&self, slot: Slot) -> Frames {
        let parts = self.inputs[slot.0 as usize].recv_multipart(0).unwrap();
        parts.into_iter().map(Bytes::from).collect()
    }

    fn expect_add(&self, slot: Slot, id: &str) {
        let frames = self.recv(slot);
        let layout = Layout::newest();
        match check_frontend_message(&layout, &frames) {
            Ok(FrontendMessage::Add(add)) => {
                assert_eq!(add.request_id, id);
                assert_eq!(add.client_index, ClientIndex(slot.0));
            }
            other => panic!("expected ADD of {id}, got {other:?}"),
        }
    }

    /// The next message must be a call; its id.
    fn expect_call(&self, slot: Slot, method: &str) -> CallId {
        let frames = self.recv(slot);
        match check_frontend_message(&Layout::newest(), &frames) {
            Ok(FrontendMessage::Utility(call)) => {
                assert_eq!(call.method, method);
                assert_eq!(call.client_index, ClientIndex(slot.0));
                call.call_id
            }
            other => panic!("expected {method}, got {other:?}"),
        }
    }

    fn is_silent(&self, slot: Slot) -> bool {
        let poll = self.inputs[slot.0 as usize].poll(zmq::POLLIN, 100);
        poll.unwrap() == 0
    }

    fn send(&self, slot: Slot, outputs: NewOutputs) {
        let outputs = NewOutputs { engine_index: RANK, timestamp: 1.0, ..outputs };
        let frame = outputs.encode(&Layout::newest());
        self.outputs[slot.0 as usize].send(&frame[..], 0).unwrap();
    }

    fn answer(&self, slot: Slot, call_id: CallId, value: i64) {
        let utility_output = Some(UtilityOutput { call_id, result: Ok(value.into()) });
        self.send(slot, NewOutputs { utility_output, ..NewOutputs::default() });
    }
}

struct Frontend {
    input: zmq::Socket,
    output: zmq::Socket,
    input_address: String,
    output_address: String,
    slot: Slot,
}

impl Frontend {
    fn bind(context: &zmq::Context) -> Self {
        let bind = |kind| {
            let socket = socket(context, kind);
            socket.bind("tcp://127.0.0.1:0").unwrap();
            let address = socket.get_last_endpoint().unwrap().unwrap();
            (socket, address)
        };
        let (input, input_address) = bind(zmq::ROUTER);
        let (output, output_address) = bind(zmq::PULL);
        Self { input, output, input_address, output_address, slot: Slot(0) }
    }

    fn recv_input(&self) -> Vec<Vec<u8>> {
        self.input.recv_multipart(0).unwrap()
    }

    fn send(&self, frames: &Frames) {
        let mut parts = vec![RANK.identity().0.to_vec()];
        parts.extend(frames.iter().map(|frame| frame.to_vec()));
        self.input.send_multipart(parts, 0).unwrap();
    }

    fn add(&self, id: &str) {
        self.send(&request(id));
    }

    fn call(&self, id: i128, method: &str) {
        let call = UtilityCall {
            client_index: ClientIndex(0),
            call_id: CallId(id),
            method: method.to_owned(),
            args: Vec::new(),
        };
        self.send(&call.encode());
    }

    fn recv(&self) -> Frames {
        let parts = self.output.recv_multipart(0).unwrap();
        parts.into_iter().map(Bytes::from).collect()
    }

    /// The next message must end this request.
    fn expect_finish(&self, id: &str) -> FinishReason {
        let frames = self.recv();
        let Ok(EngineOutput::Outputs(view)) = EngineOutput::parse(&frames) else {
            panic!("not outputs: {frames:?}");
        };
        let output = view.outputs().next().unwrap().unwrap();
        assert_eq!(output.request_id, id);
        output.finished.unwrap()
    }

    /// The next message must be the answer to a call.
    fn expect_answer(&self, id: i128) -> Result<rmpv::Value, String> {
        let frames = self.recv();
        let Ok(EngineOutput::Outputs(view)) = EngineOutput::parse(&frames) else {
            panic!("not outputs: {frames:?}");
        };
        let answer = view.utility_output().unwrap().unwrap();
        assert_eq!(answer.call_id, CallId(id));
        answer.result
    }

    fn is_silent(&self) -> bool {
        self.output.poll(zmq::POLLIN, 100).unwrap() == 0
    }
}

fn request(id: &str) -> Frames {
    let request = NewRequest {
        request_id: id.to_owned(),
        prompt_token_ids: vec![1, 2, 3],
        max_tokens: 4,
        client_index: ClientIndex(0),
        current_wave: Wave(0),
        arrival_time: 1.0,
    };
    request.encode(&Layout::newest())
}

fn finish(id: &str) -> NewOutputs {
    NewOutputs {
        outputs: vec![NewOutput {
            request_id: id.to_owned(),
            new_token_ids: vec![7],
            finish_reason: Some(FinishReason::Stop),
        }],
        ..NewOutputs::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_two_frontends_reach_the_engine_and_their_outputs_come_back_to_each() {
    let mut bed = Bed::new();
    let engine = bed.start_engine().await;
    let (a, b) = (bed.attach(1).await, bed.attach(2).await);
    assert_ne!(a.slot, b.slot);
    a.add("a1");
    b.add("b1");
    engine.expect_add(a.slot, "a1");
    engine.expect_add(b.slot, "b1");
    assert_eq!(bed.wake.recv().await, Some(RANK));
    engine.send(b.slot, finish("b1"));
    engine.send(a.slot, finish("a1"));
    assert_eq!(b.expect_finish("b1"), FinishReason::Stop);
    assert_eq!(a.expect_finish("a1"), FinishReason::Stop);
    assert!(a.is_silent() && b.is_silent());
    bed.until(|s| s.in_flight.values().all(|n| *n == 0) && s.admitted).await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_engine_is_reported_its_requests_are_ended_and_new_ones_wait_for_the_next() {
    let mut bed = Bed::new();
    let engine = bed.start_engine().await;
    let a = bed.attach(1).await;
    a.add("in-flight");
    engine.expect_add(a.slot, "in-flight");
    drop(engine);
    assert_eq!(a.expect_finish("in-flight"), FinishReason::Error);
    assert!(matches!(bed.event().await, RankEvent::Lost { incarnation: Incarnation(1), .. }));
    a.add("later");
    bed.until(|s| s.held == 1).await;
    let engine = bed.start_engine().await;
    engine.expect_add(a.slot, "later");
    engine.send(a.slot, finish("later"));
    assert_eq!(a.expect_finish("later"), FinishReason::Stop);
    engine.outputs[2].send("ENGINE_CORE_DEAD", 0).unwrap();
    let RankEvent::Lost { reason, .. } = bed.event().await else {
        panic!("not lost");
    };
    assert!(reason.contains("ENGINE_CORE_DEAD"), "{reason}");
    assert!(a.is_silent(), "the frontend heard of the engine's death");
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_gate_holds_requests_and_an_abort_of_a_held_one_never_reaches_the_engine() {
    let mut bed = Bed::new();
    let engine = bed.start_engine().await;
    let a = bed.attach(1).await;
    bed.admission(false).await;
    a.add("held-1");
    a.add("held-2");
    a.send(&encode_abort(["held-1"].into_iter()));
    bed.until(|s| s.held == 1 && !s.admission_open).await;
    assert!(engine.is_silent(a.slot));
    bed.admission(true).await;
    engine.expect_add(a.slot, "held-2");
    assert!(engine.is_silent(a.slot));
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frontend_that_dies_has_its_requests_aborted_and_its_slot_comes_back_after_the_fence() {
    let mut bed = Bed::new();
    let engine = bed.start_engine().await;
    let (a, b) = (bed.attach(1).await, bed.attach(2).await);
    a.add("orphan");
    engine.expect_add(a.slot, "orphan");
    let slot = a.slot;
    drop(a);
    let lost = tokio::time::timeout(LIMIT, bed.lost.recv()).await.unwrap().unwrap();
    assert_eq!((lost.frontend, lost.rank), (FrontendId(1), RANK));
    let frames = engine.recv(slot);
    assert_eq!(frames, encode_abort(["orphan"].into_iter()));
    let fence = engine.expect_call(slot, "is_sleeping");
    let c = Frontend::bind(&bed.context);
    let full = bed.open(&c, 3).await.unwrap_err().to_string();
    assert!(full.contains("drained"), "{full}");
    engine.answer(slot, fence, 0);
    engine.send(
        slot,
        NewOutputs { finished_requests: Some(vec!["orphan".to_owned()]), ..NewOutputs::default() },
    );
    bed.until(|s| (s.slots.occupied, s.slots.draining, s.slots.all) == (1, 0, SLOTS)).await;
    assert_eq!(bed.open(&c, 3).await.unwrap(), slot);
    b.add("unharmed");
    engine.expect_add(b.slot, "unharmed");
    assert!(c.is_silent());
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_calls_of_frontends_wait_for_a_verdict_and_ours_are_answered() {
    let mut bed = Bed::new();
    let engine = bed.start_engine().await;
    let a = bed.attach(1).await;
    a.call(77, "pause_scheduler");
    let held = bed.held.recv().await.unwrap();
    assert_eq!((held.rank, held.method.as_str()), (RANK, "pause_scheduler"));
    assert!(engine.is_silent(a.slot));
    let handle = bed.handle.clone();
    let released = tokio::spawn(async move {
        let ticket = held.ticket;
        let verdict = Verdict::Forward;
        handle.ask_within(LIMIT, Release { ticket, verdict }).await
    });
    let call = engine.expect_call(a.slot, "pause_scheduler");
    assert_eq!(call, CallId(77));
    engine.answer(a.slot, call, 5);
    assert_eq!(a.expect_answer(77), Ok(5.into()));
    assert_eq!(released.await.unwrap().unwrap(), rmpv::Value::from(5));

    a.call(78, "sleep");
    let ticket = bed.held.recv().await.unwrap().ticket;
    let verdict = Verdict::Refuse("update v7 is running".to_owned());
    bed.handle.ask_within(LIMIT, Release { ticket, verdict }).await.unwrap();
    assert_eq!(a.expect_answer(78), Err("update v7 is running".to_owned()));

    let handle = bed.handle.clone();
    let own = tokio::spawn(async move { handle.call("is_sleeping", vec![], LIMIT).await });
    let call = engine.expect_call(Slot::CONTROL, "is_sleeping");
    engine.answer(Slot::CONTROL, call, 1);
    assert_eq!(own.await.unwrap().unwrap(), rmpv::Value::from(1));
    let late = bed.handle.call("is_sleeping", vec![], Duration::from_millis(50)).await;
    assert!(late.is_err());
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_is_asked_for_again_is_made_once() {
    let mut bed = Bed::new();
    let engine = bed.start_engine().await;
    let key = uuid::Uuid::new_v4();
    let ask = move || Call { key, method: "pause_scheduler".to_owned(), args: Vec::new(), timeout: LIMIT };
    // The first one who asks is gone before the answer.
    bed.handle.commands.tell(ask()).await.unwrap();
    let call = engine.expect_call(Slot::CONTROL, "pause_scheduler");
    let handle = bed.handle.clone();
    let second = tokio::spawn(async move { handle.ask(ask()).await });
    assert!(engine.is_silent(Slot::CONTROL), "the engine was called twice");
    engine.answer(Slot::CONTROL, call, 9);
    assert_eq!(second.await.unwrap().unwrap().as_i64(), Some(9));
    let third = bed.handle.ask(ask()).await;
    assert_eq!(third.unwrap().as_i64(), Some(9));
    assert!(engine.is_silent(Slot::CONTROL), "the engine was called twice");
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_no_sidecar_makes_does_not_reach_the_engine() {
    let mut bed = Bed::new();
    let engine = bed.start_engine().await;
    let args = vec!["execute_method".into(), rmpv::Value::Binary(b"pickled".to_vec())];
    let error = bed.handle.call("collective_rpc", args, LIMIT).await.unwrap_err();
    assert_eq!(error.to_string(), "collective_rpc: the sidecar makes no such call");
    assert!(engine.is_silent(Slot::CONTROL), "the engine was called");
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_would_kill_an_engine_are_refused_and_the_frontend_goes_on() {
    let mut bed = Bed::new();
    let engine = bed.start_engine().await;
    let a = bed.attach(1).await;
    for bad in [
        vec![Bytes::from_static(b"\x04"), Bytes::from_static(b"\xc0")],
        vec![Bytes::from_static(b"\x09"), Bytes::from_static(b"\xc0")],
        vec![Bytes::from_static(b"\x00")],
        vec![Bytes::from_static(b"\x00"), Bytes::from_static(b"\xdc\x00")],
        vec![Bytes::from_static(b"READY")],
    ] {
        a.send(&bad);
    }
    a.call(5, "shutdown");
    assert!(a.expect_answer(5).is_err());
    a.add("fine");
    engine.expect_add(a.slot, "fine");
    bed.until(|s| s.refused == 6).await;
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preparing_the_same_incarnation_again_keeps_its_sockets() {
    let mut bed = Bed::new();
    let engine = bed.start_engine().await;
    let incarnation = Incarnation(bed.incarnation);
    bed.handle.ask_within(LIMIT, Prepare { incarnation }).await.unwrap();
    let frontend = bed.attach(1).await;
    frontend.add("still-here");
    engine.expect_add(frontend.slot, "still-here");
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_an_open_route_can_be_adopted() {
    let mut bed = Bed::new();
    let _engine = bed.start_engine().await;
    let frontend = bed.attach(1).await;
    let adopt = |frontend: u64| {
        bed.handle.ask_within(LIMIT, AdoptRoute { frontend: FrontendId(frontend), api_server: 0 })
    };
    assert_eq!(adopt(1).await.unwrap(), frontend.slot);
    let error = adopt(2).await.unwrap_err().to_string();
    assert!(error.contains("no route to API server 0"), "{error}");
    drop(frontend);
    let loss = tokio::time::timeout(LIMIT, bed.lost.recv()).await.unwrap().unwrap();
    assert_eq!((loss.frontend, loss.rank, loss.api_server), (FrontendId(1), RANK, 0));
    assert!(adopt(1).await.is_err(), "it is lost");
    bed.stop().await;
}
