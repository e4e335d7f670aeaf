//! Client and server of a link over connections that are cut and made again.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Slot};
use parking_lot::Mutex;
use rmpv::Value;
use tokio::io::{AsyncWriteExt, DuplexStream, copy_bidirectional, duplex};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::{self, ClientOptions, Link, LinkStatus, NodeHandles};
use super::codec::LinkStream;
use super::server::{self, ServeEnd, ServerOptions, Services};
use crate::driver::handles::{
    Admit, AdoptRoute, Call, CloseRoutes, EdgePrepare, EngineDown, Envelope, HandleError, HeldCall,
    NodeEvent, NodeState, OpenRoute, Prepare, RankAsk, RankEvent, RankHandle, RankSnapshot, Release, ReplyTo,
    RouteLost, Shutdown, SlotAddresses, Verdict, queue,
};

const LIMIT: Duration = Duration::from_secs(20);
const RANK: EngineIndex = EngineIndex(3);

/// A rank task that writes down what it is told, and answers calls when it is told to.
struct FakeRank {
    log: Arc<Mutex<Vec<String>>>,
    calls: mpsc::UnboundedReceiver<ReplyTo>,
    snapshot: watch::Sender<RankSnapshot>,
}

fn fake_rank() -> (FakeRank, RankHandle) {
    let (commands, mut inbox) = queue("rank");
    let (calls_in, calls) = mpsc::unbounded_channel();
    let (snapshot, receiver) = watch::channel(RankSnapshot { rank: RANK, ..RankSnapshot::default() });
    let log = Arc::new(Mutex::new(Vec::new()));
    let told = log.clone();
    tokio::spawn(async move {
        while let Some(Envelope { ask, reply, .. }) = inbox.recv().await {
            let line = match ask {
                RankAsk::Prepare(Prepare { incarnation }) => {
                    let inputs = vec![format!("ipc://{incarnation}")];
                    reply.send::<Prepare>(Ok(SlotAddresses { inputs, outputs: Vec::new() }));
                    format!("prepare {incarnation}")
                }
                RankAsk::Call(Call { method, .. }) => {
                    calls_in.send(reply).unwrap();
                    format!("call {method}")
                }
                RankAsk::OpenRoute(route) => {
                    reply.send::<OpenRoute>(Ok(Slot(1)));
                    format!("open {}", route.frontend)
                }
                RankAsk::AdoptRoute(AdoptRoute { frontend, .. }) => {
                    reply.send::<AdoptRoute>(Ok(Slot(1)));
                    format!("adopt {frontend}")
                }
                RankAsk::Release(Release { ticket, verdict }) => {
                    reply.send::<Release>(Ok(Value::Nil));
                    match verdict {
                        Verdict::Refuse(text) => format!("refuse {ticket} {text}"),
                        other => format!("release {ticket} {other:?}"),
                    }
                }
                RankAsk::CloseRoutes(CloseRoutes { frontend, .. }) => {
                    reply.send::<CloseRoutes>(Ok(()));
                    format!("close {frontend}")
                }
                RankAsk::Admit(Admit { incarnation }) => {
                    reply.send::<Admit>(Ok(()));
                    format!("admit {incarnation}")
                }
                RankAsk::EngineDown(EngineDown { incarnation, .. }) => format!("down {incarnation}"),
                other => format!("{other:?}"),
            };
            told.lock().push(line);
        }
    });
    (FakeRank { log, calls, snapshot }, RankHandle { rank: RANK, commands, snapshot: receiver })
}

struct Bed {
    rank: FakeRank,
    handles: NodeHandles,
    status: watch::Receiver<LinkStatus>,
    links: mpsc::Sender<Link>,
    streams: mpsc::Sender<LinkStream>,
    /// Towards the server, as the tasks behind it have it.
    below: mpsc::Sender<NodeEvent>,
    /// From the client, as the tasks before it have it.
    above: mpsc::Receiver<NodeEvent>,
    server: JoinHandle<ServeEnd>,
    stop: CancellationToken,
    wire: Option<JoinHandle<()>>,
}

