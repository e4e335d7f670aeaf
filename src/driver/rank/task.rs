//! The loop of a rank task.

mod commands;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use dp_sidecar_protocol::machine::virtual_engine::{self, Action, Event, VirtualEngine};
use dp_sidecar_protocol::{EngineIndex, Frames, FrontendId, Incarnation, Slot, Time};
use futures::FutureExt;
use futures::stream::{SelectAll, StreamExt};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::calls::Calls;
use super::engine::EngineSockets;
use super::routes::{self, Route};
use super::{Input, LAST_FLUSH, RankConfig, Source};
use crate::driver::handles::{
    Admission, Admit, AdoptRoute, CloseRoutes, EngineDown, EngineReady, Envelope, GroupKind, HandleError,
    NodeEvent, OpenRoute, Prepare, RankAsk, RankEvent, RankSnapshot, Release, ReplyTo, RouteLost, SetLimits,
    SlotAddresses, Slots,
};
use crate::driver::{Clock, arm};
use crate::log_limit::LogLimit;
use crate::transport::{Connected, Received, TransportError};

/// Inputs handled before routes are flushed and commands are looked at again.
const TURN: usize = 16;
/// Between two snapshots.
pub(super) const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(50);
/// Between two log lines about refused messages.
const REFUSED_INTERVAL: Duration = Duration::from_secs(1);

/// A route that is being connected.
struct Opening {
    epoch: u64,
    frontend: FrontendId,
}

/// Outcome of connecting.
struct Opened {
    epoch: u64,
    slot: u32,
    request: OpenRoute,
    reply: ReplyTo,
    result: Result<(Connected, Connected), TransportError>,
}

pub(super) struct RankTask {
    config: RankConfig,
    outputs: mpsc::Sender<NodeEvent>,
    publish: watch::Sender<RankSnapshot>,
    machine: VirtualEngine,
    clock: Clock,
    sources: SelectAll<Source>,
    engine: Option<EngineSockets>,
    /// Numbers socket sets and routes, so that nothing late is taken for something new.
    next_epoch: u64,
    routes: BTreeMap<u32, Route>,
    /// How large a message of a frontend may be, for the readers of the routes.
    request_bytes: Arc<AtomicUsize>,
    /// Routes with something to write.
    dirty: BTreeSet<u32>,
    opening: BTreeMap<u32, Opening>,
    /// Routes that are being opened, and last words to those of orphans.
    connecting: JoinSet<Option<Opened>>,
    calls: Calls,
    releases: BTreeMap<u64, ReplyTo>,
    events: VecDeque<NodeEvent>,
    wake: bool,
    published: Instant,
    /// The engine of this rank is another one, or its admission changed: others act on that, so the
    /// snapshot must not lag behind.
    urgent: bool,
    /// Something may look different since then.
    changed: bool,
    refused: LogLimit<()>,
}

impl RankTask {
    pub(super) fn new(
        config: RankConfig,
        outputs: mpsc::Sender<NodeEvent>,
        publish: watch::Sender<RankSnapshot>,
    ) -> Self {
        Self {
            machine: VirtualEngine::new(config.machine.clone()),
            request_bytes: Arc::new(AtomicUsize::new(config.machine.limits.request_bytes)),
            config,
            outputs,
            publish,
            clock: Clock::start(),
            sources: SelectAll::new(),
            engine: None,
            next_epoch: 0,
            routes: BTreeMap::new(),
            dirty: BTreeSet::new(),
            opening: BTreeMap::new(),
            connecting: JoinSet::new(),
            calls: Calls::default(),
            releases: BTreeMap::new(),
            events: VecDeque::new(),
            wake: false,
            published: Instant::now(),
            urgent: false,
            changed: true,
            refused: LogLimit::new(REFUSED_INTERVAL, 1),
        }
    }

    const fn rank(&self) -> EngineIndex {
        self.config.machine.rank
    }

