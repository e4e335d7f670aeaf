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

use super::client::{self, ClientOptions, Link, LinkStatus, NodeHandles, NodeSinks, Tempo};
use super::codec::LinkStream;
use super::server::{self, ServeEnd, ServerOptions, Services, Sources};
use crate::driver::handles::{
    HandleError, HeldCall, OpenRoute, RankCommand, RankEvent, RankHandle, RankSnapshot, Reply, RouteLost,
    SlotAddresses, Verdict,
};

const LIMIT: Duration = Duration::from_secs(20);
const RANK: EngineIndex = EngineIndex(3);

/// A rank task that writes down what it is told, and answers calls when it is told to.
struct FakeRank {
    log: Arc<Mutex<Vec<String>>>,
    calls: mpsc::UnboundedReceiver<Reply<Value>>,
    losses: mpsc::UnboundedReceiver<mpsc::Sender<RouteLost>>,
    snapshot: watch::Sender<RankSnapshot>,
}

fn fake_rank() -> (FakeRank, RankHandle) {
    let (commands, mut inbox) = mpsc::channel(4);
    let (calls_in, calls) = mpsc::unbounded_channel();
    let (losses_in, losses) = mpsc::unbounded_channel();
    let (snapshot, receiver) = watch::channel(RankSnapshot { rank: RANK, ..RankSnapshot::default() });
    let log = Arc::new(Mutex::new(Vec::new()));
    let told = log.clone();
    tokio::spawn(async move {
        while let Some(command) = inbox.recv().await {
            let line = match command {
                RankCommand::Prepare { incarnation, reply } => {
                    let inputs = vec![format!("ipc://{incarnation}")];
                    reply.send(Ok(SlotAddresses { inputs, outputs: Vec::new() })).ok();
                    format!("prepare {incarnation}")
                }
                RankCommand::Call { method, reply, .. } => {
                    calls_in.send(reply).unwrap();
                    format!("call {method}")
                }
                RankCommand::OpenRoute { route, reply } => {
                    losses_in.send(route.lost).unwrap();
                    reply.send(Ok(Slot(1))).ok();
                    format!("open {}", route.frontend)
                }
                RankCommand::AdoptRoute { frontend, lost, reply, .. } => {
                    losses_in.send(lost).unwrap();
                    reply.send(Ok(Slot(1))).ok();
                    format!("adopt {frontend}")
                }
                RankCommand::Release { ticket, verdict, reply } => {
                    reply.send(Ok(Value::Nil)).ok();
                    match verdict {
                        Verdict::Refuse(text) => format!("refuse {ticket} {text}"),
                        other => format!("release {ticket} {other:?}"),
                    }
                }
                RankCommand::CloseRoutes { frontend, reply } => {
                    reply.send(Ok(())).ok();
                    format!("close {frontend}")
                }
                RankCommand::Admit { incarnation } => format!("admit {incarnation}"),
                RankCommand::EngineDown { incarnation, .. } => format!("down {incarnation}"),
                other => format!("{other:?}"),
            };
            told.lock().push(line);
        }
    });
    (FakeRank { log, calls, losses, snapshot }, RankHandle { rank: RANK, commands, snapshot: receiver })
}

struct Bed {
    rank: FakeRank,
    handles: NodeHandles,
    status: watch::Receiver<LinkStatus>,
    links: mpsc::Sender<Link>,
    streams: mpsc::Sender<LinkStream>,
    /// Towards the server, as the tasks behind it have it.
    below: NodeSinks,
    /// From the client, as the tasks before it have it.
    above: Sources,
    server: JoinHandle<ServeEnd>,
    stop: CancellationToken,
    wire: Option<JoinHandle<()>>,
}