impl Bed {
    fn new() -> Self {
        let (rank, handle) = fake_rank();
        let tracker = TaskTracker::new();
        let stop = CancellationToken::new();
        let (below, events) = mpsc::channel(server::EVENTS);
        let services = Services { ranks: vec![handle], ..Services::default() };
        let (streams, streams_out) = mpsc::channel(1);
        let options = ServerOptions::new("the far side", tracker.clone(), stop.clone());
        let server = tokio::spawn(server::serve(options, streams_out, services, events));
        let (events_in, above) = mpsc::channel(server::EVENTS);
        let (links, links_out) = mpsc::channel(1);
        let options = ClientOptions::new("node 1", vec![RANK], stop.clone());
        let (handles, status) = client::spawn(options, links_out, events_in, &tracker);
        Self { rank, handles, status, links, streams, below, above, server, stop, wire: None }
    }

    fn handle(&self) -> RankHandle {
        self.handles.ranks[0].clone()
    }

    async fn connect(&mut self) {
        let (ours, near) = duplex(1 << 16);
        let (mut far, theirs) = duplex(1 << 16);
        let mut near: DuplexStream = near;
        self.wire = Some(tokio::spawn(async move {
            copy_bidirectional(&mut near, &mut far).await.ok();
        }));
        self.streams.send(LinkStream::new(theirs, "asker")).await.unwrap();
        self.links.send(Link::Stream(LinkStream::new(ours, "server"))).await.unwrap();
        self.connected(true).await;
    }

    async fn connected(&mut self, connected: bool) {
        let wait = self.status.wait_for(|status| status.connected == connected);
        tokio::time::timeout(LIMIT, wait).await.unwrap().unwrap();
    }

    async fn cut(&mut self) {
        self.wire.take().unwrap().abort();
        self.connected(false).await;
    }

    async fn prepare(&self, incarnation: u64) -> SlotAddresses {
        let prepare = Prepare { incarnation: Incarnation(incarnation) };
        self.handle().ask_within(LIMIT, prepare).await.unwrap()
    }

    async fn open(&self, frontend: u64) -> Result<Slot, HandleError> {
        let route = OpenRoute {
            frontend: FrontendId(frontend),
            api_server: 0,
            input_address: String::new(),
            output_address: String::new(),
            registration: Bytes::new(),
            connect_timeout: LIMIT,
        };
        self.handle().ask_within(LIMIT, route).await
    }

    fn call(&self, method: &str, timeout: Duration) -> JoinHandle<Result<Value, HandleError>> {
        let (handle, method) = (self.handle(), method.to_owned());
        tokio::spawn(async move { handle.call(&method, Vec::new(), timeout).await })
    }

