//! The task of one wanted frontend: pumps its attachment machine.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::handshake::{Hello, Ready};
use dp_sidecar_protocol::machine::attachment::{
    Action, Attachment, Attempt, Engines, Event, Snapshot, State,
};
use dp_sidecar_protocol::registration::with_dp_stats_address;
use dp_sidecar_protocol::{EngineIndex, Frames, FrontendId};
use futures::future::join_all;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::super::Clock;
use super::super::handles::{
    AdoptRoute, Ask, CloseRoutes, CoordinatorCommand, Deployment, EngineFacts, ForFrontendCoordinator,
    OpenRoute, RankAsk, RankHandle, Reply,
};
use super::super::rank::say_dead;
use super::{Attached, Shared, sockets};
use crate::api::FrontendSnapshot;

/// Events waiting for the machine.
const EVENTS: usize = 256;
/// Messages of the engines waiting for this frontend's DP coordinator.
const COORDINATOR_QUEUE: usize = 1024;
/// Messages waiting for one socket.
const SOCKET_QUEUE: usize = 64;
/// How often free slots are looked at while they matter.
const SLOTS_INTERVAL: Duration = Duration::from_millis(500);
/// For a node that has lost its connection to this one to have it again, and say what became of a route.
const ADOPT_LIMIT: Duration = Duration::from_secs(30);
/// For a rank to close the routes of a frontend.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

pub(super) struct Task {
    shared: Arc<Shared>,
    /// Number of this task among all there have been.
    number: u64,
    address: String,
    machine: Attachment,
    attempt: Option<Running>,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    clock: Clock,
    shown: Option<Snapshot>,
    finished: bool,
    /// How a predecessor attached it.
    adopt: Option<Attached>,
    /// Tasks that try the address, and that close attempts.
    tasks: TaskTracker,
    /// Ends the tries.
    stop: CancellationToken,
    _ended: DropGuard,
}

/// The sockets and tasks of one attempt.
struct Running {
    attempt: Attempt,
    id: FrontendId,
    /// The engines as the frontend is told of them.
    engines: BTreeMap<EngineIndex, EngineFacts>,
    stop: CancellationToken,
    tasks: TaskTracker,
    handshakes: BTreeMap<EngineIndex, mpsc::Sender<Frames>>,
    coordinator: BTreeMap<EngineIndex, mpsc::Sender<Bytes>>,
    joined: bool,
    routed: bool,
}

impl Running {
    /// Ends with the attempt.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(self.stop.clone().run_until_cancelled_owned(task));
    }
}

impl Task {
    pub(super) fn new(
        shared: Arc<Shared>,
        number: u64,
        address: String,
        adopt: Option<Attached>,
        ended: DropGuard,
    ) -> Self {
        let (events, inbox) = mpsc::channel(EVENTS);
        Self {
            machine: Attachment::new(&address, shared.config.stall),
            shared,
            number,
            address,
            attempt: None,
            events,
            inbox,
            clock: Clock::start(),
            shown: None,
            finished: false,
            adopt,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            _ended: ended,
        }
    }

    /// Runs until removed and detached.
    pub(super) async fn run(
        mut self,
        mut removed: oneshot::Receiver<Reply<()>>,
        predecessor: Option<CancellationToken>,
    ) {
        if let Some(predecessor) = predecessor {
            predecessor.cancelled().await;
        }
        if let Some(attached) = self.adopt.take() {
            self.adopt(&attached);
        }
        let mut deployment = self.shared.deployment.clone();
        let first = engines(&deployment.borrow_and_update());
        self.feed(first);
        let mut reply = None;
        while !self.finished {
            self.publish();
            let slots_matter = self
                .shown
                .as_ref()
                .is_some_and(|shown| shown.state == State::Refused && shown.attempt.is_some());
            tokio::select! {
                Some(event) = self.inbox.recv() => self.feed(event),
                Ok(()) = deployment.changed() => {
                    let event = engines(&deployment.borrow_and_update());
                    self.feed(event);
                }
                asked = &mut removed, if reply.is_none() => {
                    // A manager that has gone wants the same.
                    reply = Some(asked.ok());
                    self.feed(Event::Remove);
                }
                () = self.clock.reach(self.machine.poll_timeout()) => {
                    self.machine.handle_timeout(self.clock.now());
                    self.perform();
                }
                () = tokio::time::sleep(SLOTS_INTERVAL), if slots_matter => {
                    self.feed(Event::FreeSlots(0));
                }
            }
        }
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.shared.claims.lock().remove(&self.number);
        self.shared.records.lock().remove(&self.address);
        self.shared.snapshots.send_modify(|all| all.retain(|shown| shown.address != self.address));
        if let Some(Some(reply)) = reply {
            let _ = reply.send(Ok(()));
        }
    }