impl Bed {
    fn new() -> Self {
        let (rank, handle) = fake_rank();
        let tracker = TaskTracker::new();
        let stop = CancellationToken::new();
        let (below, sources) = server::channels();
        let services = Services {
            ranks: vec![handle],
            edge: None,
            edge_state: None,
            handshake: None,
            processes: None,
            stage: None,
        };
        let (streams, streams_out) = mpsc::channel(1);
        let options = ServerOptions::new("the far side", tracker.clone(), stop.clone());
        let server = tokio::spawn(server::serve(options, streams_out, services, sources));
        let (sinks, above) = server::channels();
        let (links, links_out) = mpsc::channel(1);
        let options = ClientOptions {
            name: "node 1".to_owned(),
            ranks: vec![RANK],
            tempo: Tempo::default(),
            stop: stop.clone(),
        };
        let (handles, status) = client::spawn(options, links_out, sinks, &tracker);
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
        let incarnation = Incarnation(incarnation);
        let prepare = |reply| RankCommand::Prepare { incarnation, reply };
        self.handle().ask("prepare", LIMIT, prepare).await.unwrap()
    }

    async fn open(&self, frontend: u64, lost: mpsc::Sender<RouteLost>) -> Result<Slot, HandleError> {
        let route = OpenRoute {
            frontend: FrontendId(frontend),
            api_server: 0,
            input_address: String::new(),
            output_address: String::new(),
            registration: Bytes::new(),
            connect_timeout: LIMIT,
            lost,
        };
        self.handle().ask("open", LIMIT, |reply| RankCommand::OpenRoute { route, reply }).await
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
        self.below.ranks.try_send(event).unwrap();
    }