    async fn logged(&self, entry: &str) {
        let wait = async {
            while !self.rank.log.lock().iter().any(|line| line.starts_with(entry)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(LIMIT, wait).await.is_err() {
            panic!("{entry:?} is not in {:?}", self.rank.log.lock());
        }
    }

    fn count(&self, entry: &str) -> usize {
        self.rank.log.lock().iter().filter(|line| *line == entry).count()
    }

    fn lose(&self, incarnation: u64) {
        let reason = "it died".to_owned();
        let event = RankEvent::Lost { rank: RANK, incarnation: Incarnation(incarnation), reason };
        self.below.try_send(NodeEvent::Rank(event)).unwrap();
    }

    async fn lost(&mut self) -> (u64, String) {
        match self.event().await {
            NodeEvent::Rank(RankEvent::Lost { incarnation, reason, .. }) => (incarnation.0, reason),
            other => panic!("not a loss: {other:?}"),
        }
    }

    /// The next event that is not about the link itself.
    async fn event(&mut self) -> NodeEvent {
        loop {
            match tokio::time::timeout(LIMIT, self.above.recv()).await.unwrap().unwrap() {
                NodeEvent::Connected(_) | NodeEvent::Disconnected { .. } => {}
                event => return event,
            }
        }
    }

    async fn route_lost(&mut self) -> RouteLost {
        match self.event().await {
            NodeEvent::RouteLost(loss) => loss,
            other => panic!("not the loss of a route: {other:?}"),
        }
    }

    async fn held(&mut self) -> HeldCall {
        match self.event().await {
            NodeEvent::Held(call) => call,
            other => panic!("not a held call: {other:?}"),
        }
    }

    fn lose_route(&self, frontend: u64) {
        let reason = "closed".to_owned();
        let loss = RouteLost { frontend: FrontendId(frontend), rank: RANK, api_server: 0, reason };
        self.below.try_send(NodeEvent::RouteLost(loss)).unwrap();
    }

    fn state(&self) -> Arc<NodeState> {
        self.status.borrow().state.clone().unwrap()
    }
}

fn held(ticket: u64) -> HeldCall {
    HeldCall {
        rank: RANK,
        ticket,
        frontend: FrontendId(9),
        api_server: 0,
        method: "pause_scheduler".to_owned(),
        args: vec![Value::from("keep")],
    }
}

#[tokio::test]
async fn commands_answers_events_and_snapshots_travel() {
    let mut bed = Bed::new();
    bed.connect().await;
    assert_eq!(bed.prepare(1).await.inputs, ["ipc://1"]);
    let call = bed.call("echo", LIMIT);
    let reply = bed.rank.calls.recv().await.unwrap();
    reply.send::<Call>(Ok(Value::from(7)));
    assert_eq!(call.await.unwrap().unwrap(), Value::from(7));
    let call = bed.call("fail", LIMIT);
    bed.rank.calls.recv().await.unwrap().send::<Call>(Err(HandleError::failed("no such method")));
    assert_eq!(call.await.unwrap().unwrap_err().to_string(), "no such method");
    bed.rank.snapshot.send_modify(|snapshot| {
        snapshot.admitted = true;
        snapshot.incarnation = Incarnation(1);
    });
    let mut snapshot = bed.handle().snapshot;
    tokio::time::timeout(LIMIT, snapshot.wait_for(|s| s.admitted)).await.unwrap().unwrap();
    bed.below.send(NodeEvent::Wake(RANK)).await.unwrap();
    assert!(matches!(bed.event().await, NodeEvent::Wake(RANK)));
    bed.lose(1);
    assert_eq!(bed.lost().await, (1, "it died".to_owned()));
}

#[tokio::test]
async fn a_call_that_runs_during_a_reconnect_is_answered_and_was_made_once() {
    let mut bed = Bed::new();
    bed.connect().await;
    let call = bed.call("load", LIMIT);
    let reply = bed.rank.calls.recv().await.unwrap();
    bed.cut().await;
    let waiting = bed.call("second", LIMIT);
    bed.connect().await;
    let second = bed.rank.calls.recv().await.unwrap();
    reply.send::<Call>(Ok(Value::from("loaded")));
    second.send::<Call>(Ok(Value::Nil));
    assert_eq!(call.await.unwrap().unwrap(), Value::from("loaded"));
    waiting.await.unwrap().unwrap();
    assert_eq!((bed.count("call load"), bed.count("call second")), (1, 1));
}

#[tokio::test]
async fn an_answer_that_was_given_while_nobody_was_connected_is_not_lost() {
    let mut bed = Bed::new();
    bed.connect().await;
    let call = bed.call("load", LIMIT);
    let reply = bed.rank.calls.recv().await.unwrap();
    bed.cut().await;
    reply.send::<Call>(Ok(Value::from(1)));
    bed.connect().await;
    assert_eq!(call.await.unwrap().unwrap(), Value::from(1));
    assert_eq!(bed.count("call load"), 1);
}

#[tokio::test]
async fn what_must_not_happen_twice_fails_while_nobody_is_connected() {
    let mut bed = Bed::new();
    let error = bed.open(1).await.unwrap_err().to_string();
    assert_eq!(error, "node 1: not connected");
    bed.connect().await;
    assert_eq!(bed.open(1).await.unwrap(), Slot(1));
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_a_connection_fails_at_its_deadline() {
    let mut bed = Bed::new();
    let error = bed.call("echo", Duration::from_secs(3)).await.unwrap().unwrap_err();
    assert!(matches!(error, HandleError::Deadline { .. }), "{error}");
    bed.connect().await;
    bed.prepare(1).await;
    assert_eq!(bed.count("call echo"), 0, "it is not made when nobody wants it any more");
}

#[tokio::test]
async fn requests_to_one_rank_keep_their_order_over_a_reconnect() {
    let mut bed = Bed::new();
    let handle = bed.handle();
    for incarnation in 1..=30 {
        handle.commands.tell(Admit { incarnation: Incarnation(incarnation) }).await.unwrap();
    }
    bed.connect().await;
    for incarnation in 31..=60 {
        handle.commands.tell(Admit { incarnation: Incarnation(incarnation) }).await.unwrap();
    }
    bed.logged("admit 60").await;
    let expected: Vec<String> = (1..=60).map(|incarnation| format!("admit {incarnation}")).collect();
    assert_eq!(*bed.rank.log.lock(), expected);
}

#[tokio::test]
async fn garbage_closes_the_link_and_the_next_connection_works() {
    let mut bed = Bed::new();
    let (mut bad, theirs) = duplex(1024);
    bed.streams.send(LinkStream::new(theirs, "stranger")).await.unwrap();
    bad.write_all(b"\0\0\0\x04junk").await.unwrap();
    let (ours, mut bad_server) = duplex(1024);
    bed.links.send(Link::Stream(LinkStream::new(ours, "server"))).await.unwrap();
    bad_server.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let lost = bed.status.wait_for(|status| status.lost == 1);
    let detail = tokio::time::timeout(LIMIT, lost).await.unwrap().unwrap().detail.clone();
    assert!(detail.unwrap().contains("longer than"), "the reason is told");
    bed.connect().await;
    bed.prepare(1).await;
}

#[tokio::test]
async fn another_version_is_refused_and_told_ours() {
    use super::codec::{Wire, frame};
    use super::wire::{FromNode, LINK_VERSION, ToNode};
    let bed = Bed::new();
    let (ours, theirs) = duplex(1024);
    bed.streams.send(LinkStream::new(theirs, "old one")).await.unwrap();
    let mut wire = Wire::new(LinkStream::new(ours, "server"));
    wire.push(frame(&ToNode::Hello { version: LINK_VERSION + 1, session: uuid::Uuid::new_v4() }).unwrap());
    let answer = tokio::time::timeout(LIMIT, wire.next::<FromNode>()).await.unwrap().unwrap();
    assert!(matches!(answer, FromNode::Hello { version: LINK_VERSION }), "{answer:?}");
    let end = tokio::time::timeout(LIMIT, wire.next::<FromNode>()).await.unwrap();
    assert!(matches!(&end, Err(error) if matches!(error.fault, super::codec::Fault::Closed)), "{end:?}");
}

#[tokio::test]
async fn a_reader_that_is_stuck_keeps_nobody_behind_the_link_waiting() {
    use super::codec::{Wire, frame};
    use super::wire::{FromNode, LINK_VERSION, ToNode};
    let bed = Bed::new();
    let (ours, theirs) = duplex(256);
    bed.streams.send(LinkStream::new(theirs, "stuck")).await.unwrap();
    let mut wire = Wire::new(LinkStream::new(ours, "server"));
    wire.push(frame(&ToNode::Hello { version: LINK_VERSION, session: uuid::Uuid::new_v4() }).unwrap());
    wire.next::<FromNode>().await.unwrap();
    // From here on it reads nothing.
    let flood = async {
        for _ in 0..20_000 {
            bed.below.send(NodeEvent::Wake(RANK)).await.unwrap();
            let event =
                RankEvent::Lost { rank: RANK, incarnation: Incarnation(1), reason: "again".to_owned() };
            bed.below.send(NodeEvent::Rank(event)).await.unwrap();
        }
    };
    tokio::time::timeout(LIMIT, flood).await.expect("the tasks behind the link do not wait");
    let end = async { while wire.next::<FromNode>().await.is_ok() {} };
    tokio::time::timeout(LIMIT, end).await.expect("its connection was given up");
}

#[tokio::test(start_paused = true)]
async fn a_connection_on_which_nothing_comes_is_given_up_and_an_idle_one_is_not() {
    let mut bed = Bed::new();
    bed.connect().await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(bed.status.borrow().lost, 0, "pings keep it alive");
    let (ours, _silent) = duplex(1 << 16);
    bed.links.send(Link::Stream(LinkStream::new(ours, "server"))).await.unwrap();
    let lost = bed.status.wait_for(|status| status.lost == 2);
    let detail = tokio::time::timeout(Duration::from_secs(6), lost).await.unwrap().unwrap().detail.clone();
    assert!(detail.unwrap().contains("nothing heard for 5s"));
}

#[tokio::test]
async fn what_was_lost_while_nobody_was_connected_is_reported_after_it() {
    let mut bed = Bed::new();
    bed.connect().await;
    bed.prepare(4).await;
    bed.open(1).await.unwrap();
    bed.open(2).await.unwrap();
    let frame = Bytes::from_static(b"\x80");
    let registered = RankEvent::Registered { rank: RANK, incarnation: Incarnation(4), frame };
    bed.cut().await;
    bed.below.send(NodeEvent::Rank(registered)).await.unwrap();
    bed.lose_route(1);
    bed.connect().await;
    assert_eq!(bed.route_lost().await.frontend, FrontendId(1));
    assert!(matches!(
        bed.event().await,
        NodeEvent::Rank(RankEvent::Registered { incarnation: Incarnation(4), .. })
    ));
    bed.cut().await;
    bed.lose(4);
    bed.connect().await;
    assert_eq!(bed.lost().await, (4, "it died".to_owned()), "the other route is open still");
}

#[tokio::test]
async fn a_restarted_asker_finds_everything_in_the_state() {
    let mut bed = Bed::new();
    bed.connect().await;
    bed.prepare(4).await;
    bed.open(1).await.unwrap();
    assert_eq!(bed.state().ranks[&RANK].prepared, None);
    bed.cut().await;
    bed.connect().await;
    assert_eq!(bed.state().ranks[&RANK].prepared, Some(Incarnation(4)));
    assert_eq!(bed.state().ranks[&RANK].routes, [(FrontendId(1), 0)]);
    // Another process takes over, and hears of the loss of the route that it has adopted.
    let tracker = TaskTracker::new();
    let (events_in, above) = mpsc::channel(server::EVENTS);
    let (links, links_out) = mpsc::channel(1);
    let options = ClientOptions::new("node 1", vec![RANK], bed.stop.clone());
    let (handles, _status) = client::spawn(options, links_out, events_in, &tracker);
    let (ours, theirs) = duplex(1 << 16);
    bed.streams.send(LinkStream::new(theirs, "asker 2")).await.unwrap();
    links.send(Link::Stream(LinkStream::new(ours, "server"))).await.unwrap();
    let adopt = AdoptRoute { frontend: FrontendId(1), api_server: 0 };
    assert_eq!(handles.ranks[0].ask_within(LIMIT, adopt).await.unwrap(), Slot(1));
    bed.above = above;
    bed.lose_route(1);
    let loss = loop {
        if let NodeEvent::RouteLost(loss) = bed.event().await {
            break loss;
        }
    };
    assert_eq!(loss.frontend, FrontendId(1));
}

#[tokio::test]
async fn a_process_that_was_started_for_something_else_is_not_talked_to() {
    let bed = Bed::new();
    let (events_in, _above) = mpsc::channel(server::EVENTS);
    let (links, links_out) = mpsc::channel(1);
    let options = ClientOptions {
        about: Some("ranks 0..2".to_owned()),
        ..ClientOptions::new("the relay process", vec![RANK], bed.stop.clone())
    };
    let (_handles, mut status) = client::spawn(options, links_out, events_in, &TaskTracker::new());
    let (ours, theirs) = duplex(1 << 16);
    bed.streams.send(LinkStream::new(theirs, "asker")).await.unwrap();
    links.send(Link::Stream(LinkStream::new(ours, "server"))).await.unwrap();
    let lost = tokio::time::timeout(LIMIT, status.wait_for(|status| status.lost == 1));
    let status = lost.await.unwrap().unwrap();
    assert!(status.stranger && !status.connected, "{status:?}");
    let detail = "the relay process: it was started for something unknown, expected ranks 0..2";
    assert_eq!(status.detail.as_deref(), Some(detail));
}

#[tokio::test]
async fn the_death_of_the_other_process_loses_its_engines_and_routes_and_keeps_preparations() {
    let mut bed = Bed::new();
    bed.connect().await;
    bed.prepare(4).await;
    bed.open(1).await.unwrap();
    let call = bed.call("load", LIMIT);
    let _reply = bed.rank.calls.recv().await.unwrap();
    bed.cut().await;
    bed.links.send(Link::Gone("the relay process died".to_owned())).await.unwrap();
    assert_eq!(bed.route_lost().await.reason, "the relay process died");
    assert_eq!(bed.lost().await, (4, "the relay process died".to_owned()));
    assert_eq!(call.await.unwrap().unwrap_err().to_string(), "the relay process died");
    let handle = bed.handle();
    let prepare = Prepare { incarnation: Incarnation(5) };
    let prepare = tokio::spawn(async move { handle.ask_within(LIMIT, prepare).await });
    bed.connect().await;
    prepare.await.unwrap().unwrap();
    assert_eq!(bed.count("prepare 5"), 1);
}

#[tokio::test(start_paused = true)]
async fn control_calls_are_refused_when_nobody_is_there_to_decide() {
    let mut bed = Bed::new();
    bed.connect().await;
    bed.below.send(NodeEvent::Held(held(1))).await.unwrap();
    assert_eq!(bed.held().await.ticket, 1);
    bed.cut().await;
    bed.below.send(NodeEvent::Held(held(2))).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(bed.rank.log.lock().is_empty(), "the one who was told may come back");
    bed.connect().await;
    assert_eq!(bed.held().await.ticket, 2, "the first one is known already");
    bed.cut().await;
    bed.logged("refuse 1 pause_scheduler: the sidecar").await;
    bed.logged("refuse 2 pause_scheduler: the sidecar").await;
    bed.below.send(NodeEvent::Held(held(3))).await.unwrap();
    bed.logged("refuse 3 ").await;
}

#[tokio::test]
async fn a_command_for_what_is_not_served_is_answered_with_an_error() {
    let mut bed = Bed::new();
    bed.connect().await;
    let prepare = EdgePrepare { rank: RANK, incarnation: Incarnation(1) };
    let error = bed.handles.edge.ask_within(LIMIT, prepare).await.unwrap_err().to_string();
    assert_eq!(error, "the far side: coordinator sockets: coordinator sockets are not served here");
}

#[tokio::test]
async fn a_shutdown_is_answered_and_ends_the_server() {
    let mut bed = Bed::new();
    bed.connect().await;
    bed.handles.link.ask_within(LIMIT, Shutdown {}).await.unwrap();
    assert_eq!(tokio::time::timeout(LIMIT, bed.server).await.unwrap().unwrap(), ServeEnd::Shutdown);
}