    /// Goes on where a predecessor was killed.
    fn adopt(&mut self, attached: &Attached) {
        let (size, kind) = {
            let deployment = self.shared.deployment.borrow();
            (deployment.size, deployment.kind)
        };
        let engines = &attached.engines;
        let same = engines.size == size && engines.lockstep == kind.is_lockstep();
        tracing::info!(
            frontend.addr = %self.address, id = attached.id.0, complete = attached.complete, same,
            "frontend of the previous sidecar"
        );
        // Numbered by the machine: its first.
        self.begin(1, attached.id).routed = true;
        let Attached { engines, addresses, .. } = attached.clone();
        self.feed(Event::Adopt { engines, addresses, complete: attached.complete && same });
    }

    /// Hands an event to the machine. Slots are counted and claimed in one go with it.
    fn feed(&mut self, event: Event) {
        let now = self.clock.now();
        {
            let mut claims = self.shared.claims.lock();
            let free = self.shared.free_slots(&claims, self.number);
            self.machine.handle_event(now, Event::FreeSlots(free));
            if !matches!(event, Event::FreeSlots(_)) {
                self.machine.handle_event(now, event);
            }
            claims.insert(self.number, self.machine.snapshot().slots_claimed);
        }
        self.perform();
    }

    fn publish(&mut self) {
        let snapshot = self.machine.snapshot();
        if self.shown.as_ref() == Some(&snapshot) {
            return;
        }
        let shown = FrontendSnapshot {
            address: self.address.clone(),
            id: self
                .attempt
                .as_ref()
                .filter(|running| Some(running.attempt) == snapshot.attempt)
                .map(|running| running.id.0),
            state: snapshot.state.to_string(),
            api_servers: snapshot.api_servers,
            detail: snapshot.detail.clone(),
            attachments: snapshot.attachments,
        };
        tracing::debug!(frontend.addr = %self.address, state = shown.state, detail = shown.detail, "attachment");
        self.shared.snapshots.send_modify(|all| {
            match all.iter_mut().find(|known| known.address == self.address) {
                Some(known) => *known = shown,
                None => all.push(shown),
            }
        });
        self.shown = Some(snapshot);
    }

