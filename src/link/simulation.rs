//! The two real ends of a link over a wire that delays, cuts inside of frames and is made anew, in virtual time, for
//! thousands of seeds. What the commands are about is played by [`Far`]; who asks is [`Near`], which knows nothing but
//! answers and events.
//!
//! Laws: `once` (a command reaches its task at most once, but for those that a successor of a dead process is asked
//! for), `order` (commands of a rank reach it in the order in which they were asked), `expired` (none is done when it
//! is of no use any more), `answered` (each asker gets an answer), `state` (what answers and events add up to is the
//! state that is asked for).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::output::start_wave_message;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Slot, Wave};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::client::{self, ClientOptions, Link, NodeHandles};
use super::codec::LinkStream;
use super::mutation::{self, Mutation};
use super::server::{self, ServerOptions, Services};
use crate::driver::handles::{
    Admission, Admit, Answered, Call, CloseRoutes, Delivery, EdgeAsk, EdgeEvent, EdgeHandle, EdgePrepare,
    EdgePublish, EngineDown, Envelope, GetState, HandleError, NodeAsk, NodeEvent, NodeState, OpenRoute,
    Prepare, RankAsk, RankEvent, RankHandle, RankSnapshot, ReplyTo, RouteLost, SlotAddresses, queue,
};

const RANK: EngineIndex = EngineIndex(3);
/// Seeds of an ordinary run; `SIM_SEEDS` says another number.
const SEEDS: u64 = 2000;
/// Seeds beyond those that have found a fault.
const FAILED_ONCE: [u64; 1] = [6749];
/// Seeds in which a fault must show.
const SEARCHED: u64 = 2000;
/// Virtual seconds after which everything must have come to rest.
const REST: Duration = Duration::from_secs(30);
/// How long a command may be on its way on a wire that works.
const WAY: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Violation {
    law: &'static str,
    what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.law, self.what)
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn millis(&mut self, end: u64) -> Duration {
        Duration::from_millis(self.below(end))
    }
}

/// What has arrived, over all lives of the far process.
#[derive(Default)]
struct Seen {
    /// How often each numbered command came.
    arrived: BTreeMap<u64, u32>,
    asked: BTreeMap<u64, (Instant, Duration, Delivery)>,
    violation: Option<Violation>,
}

impl Seen {
    fn arrive(&mut self, number: u64, last: &mut u64) {
        let times = self.arrived.entry(number).or_default();
        *times += 1;
        let Some(&(at, limit, delivery)) = self.asked.get(&number) else {
            return;
        };
        let found = if *times > 1 && delivery != Delivery::Repeat {
            Some(("once", format!("command {number} came {times} times")))
        } else if number <= *last {
            Some(("order", format!("command {number} came after {last}")))
        } else if at.elapsed() > limit + WAY {
            Some(("expired", format!("command {number} came {:?} after it was asked for", at.elapsed())))
        } else {
            None
        };
        if let Some((law, what)) = found {
            self.violation.get_or_insert(Violation { law, what });
        }
        *last = number;
    }
}

/// The rank and the edge behind the link, in one life of their process.
#[derive(Default)]
struct Engine {
    prepared: Option<Incarnation>,
    edge: Option<Incarnation>,
    registered: bool,
    subscribed: bool,
    routes: BTreeSet<u64>,
    wave: u64,
}

struct Far {
    engine: Arc<Mutex<Engine>>,
    events: mpsc::Sender<NodeEvent>,
    streams: mpsc::Sender<LinkStream>,
    stop: CancellationToken,
}

impl Far {
    fn start(seen: &Arc<Mutex<Seen>>, delay: u64) -> Self {
        let engine = Arc::new(Mutex::new(Engine::default()));
        let (commands, inbox) = queue("rank");
        let (edge, edge_inbox) = queue("edge");
        let (_, snapshot) = watch::channel(RankSnapshot { rank: RANK, ..RankSnapshot::default() });
        let (events, reported) = mpsc::channel(server::EVENTS);
        let (streams, streams_out) = mpsc::channel(4);
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let services = Services {
            ranks: vec![RankHandle { rank: RANK, commands, snapshot }],
            edge: Some(edge),
            ..Services::default()
        };
        let options = ServerOptions::new("far", tracker, stop.clone());
        let run = |task| tokio::spawn(stop.clone().run_until_cancelled_owned(task));
        run(rank(inbox, engine.clone(), seen.clone(), Random(delay)));
        tokio::spawn(stop.clone().run_until_cancelled_owned(edges(edge_inbox, engine.clone(), seen.clone())));
        tokio::spawn(server::serve(options, streams_out, services, reported));
        Self { engine, events, streams, stop }
    }