    fn epoch(&mut self) -> u64 {
        self.next_epoch += 1;
        self.next_epoch
    }

    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Envelope<RankAsk>>) {
        let mut timer = Box::pin(sleep_until(self.published));
        let events = self.outputs.clone();
        let stop = self.config.stop.clone();
        let mut stopped = Box::pin(stop.cancelled());
        loop {
            let armed = arm(timer.as_mut(), self.due());
            tokio::select! {
                () = &mut stopped => break,
                command = commands.recv() => match command {
                    Some(command) => self.handle_command(command).await,
                    None => break,
                },
                input = next(&mut self.sources) => self.handle_input(input).await,
                Some(opened) = self.connecting.join_next() => {
                    if let Ok(Some(opened)) = opened {
                        self.handle_opened(opened);
                    }
                }
                () = &mut timer, if armed => {
                    self.machine.handle_timeout(self.clock.now());
                }
                Ok(permit) = events.reserve(), if !self.events.is_empty() => {
                    if let Some(event) = self.events.pop_front() {
                        permit.send(event);
                    }
                }
            }
            self.perform().await;
            for _ in 1..TURN {
                let Some(Some(input)) = self.sources.next().now_or_never() else {
                    break;
                };
                self.handle_input(input).await;
                self.perform().await;
            }
            self.flush_routes();
            // A route may have been lost, which aborts requests on the engine.
            self.perform().await;
            self.publish();
        }
        self.stop().await;
    }

    fn due(&self) -> Option<Instant> {
        let machine = self.machine.poll_timeout().map(|time| self.clock.at(time));
        let snapshot = self.changed.then(|| self.published + SNAPSHOT_INTERVAL);
        machine.into_iter().chain(snapshot).min()
    }

    // === sockets ===

    async fn handle_input(&mut self, input: Input) {
        // A request that is held, for one, changes the snapshot without any action.
        self.changed = true;
        let now = self.clock.now();
        match input {
            Input::Engine { generation, slot, batch } => {
                let Some(incarnation) = self.incarnation_of(generation) else {
                    return;
                };
                for frames in batch {
                    let event = Event::FromEngine { incarnation, slot: Slot(slot), frames };
                    self.machine.handle_event(now, event);
                }
            }
            Input::Registered { generation, slot, frames } => {
                if self.incarnation_of(generation).is_some() {
                    self.engine_registered(slot, frames).await;
                }
            }
            Input::EngineGone { generation, reason } => {
                if self.incarnation_of(generation).is_some() {
                    self.engine_lost(reason);
                }
            }
            Input::Frontend { epoch, slot, batch } => {
                if !self.is_current(slot, epoch) {
                    return;
                }
                let slot = Slot(slot);
                for received in batch {
                    let event = match received {
                        Received::Message(frames) => Event::FromFrontend { slot, frames },
                        Received::TooLarge { head, size } => Event::TooLarge { slot, head, size },
                    };
                    self.machine.handle_event(now, event);
                }
            }
            Input::RouteGone { epoch, slot, reason } => {
                if self.is_current(slot, epoch) {
                    self.route_lost(slot, reason);
                }
            }
            Input::Writable { epoch, slot } => {
                if let Some(route) = self.routes.get_mut(&slot)
                    && route.epoch == epoch
                {
                    route.blocked = false;
                    self.dirty.insert(slot);
                }
            }
        }
    }

    fn incarnation_of(&self, generation: u64) -> Option<Incarnation> {
        let engine = self.engine.as_ref()?;
        (engine.generation == generation).then_some(engine.incarnation)
    }

    fn is_current(&self, slot: u32, epoch: u64) -> bool {
        self.routes.get(&slot).is_some_and(|route| route.epoch == epoch)
    }

    async fn engine_registered(&mut self, slot: u32, frames: Frames) {
        let Some(engine) = self.engine.as_mut() else {
            return;
        };
        let incarnation = engine.incarnation;
        match engine.registered(slot).await {
            Ok(true) if slot == Slot::CONTROL.0 => {
                let frame = frames.into_iter().next().unwrap_or_default();
                let registered = RankEvent::Registered { rank: self.rank(), incarnation, frame };
                self.events.push_back(NodeEvent::Rank(registered));
            }
            Ok(_) => {}
            Err(error) => self.engine_lost(error.to_string()),
        }
    }

    fn route_lost(&mut self, slot: u32, reason: String) {
        let Some(route) = self.routes.remove(&slot) else {
            return;
        };
        let report =
            RouteLost { frontend: route.frontend, rank: self.rank(), api_server: route.api_server, reason };
        tracing::info!(
            rank = %report.rank,
            frontend = %report.frontend,
            api_server = report.api_server,
            reason = report.reason,
            "route lost"
        );
        self.events.push_back(NodeEvent::RouteLost(report));
        self.machine.handle_event(self.clock.now(), Event::CloseSlot { slot: Slot(slot) });
    }

    // === actions ===

    async fn perform(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            self.changed = true;
            match action {
                Action::ToEngine { slot, frames } => {
                    if let Some(engine) = self.engine.as_mut()
                        && let Err(error) = engine.send(slot.0, frames).await
                    {
                        self.engine_lost(error.to_string());
                    }
                }
                Action::ToFrontend { slot, frames } => {
                    if let Some(route) = self.routes.get_mut(&slot.0) {
                        route.push(frames);
                        self.dirty.insert(slot.0);
                    }
                }
                Action::HeldCall(call) => self.events.push_back(NodeEvent::Held(call)),
                Action::Released { ticket, result } => {
                    if let Some(reply) = self.releases.remove(&ticket) {
                        reply.send::<Release>(result.map_err(HandleError::failed));
                    }
                }
                Action::CallAnswered { token, result } => {
                    let result = result.map_err(|error| self.call_error(error));
                    self.calls.answer(token, &result);
                }
                Action::Wake => self.wake = true,
                Action::EngineDead { reason } => self.engine_lost(reason),
                Action::Refused { slot, reason } => self.log_refused(slot, &reason),
                Action::SlotFree { slot } => {
                    tracing::debug!(rank = %self.rank(), %slot, "slot is free");
                }
            }
        }
        if std::mem::take(&mut self.wake) && self.config.kind == GroupKind::Lockstep {
            // Full: the wakes in the queue are handled after this request was sent.
            let _ = self.outputs.try_send(NodeEvent::Wake(self.rank()));
        }
    }

    fn call_error(&self, error: virtual_engine::CallError) -> HandleError {
        match error {
            virtual_engine::CallError::Deadline(limit) => HandleError::Deadline {
                what: format!("a call of the engine of DP rank {}", self.rank()),
                limit,
            },
            error => HandleError::failed(error.to_string()),
        }
    }

    fn log_refused(&mut self, slot: Slot, reason: &str) {
        let Some(more) = self.refused.admit(()) else { return };
        let frontend = self.routes.get(&slot.0).map(|route| route.frontend.0);
        tracing::warn!(rank = %self.rank(), %slot, frontend, more, reason, "message refused");
    }

    /// Writes what the routes have queued, as far as they take it.
    fn flush_routes(&mut self) {
        for slot in std::mem::take(&mut self.dirty) {
            let Some(route) = self.routes.get_mut(&slot) else {
                continue;
            };
            let limit = self.config.machine.limits.unread_bytes;
            let flushed = if route.blocked { Ok(true) } else { route.outputs.try_flush() };
            let queued = route.queued();
            match flushed {
                Err(error) => self.route_lost(slot, error.to_string()),
                Ok(_) if queued > limit => {
                    let reason = format!(
                        "it does not read its answers: {queued} bytes wait, at most {limit} (--max-unread-bytes)"
                    );
                    self.route_lost(slot, reason);
                }
                Ok(true) => {}
                Ok(false) => {
                    route.blocked = true;
                    self.sources.push(routes::writable_source(route, slot));
                }
            }
        }
    }

    fn publish(&mut self) {
        let now = Instant::now();
        let due = now - self.published >= SNAPSHOT_INTERVAL;
        // Before anybody hears the answer to the call that changed it.
        self.urgent |= self.machine.memory() != self.publish.borrow().memory;
        if !(self.urgent || self.changed && due) {
            return;
        }
        self.urgent = false;
        self.published = now;
        self.changed = false;
        let machine = self.machine.snapshot();
        let snapshot = RankSnapshot {
            rank: self.rank(),
            incarnation: machine.incarnation,
            admitted: machine.admitted,
            admission_open: machine.gate_open,
            in_flight: machine.in_flight.iter().map(|(id, n)| (id.0, *n)).collect(),
            held: machine.held,
            slots: Slots {
                occupied: machine.occupied,
                draining: machine.draining,
                all: self.config.machine.frontend_slots,
            },
            held_bytes: machine.held_bytes as u64,
            refused: machine.refused,
            last_refusal: machine.last_refusal,
            memory: machine.memory,
        };
        self.publish.send_replace(snapshot);
    }

    /// Answers what is in flight, gives the answers a moment to get out, and ends.
    async fn stop(mut self) {
        if let Some(engine) = self.engine.take() {
            let reason = "the sidecar stops".to_owned();
            let event = Event::Down { incarnation: engine.incarnation, reason };
            self.machine.handle_event(self.clock.now(), event);
        }
        self.perform().await;
        let flush = async {
            for route in self.routes.values_mut() {
                let _ = route.outputs.flush().await;
            }
        };
        let _ = timeout(LAST_FLUSH, flush).await;
        self.connecting.shutdown().await;
    }
}

/// The next input; waits for ever when there is nothing to read from.
async fn next(sources: &mut SelectAll<Source>) -> Input {
    match sources.next().await {
        Some(input) => input,
        None => pending().await,
    }
}