    async fn lost(&mut self) -> (u64, String) {
        match tokio::time::timeout(LIMIT, self.above.ranks.recv()).await.unwrap().unwrap() {
            RankEvent::Lost { incarnation, reason, .. } => (incarnation.0, reason),
            other => panic!("not a loss: {other:?}"),
        }
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
    reply.send(Ok(Value::from(7))).unwrap();
    assert_eq!(call.await.unwrap().unwrap(), Value::from(7));
    let call = bed.call("fail", LIMIT);
    bed.rank.calls.recv().await.unwrap().send(Err(HandleError::failed("no such method"))).unwrap();
    assert_eq!(call.await.unwrap().unwrap_err().to_string(), "no such method");
    bed.rank.snapshot.send_modify(|snapshot| {
        snapshot.admitted = true;
        snapshot.incarnation = Incarnation(1);
    });
    let mut snapshot = bed.handle().snapshot;
    tokio::time::timeout(LIMIT, snapshot.wait_for(|s| s.admitted)).await.unwrap().unwrap();
    bed.below.wakes.send(RANK).await.unwrap();
    assert_eq!(bed.above.wakes.recv().await, Some(RANK));
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
    reply.send(Ok(Value::from("loaded"))).unwrap();
    second.send(Ok(Value::Nil)).unwrap();
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
    reply.send(Ok(Value::from(1))).unwrap();
    bed.connect().await;
    assert_eq!(call.await.unwrap().unwrap(), Value::from(1));
    assert_eq!(bed.count("call load"), 1);
}

#[tokio::test]
async fn what_must_not_happen_twice_fails_while_nobody_is_connected() {
    let mut bed = Bed::new();
    let (lost, _losses) = mpsc::channel(1);
    let error = bed.open(1, lost.clone()).await.unwrap_err().to_string();
    assert_eq!(error, "node 1: not connected");
    bed.connect().await;
    assert_eq!(bed.open(1, lost).await.unwrap(), Slot(1));
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
        handle.tell(RankCommand::Admit { incarnation: Incarnation(incarnation) }).await.unwrap();
    }
    bed.connect().await;
    for incarnation in 31..=60 {
        handle.tell(RankCommand::Admit { incarnation: Incarnation(incarnation) }).await.unwrap();
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
    use super::codec::{Wire, encode};
    use super::wire::{Down, LINK_VERSION, Up};
    let bed = Bed::new();
    let (ours, theirs) = duplex(1024);
    bed.streams.send(LinkStream::new(theirs, "old one")).await.unwrap();
    let mut wire = Wire::new(LinkStream::new(ours, "server"));
    wire.push(encode(&Down::Hello { version: LINK_VERSION + 1, session: uuid::Uuid::new_v4() }).unwrap());
    let answer = tokio::time::timeout(LIMIT, wire.next::<Up>()).await.unwrap().unwrap();
    assert!(matches!(answer, Up::Hello { version: LINK_VERSION }), "{answer:?}");
    let end = tokio::time::timeout(LIMIT, wire.next::<Up>()).await.unwrap();
    assert!(matches!(end, Err(super::LinkError::Closed { .. })), "{end:?}");
}

#[tokio::test]
async fn a_reader_that_is_stuck_keeps_nobody_behind_the_link_waiting() {
    use super::codec::{Wire, encode};
    use super::wire::{Down, LINK_VERSION, Up};
    let bed = Bed::new();
    let (ours, theirs) = duplex(256);
    bed.streams.send(LinkStream::new(theirs, "stuck")).await.unwrap();
    let mut wire = Wire::new(LinkStream::new(ours, "server"));
    wire.push(encode(&Down::Hello { version: LINK_VERSION, session: uuid::Uuid::new_v4() }).unwrap());
    wire.next::<Up>().await.unwrap();
    // From here on it reads nothing.
    let flood = async {
        for _ in 0..20_000 {
            bed.below.wakes.send(RANK).await.unwrap();
            let event =
                RankEvent::Lost { rank: RANK, incarnation: Incarnation(1), reason: "again".to_owned() };
            bed.below.ranks.send(event).await.unwrap();
        }
    };
    tokio::time::timeout(LIMIT, flood).await.expect("the tasks behind the link do not wait");
    let end = async { while wire.next::<Up>().await.is_ok() {} };
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
    let (lost, mut losses) = mpsc::channel(1);
    bed.open(1, lost.clone()).await.unwrap();
    bed.open(2, lost).await.unwrap();
    let (first, _second) = (bed.rank.losses.recv().await.unwrap(), bed.rank.losses.recv().await.unwrap());
    let frame = Bytes::from_static(b"\x80");
    let registered = RankEvent::Registered { rank: RANK, incarnation: Incarnation(4), frame };
    bed.cut().await;
    bed.below.ranks.send(registered).await.unwrap();
    let reason = "closed".to_owned();
    let loss = RouteLost { frontend: FrontendId(1), rank: RANK, api_server: 0, reason };
    first.send(loss).await.unwrap();
    bed.connect().await;
    assert!(matches!(
        bed.above.ranks.recv().await,
        Some(RankEvent::Registered { incarnation: Incarnation(4), .. })
    ));
    let loss = tokio::time::timeout(LIMIT, losses.recv()).await.unwrap().unwrap();
    assert_eq!(loss.frontend, FrontendId(1));
    bed.cut().await;
    bed.lose(4);
    bed.connect().await;
    assert_eq!(bed.lost().await, (4, "it died".to_owned()));
    assert!(losses.try_recv().is_err(), "the other route is open still");
}

#[tokio::test]
async fn a_restarted_asker_finds_everything_in_the_state() {
    let mut bed = Bed::new();
    bed.connect().await;
    bed.prepare(4).await;
    let (lost, _losses) = mpsc::channel(1);
    bed.open(1, lost).await.unwrap();
    let first = bed.above.states.recv().await.unwrap();
    assert_eq!(first.ranks[&RANK].prepared, None);
    bed.cut().await;
    bed.connect().await;
    let state = bed.above.states.recv().await.unwrap();
    assert_eq!(state.ranks[&RANK].prepared, Some(Incarnation(4)));
    assert_eq!(state.ranks[&RANK].routes, [(FrontendId(1), 0)]);
    // Another process takes over; the loss of the route is told to it when it has adopted it.
    let tracker = TaskTracker::new();
    let (sinks, _above) = server::channels();
    let (links, links_out) = mpsc::channel(1);
    let options = ClientOptions {
        name: "node 1".to_owned(),
        ranks: vec![RANK],
        tempo: Tempo::default(),
        stop: bed.stop.clone(),
    };
    let (handles, _status) = client::spawn(options, links_out, sinks, &tracker);
    let (ours, theirs) = duplex(1 << 16);
    bed.streams.send(LinkStream::new(theirs, "asker 2")).await.unwrap();
    links.send(Link::Stream(LinkStream::new(ours, "server"))).await.unwrap();
    let (lost, mut losses) = mpsc::channel(1);
    let adopt = |reply| RankCommand::AdoptRoute { frontend: FrontendId(1), api_server: 0, lost, reply };
    assert_eq!(handles.ranks[0].ask("adopt", LIMIT, adopt).await.unwrap(), Slot(1));
    let (_old, new) = (bed.rank.losses.recv().await.unwrap(), bed.rank.losses.recv().await.unwrap());
    let reason = "closed".to_owned();
    new.send(RouteLost { frontend: FrontendId(1), rank: RANK, api_server: 0, reason }).await.unwrap();
    assert_eq!(tokio::time::timeout(LIMIT, losses.recv()).await.unwrap().unwrap().frontend, FrontendId(1));
}

#[tokio::test]
async fn the_loss_of_a_route_that_nobody_here_opened_is_passed_on() {
    let mut bed = Bed::new();
    bed.connect().await;
    let loss = RouteLost { frontend: FrontendId(5), rank: RANK, api_server: 1, reason: "closed".to_owned() };
    bed.below.routes.send(loss).await.unwrap();
    let told = tokio::time::timeout(LIMIT, bed.above.routes.recv()).await.unwrap().unwrap();
    assert_eq!((told.frontend, told.api_server), (FrontendId(5), 1));
}

#[tokio::test]
async fn the_death_of_the_other_process_loses_its_engines_and_routes_and_keeps_preparations() {
    let mut bed = Bed::new();
    bed.connect().await;
    bed.prepare(4).await;
    let (lost, mut losses) = mpsc::channel(1);
    bed.open(1, lost).await.unwrap();
    let call = bed.call("load", LIMIT);
    let _reply = bed.rank.calls.recv().await.unwrap();
    bed.cut().await;
    bed.links.send(Link::Gone("the relay process died".to_owned())).await.unwrap();
    assert_eq!(bed.lost().await, (4, "the relay process died".to_owned()));
    assert_eq!(losses.recv().await.unwrap().reason, "the relay process died");
    assert_eq!(call.await.unwrap().unwrap_err().to_string(), "the relay process died");
    let handle = bed.handle();
    let prepare = tokio::spawn(async move {
        let incarnation = Incarnation(5);
        handle.ask("prepare", LIMIT, |reply| RankCommand::Prepare { incarnation, reply }).await
    });
    bed.connect().await;
    prepare.await.unwrap().unwrap();
    assert_eq!(bed.count("prepare 5"), 1);
}

#[tokio::test(start_paused = true)]
async fn control_calls_are_refused_when_nobody_is_there_to_decide() {
    let mut bed = Bed::new();
    bed.connect().await;
    bed.below.held.send(held(1)).await.unwrap();
    assert_eq!(bed.above.held.recv().await.unwrap().ticket, 1);
    bed.cut().await;
    bed.below.held.send(held(2)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(bed.rank.log.lock().is_empty(), "the one who was told may come back");
    bed.connect().await;
    assert_eq!(bed.above.held.recv().await.unwrap().ticket, 2, "the first one is known already");
    bed.cut().await;
    bed.logged("refuse 1 pause_scheduler: the sidecar").await;
    bed.logged("refuse 2 pause_scheduler: the sidecar").await;
    bed.below.held.send(held(3)).await.unwrap();
    bed.logged("refuse 3 ").await;
}

#[tokio::test]
async fn a_request_for_what_is_not_served_is_answered_with_an_error() {
    use crate::driver::handles::{EdgeCommand, ask};
    let mut bed = Bed::new();
    bed.connect().await;
    let edge = |reply| EdgeCommand::Prepare { rank: RANK, incarnation: Incarnation(1), reply };
    let answer = ask(&bed.handles.edge.commands, "edge", "prepare".to_owned(), LIMIT, edge).await;
    let error = answer.unwrap_err().to_string();
    assert_eq!(error, "the far side: coordinator sockets: coordinator sockets are not served here");
}

#[tokio::test]
async fn a_shutdown_is_answered_and_ends_the_server() {
    let mut bed = Bed::new();
    bed.connect().await;
    bed.handles.link.shutdown(LIMIT).await.unwrap();
    assert_eq!(tokio::time::timeout(LIMIT, bed.server).await.unwrap().unwrap(), ServeEnd::Shutdown);
}