    /// Something happens there by itself.
    fn happen(&self, random: &mut Random) {
        let mut engine = self.engine.lock();
        let rank = RANK;
        let event = match (engine.prepared, random.below(4)) {
            (Some(incarnation), 0) if !engine.registered => {
                engine.registered = true;
                let frame = Bytes::from_static(b"\x80");
                NodeEvent::Rank(RankEvent::Registered { rank, incarnation, frame })
            }
            (Some(incarnation), 1) => {
                let routes = std::mem::take(&mut engine.routes);
                *engine = Engine { routes, wave: engine.wave, ..Engine::default() };
                NodeEvent::Rank(RankEvent::Lost { rank, incarnation, reason: "it died".to_owned() })
            }
            (Some(incarnation), 2) if engine.edge == Some(incarnation) => {
                if engine.subscribed {
                    engine.wave += 1;
                    let frame = start_wave_message(&Layout::newest(), rank, Wave(engine.wave), 0.0);
                    NodeEvent::Edge(EdgeEvent::Report { rank, incarnation, frame })
                } else {
                    engine.subscribed = true;
                    NodeEvent::Edge(EdgeEvent::Subscribed { rank, incarnation })
                }
            }
            (_, 3) => match engine.routes.pop_first() {
                Some(frontend) => NodeEvent::RouteLost(RouteLost {
                    frontend: FrontendId(frontend),
                    rank,
                    api_server: 0,
                    reason: "closed".to_owned(),
                }),
                None => NodeEvent::Wake(rank),
            },
            _ => NodeEvent::Wake(rank),
        };
        self.events.try_send(event).unwrap();
    }
}

async fn rank(
    mut inbox: mpsc::Receiver<Envelope<RankAsk>>,
    engine: Arc<Mutex<Engine>>,
    seen: Arc<Mutex<Seen>>,
    mut random: Random,
) {
    let mut last = 0;
    while let Some(Envelope { ask, reply, .. }) = inbox.recv().await {
        if random.one_in(4) {
            sleep(random.millis(200)).await;
        }
        let mut arrive = |number| seen.lock().arrive(number, &mut last);
        match ask {
            RankAsk::Prepare(Prepare { incarnation }) => {
                arrive(incarnation.0);
                let mut engine = engine.lock();
                if engine.prepared != Some(incarnation) {
                    let routes = std::mem::take(&mut engine.routes);
                    let prepared = Some(incarnation);
                    *engine = Engine { prepared, routes, wave: engine.wave, ..Engine::default() };
                }
                reply.send::<Prepare>(Ok(SlotAddresses { inputs: Vec::new(), outputs: Vec::new() }));
            }
            RankAsk::Admit(Admit { incarnation }) => {
                arrive(incarnation.0);
                reply.send::<Admit>(Ok(()));
            }
            RankAsk::EngineDown(EngineDown { incarnation, reason }) => {
                arrive(reason.parse().unwrap());
                let mut engine = engine.lock();
                if engine.prepared == Some(incarnation) {
                    let routes = std::mem::take(&mut engine.routes);
                    *engine = Engine { routes, wave: engine.wave, ..Engine::default() };
                }
                reply.send::<EngineDown>(Ok(()));
            }
            RankAsk::Call(call) => {
                arrive(call.method.parse().unwrap());
                // Answers in its own time.
                let pause = random.millis(800);
                tokio::spawn(async move {
                    sleep(pause).await;
                    reply.send::<Call>(Ok(rmpv::Value::Nil));
                });
            }
            RankAsk::OpenRoute(route) => {
                arrive(route.frontend.0);
                engine.lock().routes.insert(route.frontend.0);
                reply.send::<OpenRoute>(Ok(Slot(1)));
            }
            RankAsk::CloseRoutes(CloseRoutes { frontend, .. }) => {
                engine.lock().routes.remove(&frontend.0);
                reply.send::<CloseRoutes>(Ok(()));
            }
            RankAsk::Admission(_) => reply.send::<Admission>(Ok(())),
            other => panic!("not asked for here: {other:?}"),
        }
    }
}