    fn perform(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::Probe { attempt } => self.probe(attempt),
                Action::ConnectHandshake { attempt, rank } => self.connect_handshake(attempt, rank),
                Action::SendHello { rank, .. } => {
                    self.say(rank, Hello::HEADLESS.encode());
                }
                Action::ConnectCoordinator { attempt, rank, input, output } => {
                    self.connect_coordinator(attempt, rank, input, output)
                }
                Action::OpenRoute { rank, api_server, input, output, stats_address, .. } => {
                    self.open_route(rank, api_server, input, output, stats_address.as_deref())
                }
                Action::AdoptRoute { rank, api_server, .. } => self.adopt_route(rank, api_server),
                Action::JoinCoordinator { .. } => self.join_coordinator(),
                Action::SendReady { rank, stats_address, .. } => self.send_ready(rank, stats_address),
                Action::CloseHandshake { .. } => {
                    if let Some(running) = &mut self.attempt {
                        running.handshakes.clear();
                    }
                }
                Action::StartWave { wave } => {
                    let Some(running) = &self.attempt else { continue };
                    let command = CoordinatorCommand::StartWave { frontend: running.id, wave };
                    // The engines are woken by the request itself, too.
                    if self.shared.coordinator.commands.try_send(command).is_err() {
                        tracing::warn!(frontend.addr = %self.address, "START_DP_WAVE dropped: the coordinator task is behind");
                    }
                }
                Action::Attached { api_servers, .. } => {
                    let id = self.attempt.as_ref().map(|running| running.id.0);
                    self.shared.records.lock().complete(&self.address);
                    tracing::info!(frontend.addr = %self.address, id, api_servers, "frontend attached");
                }
                Action::Refused { error } => tracing::warn!("{error}"),
                Action::Teardown { attempt, told_dead, reason } => {
                    self.tear_down(attempt, told_dead, &reason)
                }
                Action::Done => {
                    tracing::info!(frontend.addr = %self.address, "frontend removed");
                    self.finished = true;
                }
            }
        }
    }

    fn probe(&mut self, attempt: Attempt) {
        let (address, model) = (self.address.clone(), self.shared.config.model.clone());
        let size = self.shared.deployment.borrow().size;
        let limit = self.shared.config.connect_timeout;
        let events = self.events.clone();
        let probe = async move {
            let event = match sockets::probe(&address, model.as_deref(), size, limit).await {
                Ok((peer, mismatch)) => Event::ProbeOk { attempt, peer, mismatch },
                Err(reason) => Event::ProbeFailed { attempt, reason },
            };
            let _ = events.send(event).await;
        };
        self.tasks.spawn(self.stop.clone().run_until_cancelled_owned(probe));
    }

    /// What belongs to this attempt; the first call makes it.
    fn running(&mut self, attempt: Attempt) -> &mut Running {
        match self.attempt.take() {
            Some(running) if running.attempt == attempt => self.attempt.insert(running),
            _ => {
                let id = self.shared.next_id();
                self.begin(attempt, id)
            }
        }
    }

    /// The one before was torn down.
    fn begin(&mut self, attempt: Attempt, id: FrontendId) -> &mut Running {
        self.shared.losses.lock().insert(id, (attempt, self.events.clone()));
        self.attempt.insert(Running {
            attempt,
            id,
            engines: self.shared.deployment.borrow().engines.clone(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            handshakes: BTreeMap::new(),
            coordinator: BTreeMap::new(),
            joined: false,
            routed: false,
        })
    }

    fn line(&self, attempt: Attempt, rank: EngineIndex) -> sockets::Line {
        let limit = self.shared.config.connect_timeout;
        sockets::Line { attempt, rank, limit, events: self.events.clone() }
    }

    fn connect_handshake(&mut self, attempt: Attempt, rank: EngineIndex) {
        let (line, address) = (self.line(attempt, rank), format!("tcp://{}", self.address));
        let (sender, outgoing) = mpsc::channel(SOCKET_QUEUE);
        let running = self.running(attempt);
        running.handshakes.insert(rank, sender);
        running.spawn(line.handshake(address, outgoing));
    }

    fn connect_coordinator(&mut self, attempt: Attempt, rank: EngineIndex, input: String, output: String) {
        let line = self.line(attempt, rank);
        let (sender, outgoing) = mpsc::channel(SOCKET_QUEUE);
        let running = self.running(attempt);
        running.coordinator.insert(rank, sender);
        running.spawn(line.coordinator(input, output, outgoing));
    }

    fn say(&self, rank: EngineIndex, payload: Bytes) {
        let sent = self
            .attempt
            .as_ref()
            .and_then(|running| running.handshakes.get(&rank))
            .is_some_and(|socket| socket.try_send(vec![payload]).is_ok());
        if !sent {
            // Its task has reported the loss.
            tracing::debug!(frontend.addr = %self.address, %rank, "handshake socket is gone");
        }
    }

    fn send_ready(&self, rank: EngineIndex, stats_address: Option<String>) {
        let ready = self.attempt.as_ref().and_then(|running| running.engines.get(&rank)).map(|facts| {
            Ready {
                local: Hello::HEADLESS.local,
                headless: Hello::HEADLESS.headless,
                num_gpu_blocks: facts.num_gpu_blocks,
                dp_stats_address: stats_address,
                parallel_config_hash: facts.parallel_config_hash.clone(),
            }
            .encode(&facts.layout)
        });
        match ready {
            Some(payload) => self.say(rank, payload),
            None => tracing::error!(%rank, "facts of a registered engine are missing"),
        }
    }

    fn open_route(
        &mut self,
        rank: EngineIndex,
        api_server: u32,
        input: String,
        output: String,
        stats_address: Option<&str>,
    ) {
        let limit = self.shared.config.route_timeout;
        let Some(running) = &mut self.attempt else {
            return;
        };
        if !std::mem::replace(&mut running.routed, true)
            && let Some((engines, addresses)) = self.machine.terms()
        {
            // Before the first route is there: a successor must know of every one.
            let (engines, addresses) = (engines.clone(), addresses.clone());
            let attached = Attached { id: running.id, complete: false, engines, addresses };
            self.shared.records.lock().attached(&self.address, Some(attached));
        }
        let facts = running.engines.get(&rank).ok_or_else(|| format!("nothing is known about rank {rank}"));
        let route = facts.and_then(|facts| {
            let registration = with_dp_stats_address(&facts.registration, stats_address);
            Ok(OpenRoute {
                frontend: running.id,
                api_server,
                input_address: input,
                output_address: output,
                registration: registration
                    .map_err(|error| format!("ready response of rank {rank}: {error}"))?,
                connect_timeout: limit,
            })
        });
        self.route(rank, api_server, limit + CLOSE_LIMIT, route);
    }

    fn adopt_route(&mut self, rank: EngineIndex, api_server: u32) {
        if let Some(running) = &self.attempt {
            let adopt = AdoptRoute { frontend: running.id, api_server };
            self.route(rank, api_server, ADOPT_LIMIT, Ok(adopt));
        }
    }

    /// Has a rank open a route, and reports what comes of it.
    fn route<A: Ask>(&self, rank: EngineIndex, api_server: u32, limit: Duration, ask: Result<A, String>)
    where
        RankAsk: From<A>,
    {
        let Some(running) = &self.attempt else {
            return;
        };
        let attempt = running.attempt;
        let handle = self.shared.ranks.iter().find(|handle| handle.rank == rank).cloned();
        let events = self.events.clone();
        let open = async move {
            let result = match (handle, ask) {
                (Some(handle), Ok(ask)) => {
                    handle.ask_within(limit, ask).await.map_err(|error| error.to_string())
                }
                (None, _) => Err(format!("there is no rank {rank} in this deployment")),
                (_, Err(reason)) => Err(reason),
            };
            let event = match result {
                Ok(_slot) => Event::RouteOpen { attempt, rank, api_server },
                Err(reason) => Event::RouteLost { attempt, rank, api_server, reason },
            };
            let _ = events.send(event).await;
        };
        running.spawn(open);
    }

    /// Asks the coordinator task for the engines' waves and stats, and hands them to the sockets of
    /// their ranks.
    fn join_coordinator(&mut self) {
        let commands = self.shared.coordinator.commands.clone();
        let Some(running) = &mut self.attempt else {
            return;
        };
        running.joined = true;
        let frontend = running.id;
        let sockets = running.coordinator.clone();
        let (sink, mut messages) = mpsc::channel::<ForFrontendCoordinator>(COORDINATOR_QUEUE);
        let pass = async move {
            let command = CoordinatorCommand::AddFrontend { frontend, sink };
            if commands.send(command).await.is_err() {
                return;
            }
            while let Some(message) = messages.recv().await {
                if let Some(socket) = sockets.get(&message.rank)
                    && socket.send(message.frame).await.is_err()
                {
                    return;
                }
            }
        };
        running.spawn(pass);
    }

    /// Closes everything of the attempt, then reports it. Runs beside the machine.
    fn tear_down(&mut self, attempt: Attempt, told_dead: Vec<String>, reason: &str) {
        tracing::info!(frontend.addr = %self.address, reason, "frontend detached");
        let events = self.events.clone();
        let shared = self.shared.clone();
        let running = self.attempt.take();
        let address = self.address.clone();
        // A task of its own: the attempt's tasks are what it waits for. It ends by its limits, and
        // the machine waits for its report.
        let close = async move {
            if let Some(running) = running {
                shared.losses.lock().remove(&running.id);
                running.stop.cancel();
                running.tasks.close();
                running.tasks.wait().await;
                if running.joined {
                    let command = CoordinatorCommand::RemoveFrontend { frontend: running.id };
                    let _ = shared.coordinator.commands.send(command).await;
                }
                let ranks = shared.ranks.iter().filter(|_| running.routed);
                let routes = join_all(ranks.map(|handle| close_routes(handle, running.id, false)));
                futures::join!(routes, join_all(told_dead.iter().map(|to| say_dead(to))));
                shared.records.lock().attached(&address, None);
            }
            let _ = events.send(Event::TornDown { attempt }).await;
        };
        self.tasks.spawn(close);
    }
}

/// Closes all routes of an attachment on one rank.
pub(super) async fn close_routes(handle: &RankHandle, frontend: FrontendId, orphaned: bool) {
    if let Err(error) = handle.ask_within(CLOSE_LIMIT, CloseRoutes { frontend, orphaned }).await {
        tracing::warn!(rank = %handle.rank, %frontend, %error, "routes are not closed");
    }
}

fn engines(deployment: &Deployment) -> Event {
    let missing: Vec<EngineIndex> =
        (0..deployment.size).map(EngineIndex).filter(|rank| !deployment.engines.contains_key(rank)).collect();
    if !missing.is_empty() || deployment.size == 0 {
        return Event::EnginesMissing(missing);
    }
    Event::EnginesComplete(Engines {
        size: deployment.size,
        lockstep: deployment.kind.is_lockstep(),
        parallel_config_hash: deployment
            .engines
            .values()
            .find_map(|facts| facts.parallel_config_hash.clone()),
    })
}