async fn edges(
    mut inbox: mpsc::Receiver<Envelope<EdgeAsk>>,
    engine: Arc<Mutex<Engine>>,
    seen: Arc<Mutex<Seen>>,
) {
    let mut last = 0;
    while let Some(Envelope { ask, reply, .. }) = inbox.recv().await {
        match ask {
            EdgeAsk::EdgePrepare(EdgePrepare { incarnation, .. }) => {
                let mut engine = engine.lock();
                if engine.edge != Some(incarnation) {
                    engine.edge = Some(incarnation);
                    engine.subscribed = false;
                }
                reply.send::<EdgePrepare>(Ok((String::new(), String::new())));
            }
            EdgeAsk::EdgePublish(EdgePublish { frames, .. }) => {
                let number = std::str::from_utf8(&frames[0]).unwrap().parse().unwrap();
                seen.lock().arrive(number, &mut last);
                reply.send::<EdgePublish>(Ok(()));
            }
            other => panic!("not asked for here: {other:?}"),
        }
    }
}

/// Who asks: what it knows is what it was answered and told.
struct Near {
    handles: NodeHandles,
    events: mpsc::Receiver<NodeEvent>,
    known: NodeState,
    waiting: Vec<(u64, NodeAsk, Answered)>,
    /// Routes and engines of which it is not known whether they were made: routes are closed, as attachments do it, and
    /// engines are given up, as the node task does it.
    doubtful: Vec<RankAsk>,
    next: u64,
    seen: Arc<Mutex<Seen>>,
}

impl Near {
    fn ask(&mut self, random: &mut Random) {
        self.next += 1;
        let number = self.next;
        let now = self.known.ranks.entry(RANK).or_default().clone();
        let ask = match (random.below(8), now.prepared) {
            (0, _) => NodeAsk::Rank(RANK, Prepare { incarnation: Incarnation(number) }.into()),
            (1, Some(incarnation)) => NodeAsk::Edge(EdgePrepare { rank: RANK, incarnation }.into()),
            (2, Some(incarnation)) if random.one_in(3) => {
                NodeAsk::Rank(RANK, EngineDown { incarnation, reason: number.to_string() }.into())
            }
            (3, _) => NodeAsk::Rank(RANK, Admit { incarnation: Incarnation(number) }.into()),
            (4, _) => {
                let open = OpenRoute {
                    frontend: FrontendId(number),
                    api_server: 0,
                    input_address: String::new(),
                    output_address: String::new(),
                    registration: Bytes::new(),
                    connect_timeout: Duration::from_secs(5),
                };
                NodeAsk::Rank(RANK, open.into())
            }
            (5, _) if !now.routes.is_empty() => {
                NodeAsk::Rank(RANK, CloseRoutes { frontend: now.routes[0].0, orphaned: false }.into())
            }
            (6, _) => {
                let frames = vec![Bytes::from(number.to_string())];
                NodeAsk::Edge(EdgePublish { ranks: vec![RANK], frames }.into())
            }
            _ => {
                let timeout = Duration::from_secs(20);
                let call =
                    Call { key: Uuid::from_u128(1), method: number.to_string(), args: Vec::new(), timeout };
                NodeAsk::Rank(RANK, call.into())
            }
        };
        self.send(number, ask);
    }

    fn send(&mut self, number: u64, ask: NodeAsk) {
        let about = ask.about();
        self.seen.lock().asked.insert(number, (Instant::now(), about.limit, about.delivery));
        let (reply, answered) = ReplyTo::channel();
        self.known.apply_ask(&ask);
        let sent = match ask.clone() {
            NodeAsk::Rank(_, ask) => {
                self.handles.ranks[0].commands.offer(Envelope { ask, limit: about.limit, reply }).is_ok()
            }
            NodeAsk::Edge(ask) => edge(&self.handles.edge, ask, about.limit, reply),
            other => panic!("not asked for here: {other:?}"),
        };
        assert!(sent, "the queue of a task is full");
        self.waiting.push((number, ask, answered));
    }

    /// Reads answers and events in the order in which they came: an answer is there before later events.
    fn read(&mut self) {
        self.answers();
        while let Ok(event) = self.events.try_recv() {
            self.answers();
            if !matches!(event, NodeEvent::Connected(_)) {
                self.known.apply_event(&event);
            }
        }
        for mut ask in std::mem::take(&mut self.doubtful) {
            self.next += 1;
            if let RankAsk::EngineDown(down) = &mut ask {
                down.reason = self.next.to_string();
            }
            self.send(self.next, NodeAsk::Rank(RANK, ask));
        }
    }

    fn answers(&mut self) {
        for (number, ask, mut answered) in std::mem::take(&mut self.waiting) {
            match answered.try_recv() {
                Ok(result) => {
                    self.known.apply_answer(&ask, result.as_ref());
                    match (&ask, &result) {
                        (NodeAsk::Rank(_, RankAsk::OpenRoute(route)), Err(_)) => {
                            self.doubtful
                                .push(CloseRoutes { frontend: route.frontend, orphaned: false }.into());
                        }
                        (NodeAsk::Rank(_, RankAsk::Prepare(Prepare { incarnation })), Err(_)) => {
                            let (incarnation, reason) = (*incarnation, String::new());
                            self.doubtful.push(EngineDown { incarnation, reason }.into());
                        }
                        _ => {}
                    }
                }
                Err(tokio::sync::oneshot::error::TryRecvError::Empty) => {
                    self.waiting.push((number, ask, answered));
                }
                Err(_) => self.known.apply_answer(&ask, Err(&HandleError::failed("dropped"))),
            }
        }
    }
}

fn edge(handle: &EdgeHandle, ask: EdgeAsk, limit: Duration, reply: ReplyTo) -> bool {
    handle.offer(Envelope { ask, limit, reply }).is_ok()
}

/// One direction of a wire.
async fn pump(mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin, mut random: Random) {
    let mut piece = [0; 512];
    loop {
        let room = 1 + usize::try_from(random.below(511)).unwrap();
        let Ok(read) = from.read(&mut piece[..room]).await else { return };
        if random.one_in(3) {
            sleep(random.millis(60)).await;
        }
        if read == 0 || to.write_all(&piece[..read]).await.is_err() {
            return;
        }
    }
}

/// Makes a connection; the two ends may learn of it at different times, the wire is cut when this is aborted.
async fn connect(far: &Far, links: &mpsc::Sender<Link>, random: &mut Random) -> JoinHandle<()> {
    let (ours, near): (DuplexStream, DuplexStream) = duplex(1 << 16);
    let (far_end, theirs) = duplex(1 << 16);
    let (near_read, near_write) = tokio::io::split(near);
    let (far_read, far_write) = tokio::io::split(far_end);
    let (there, back) = (Random(random.below(u64::MAX)), Random(random.below(u64::MAX)));
    let wire = tokio::spawn(async move {
        tokio::join!(pump(near_read, far_write, there), pump(far_read, near_write, back));
    });
    let (ours, theirs) = (LinkStream::new(ours, "far"), LinkStream::new(theirs, "near"));
    if random.one_in(2) {
        far.streams.send(theirs).await.unwrap();
        sleep(random.millis(50)).await;
        links.send(Link::Stream(ours)).await.unwrap();
    } else {
        links.send(Link::Stream(ours)).await.unwrap();
        sleep(random.millis(50)).await;
        far.streams.send(theirs).await.unwrap();
    }
    wire
}

async fn world(seed: u64) -> Result<(), Violation> {
    let mut random = Random(seed);
    let seen = Arc::new(Mutex::new(Seen::default()));
    let mut far = Far::start(&seen, random.below(u64::MAX));
    let (events_in, events) = mpsc::channel(server::EVENTS);
    let (links, links_out) = mpsc::channel(4);
    let stop = CancellationToken::new();
    let options = ClientOptions::new("far", vec![RANK], stop.clone());
    let (handles, mut status) = client::spawn(options, links_out, events_in, &TaskTracker::new());
    let (known, waiting) = (NodeState::default(), Vec::new());
    let doubtful = Vec::new();
    let mut near = Near { handles, events, known, waiting, doubtful, next: 0, seen: seen.clone() };
    let mut wire = connect(&far, &links, &mut random).await;
    for _ in 0..60 {
        match random.below(24) {
            0 => wire.abort(),
            1 => {
                wire.abort();
                // Sometimes for longer than a command is of use.
                sleep(if random.one_in(4) { Duration::from_secs(15) } else { random.millis(300) }).await;
                wire = connect(&far, &links, &mut random).await;
            }
            2 if random.one_in(3) => {
                wire.abort();
                far.stop.cancel();
                far = Far::start(&seen, random.below(u64::MAX));
                links.send(Link::Gone("it died".to_owned())).await.unwrap();
                wire = connect(&far, &links, &mut random).await;
            }
            3..=9 => far.happen(&mut random),
            10..=17 => near.ask(&mut random),
            _ => sleep(random.millis(150)).await,
        }
        near.read();
    }
    wire.abort();
    let wire = connect(&far, &links, &mut random).await;
    let rest = Instant::now() + REST;
    while Instant::now() < rest && (!near.waiting.is_empty() || !status.borrow_and_update().connected) {
        sleep(Duration::from_millis(100)).await;
        near.read();
    }
    if let Some((number, ask, _)) = near.waiting.first() {
        let what = format!("command {number} ({}) was not answered", ask.about().name);
        return Err(Violation { law: "answered", what });
    }
    let state = timeout(REST, near.handles.link.ask(GetState {})).await.unwrap();
    let state = state.map_err(|error| Violation { law: "answered", what: error.to_string() })?;
    near.read();
    wire.abort();
    stop.cancel();
    far.stop.cancel();
    if let Some(violation) = seen.lock().violation.take() {
        return Err(violation);
    }
    let said = |state: &NodeState| {
        let rank = state.ranks.get(&RANK).cloned().unwrap_or_default();
        let alive = rank.prepared.is_some();
        let routes: BTreeSet<_> = rank.routes.into_iter().collect();
        let wave = rank.wave_report.filter(|_| alive);
        (rank.prepared, rank.registered, rank.subscribed && alive, wave, routes)
    };
    if said(&near.known) != said(&state) {
        let what = format!("{:?} was heard of, it is {:?}", said(&near.known), said(&state));
        return Err(Violation { law: "state", what });
    }
    Ok(())
}

fn run(seed: u64) -> Result<(), Violation> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(world(seed))
}

#[test]
fn two_ends_agree_over_a_wire_that_delays_and_cuts() {
    let seeds = std::env::var("SIM_SEEDS").map_or(SEEDS, |seeds| seeds.parse().unwrap());
    for seed in FAILED_ONCE.into_iter().chain(0..seeds) {
        if let Err(violation) = run(seed) {
            panic!("seed {seed}: {violation}");
        }
    }
}

#[test]
fn each_mutation_is_caught_by_its_law() {
    for (mutation, law) in [
        (Mutation::ForgetAnswers, "once"),
        (Mutation::ForgetRunning, "once"),
        (Mutation::AskSuccessor, "once"),
        (Mutation::SendBackwards, "order"),
        (Mutation::NeverExpire, "expired"),
        (Mutation::LoseAnswers, "answered"),
        (Mutation::MissNothing, "state"),
        (Mutation::KeepRoutes, "state"),
    ] {
        let found = mutation::with(mutation, || (0..SEARCHED).find_map(|seed| run(seed).err()));
        let found = found.unwrap_or_else(|| panic!("{mutation:?} is not caught"));
        assert_eq!(found.law, law, "{mutation:?}: {found}");
    }
}
