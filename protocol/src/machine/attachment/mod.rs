//! Attachment of the deployment's virtual engines to one frontend, and what to do when it goes away.
//!
//! What the machine plays is what `N` headless engines do at startup (`vllm/v1/engine/core.py` 0.32.0,
//! `startup_handshake` and `process_input_sockets`; the other side is `vllm/v1/engine/utils.py`,
//! `wait_for_engine_startup`): HELLO, INIT, registration on every input socket, the DP coordinator's
//! READY, then READY. Three rules come from the frontend:
//!
//! * A frontend dies of a second HELLO or READY, and of HELLO from a rank it does not know. All
//!   handshake sockets of an attempt are connected, and have stayed so for a moment, before the first
//!   HELLO; they never reconnect; and HELLO is said rank by rank, so that what closed the connection
//!   can be told. A stalled handshake is reported but never restarted; only a closed connection ends
//!   it.
//! * Its handshake socket exists during startup only. While attached nobody connects to it; after
//!   a loss the address is tried until a fresh connection is accepted, which is the successor.
//! * Its data sockets are served by a process that outlives this machine, so a successor goes on with them
//!   ([`Event::Adopt`]); what it has to connect again is the frontend's DP coordinator, which does not mind.
//! * Its DP coordinator says READY when *all* its engines have subscribed. One that never says it
//!   waits for more engines than there are.
//!
//! The sockets that INIT names are connected on the frontend's own host only: a frontend that named one of an engine,
//! or of another host, would cost others that engine.

mod adopt;
mod trouble;
mod types;

use core::net::IpAddr;
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;

use crate::handshake::{Addresses, Init};
use crate::machine::mutation::{Mutation, mutated};
use crate::{EngineIndex, Time};

pub use types::{Action, Attempt, Engines, Event, Snapshot, State};

/// First pause after a failed attempt; doubled up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause between attempts.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Pause before a frontend is looked at again that was refused before HELLO.
const REFUSED_RETRY: Duration = Duration::from_secs(5);
/// Pause between the last handshake connection and the first HELLO, in which the loss of an
/// earlier one is noticed: all must lead to the same process.
const SETTLE: Duration = Duration::from_millis(100);
/// A step of the handshake that takes longer than this is reported as the reason why the
/// frontend is not attached. It is not given up: HELLO cannot be said twice.
pub const STALL: Duration = Duration::from_secs(30);
/// A frontend closes its handshake socket when it has READY of all engines. One that has not
/// after this long is taken as attached, with a remark.
const CONFIRM: Duration = Duration::from_secs(5);
/// A frontend that is lost this soon after READY has probably refused it.
const REFUSAL_WINDOW: Duration = Duration::from_secs(15);

#[derive(Debug)]
enum Phase {
    /// The deployment is not complete.
    Incomplete,
    /// Until this time nothing is tried.
    Backoff(Time),
    /// A plain TCP connection is being tried.
    Probing,
    /// Handshake sockets are connecting; those that are.
    Connecting(BTreeSet<EngineIndex>),
    /// All are connected.
    Settling,
    /// HELLO of this rank was said; INIT of the ranks before it came.
    Hello(EngineIndex),
    /// INIT came, but the frontend does not fit. Its connection is kept: when it closes, the process
    /// is gone and another may come.
    Unfit,
    /// INIT came, but there are not enough free slots.
    NoSlots,
    /// Routes and coordinator sockets are opening.
    Registering(Registering),
    /// The routes of a predecessor are looked for; those that are there.
    Adopting(BTreeSet<(EngineIndex, u32)>),
    /// READY is sent and all routes are open.
    Attached,
    /// Sockets are being closed; where to go after that.
    TearingDown(After),
    Removed,
}

#[derive(Debug, Default)]
struct Registering {
    coordinator_ready: BTreeSet<EngineIndex>,
    ready_sent: bool,
    routes: BTreeSet<(EngineIndex, u32)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Retry,
    Remove,
}

/// The machine. See [`crate::machine`] for how to drive it.
#[derive(Debug)]
pub struct Attachment {
    /// Handshake address of the frontend, for texts.
    address: String,
    /// Who accepted the last connection there.
    peer: Option<IpAddr>,
    /// See [`STALL`].
    stall: Duration,
    phase: Phase,
    since: Time,
    /// The deployment as it is known now, if it is complete.
    known: Option<Engines>,
    /// The deployment of this attempt.
    engines: Option<Engines>,
    missing: Vec<EngineIndex>,
    free_slots: u32,
    attempt: Attempt,
    init: Option<Init>,
    backoff: Duration,
    ready_at: Option<Time>,
    /// Ranks whose handshake connection the frontend has closed after READY.
    handshake_closed: BTreeSet<EngineIndex>,
    /// Due when the present step counts as stalled, or the handshake as confirmed.
    stall_at: Option<Time>,
    refused: bool,
    detail: Option<String>,
    /// Why the previous attempt ended.
    last_loss: Option<String>,
    attachments: u64,
    actions: VecDeque<Action>,
}

impl Attachment {
    /// A machine that waits for the deployment; `address` is where the frontend's handshake socket is. A step of the
    /// handshake stalls after `stall`, see [`STALL`].
    pub fn new(address: impl Into<String>, stall: Duration) -> Self {
        Self {
            backoff: BACKOFF_MIN,
            address: address.into(),
            peer: None,
            stall,
            phase: Phase::Incomplete,
            since: Time::ZERO,
            known: None,
            engines: None,
            missing: Vec::new(),
            free_slots: 0,
            attempt: 0,
            init: None,
            ready_at: None,
            handshake_closed: BTreeSet::new(),
            stall_at: None,
            refused: false,
            detail: None,
            last_loss: None,
            attachments: 0,
            actions: VecDeque::new(),
        }
    }

    pub fn handle_event(&mut self, now: Time, event: Event) {
        match event {
            Event::Adopt { engines, addresses, complete } => self.adopt(now, engines, addresses, complete),
            Event::EnginesComplete(engines) => {
                self.missing.clear();
                self.known = Some(engines);
                if matches!(self.phase, Phase::Incomplete) {
                    self.probe(now);
                }
            }
            Event::EnginesMissing(missing) => {
                // What is under way goes on with the engines it began with.
                self.missing = missing;
                self.known = None;
                if matches!(self.phase, Phase::Backoff(_)) {
                    self.enter(now, Phase::Incomplete);
                }
            }
            Event::FreeSlots(free) => {
                self.free_slots = free;
                if matches!(self.phase, Phase::NoSlots) {
                    self.register(now);
                }
            }
            Event::ProbeOk { attempt, peer, mismatch } if self.is(attempt) => {
                self.peer = Some(peer.to_canonical());
                self.probed(now, mismatch);
            }
            Event::ProbeFailed { attempt, reason } if self.is(attempt) => {
                if matches!(self.phase, Phase::Probing) {
                    if !self.refused {
                        let address = &self.address;
                        let before = self.last_loss.as_ref();
                        let before =
                            before.map_or_else(String::new, |why| format!("; detached before: {why}"));
                        self.detail = Some(format!("no listener at {address}: {reason}{before}"));
                    }
                    self.back_off(now);
                }
            }
            Event::HandshakeConnected { attempt, rank } if self.is(attempt) => {
                self.handshake_connected(now, rank);
            }
            Event::HandshakeLost { attempt, rank, reason } if self.is(attempt) => {
                self.handshake_lost(now, rank, &reason)
            }
            Event::Init { attempt, rank, payload } if self.is(attempt) => self.init(now, rank, &payload),
            Event::CoordinatorReady { attempt, rank } if self.is(attempt) => {
                if let Phase::Registering(state) = &mut self.phase {
                    state.coordinator_ready.insert(rank);
                    self.advance(now);
                }
            }
            Event::StartWave { attempt, rank, wave } if self.is(attempt) => {
                // Each rank's socket receives the same broadcast.
                if (rank.0 == 0 || mutated(Mutation::WaveForEachRank)) && self.serves() {
                    self.actions.push_back(Action::StartWave { wave });
                }
            }
            Event::CoordinatorLost { attempt, rank, reason } if self.is(attempt) => {
                if self.serves() {
                    self.lost(now, format!("connection of rank {rank} to its DP coordinator: {reason}"));
                }
            }
            Event::RouteOpen { attempt, rank, api_server } if self.is(attempt) => {
                if let Phase::Registering(state) = &mut self.phase {
                    state.routes.insert((rank, api_server));
                    self.advance(now);
                } else {
                    self.adopted(now, rank, api_server);
                }
            }
            Event::RouteLost { attempt, rank, api_server, reason } if self.is(attempt) => {
                if self.serves() && !mutated(Mutation::IgnoreLostRoutes) {
                    self.lost(now, format!("route of rank {rank} to API server {api_server}: {reason}"));
                }
            }
            Event::TornDown { attempt } if attempt == self.attempt => match self.phase {
                Phase::TearingDown(After::Remove) => self.removed(now),
                Phase::TearingDown(After::Retry) => self.back_off(now),
                _ => {}
            },
            Event::Remove => self.remove(now),
            // Of an earlier attempt.
            Event::ProbeOk { .. }
            | Event::ProbeFailed { .. }
            | Event::HandshakeConnected { .. }
            | Event::HandshakeLost { .. }
            | Event::Init { .. }
            | Event::CoordinatorReady { .. }
            | Event::StartWave { .. }
            | Event::CoordinatorLost { .. }
            | Event::RouteOpen { .. }
            | Event::RouteLost { .. }
            | Event::TornDown { .. } => {}
        }
    }

    /// Retries, stall reports, confirmation.
    pub fn handle_timeout(&mut self, now: Time) {
        if let Phase::Backoff(until) = self.phase
            && until <= now
        {
            self.probe(now);
        }
        if self.stall_at.is_some_and(|due| due <= now) {
            self.stall_at = None;
            self.stalled(now);
        }
    }

    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let retry = match self.phase {
            Phase::Backoff(until) => Some(until),
            _ => None,
        };
        retry.into_iter().chain(self.stall_at).min()
    }

    /// State for status and metrics.
    pub fn snapshot(&self) -> Snapshot {
        let state = match &self.phase {
            Phase::Removed => State::Removed,
            Phase::Attached => State::Attached,
            _ if self.refused => State::Refused,
            Phase::Incomplete | Phase::Backoff(_) | Phase::Probing | Phase::TearingDown(_) => State::Waiting,
            Phase::Connecting(_) | Phase::Settling => State::Connecting,
            Phase::Hello(_) => State::Handshake,
            Phase::Unfit | Phase::NoSlots => State::Refused,
            Phase::Registering(_) | Phase::Adopting(_) => State::Registering,
        };
        let detail = match &self.phase {
            Phase::Incomplete => Some(self.incomplete()),
            _ => self.detail.clone(),
        };
        let attempt = match &self.phase {
            Phase::Incomplete | Phase::Backoff(_) | Phase::Probing | Phase::Removed => None,
            _ => Some(self.attempt),
        };
        let api_servers = self.api_servers();
        let holds_slots = self.serves() || matches!(self.phase, Phase::TearingDown(_));
        Snapshot {
            state,
            detail,
            api_servers,
            slots_claimed: if holds_slots { api_servers } else { 0 },
            attachments: self.attachments,
            attempt,
        }
    }

    /// What the frontend is told of the engines, and what it told in its INIT: for a successor of this machine. From
    /// the first [`Action::OpenRoute`] of an attempt on.
    pub fn terms(&self) -> Option<(&Engines, &Addresses)> {
        Some((self.engines.as_ref()?, &self.init.as_ref()?.addresses))
    }

    fn is(&self, attempt: Attempt) -> bool {
        attempt == self.attempt && !matches!(self.phase, Phase::TearingDown(_) | Phase::Removed)
    }

    /// There may be routes and sockets to its DP coordinator.
    fn serves(&self) -> bool {
        matches!(self.phase, Phase::Registering(_) | Phase::Adopting(_) | Phase::Attached)
    }

    fn enter(&mut self, now: Time, phase: Phase) {
        self.phase = phase;
        self.since = now;
        self.stall_at = None;
    }

    fn enter_watched(&mut self, now: Time, phase: Phase) {
        self.enter(now, phase);
        self.stall_at = Some(now + self.stall);
    }

    fn size(&self) -> u16 {
        self.engines.as_ref().map_or(0, |engines| engines.size)
    }

    /// Of the frontend; 0 until INIT came.
    fn api_servers(&self) -> u32 {
        let inputs = self.init.as_ref().map_or(0, |init| init.addresses.inputs.len());
        u32::try_from(inputs).unwrap_or(u32::MAX)
    }

    fn routes_needed(&self) -> usize {
        usize::from(self.size()) * self.api_servers() as usize
    }

    fn has_coordinator(&self) -> bool {
        let addresses = self.init.as_ref().map(|init| &init.addresses);
        addresses.is_some_and(|a| a.coordinator_input.is_some() && a.coordinator_output.is_some())
    }

    /// There is nothing to remark any more.
    fn accept(&mut self) {
        self.refused = false;
        self.detail = None;
    }

    fn incomplete(&self) -> String {
        let ranks: Vec<String> = self.missing.iter().take(8).map(|r| r.to_string()).collect();
        let more = if self.missing.len() > 8 { ", .." } else { "" };
        format!("the deployment is not complete: waiting for ranks {}{more}", ranks.join(", "))
    }

    // === Before HELLO ===

    fn probe(&mut self, now: Time) {
        if self.known.is_none() {
            return self.enter(now, Phase::Incomplete);
        }
        self.engines.clone_from(&self.known);
        self.attempt += 1;
        self.init = None;
        self.ready_at = None;
        self.handshake_closed.clear();
        self.enter(now, Phase::Probing);
        self.actions.push_back(Action::Probe { attempt: self.attempt });
    }

    fn probed(&mut self, now: Time, mismatch: Option<String>) {
        if !matches!(self.phase, Phase::Probing) {
            return;
        }
        if let Some(error) = mismatch {
            self.refuse(error);
            let until = now + REFUSED_RETRY;
            return self.enter(now, Phase::Backoff(until));
        }
        self.enter_watched(now, Phase::Connecting(BTreeSet::new()));
        for rank in (0..self.size()).map(EngineIndex) {
            self.actions.push_back(Action::ConnectHandshake { attempt: self.attempt, rank });
        }
    }

    fn handshake_connected(&mut self, now: Time, rank: EngineIndex) {
        let size = self.size();
        if let Phase::Connecting(connected) = &mut self.phase {
            connected.insert(rank);
            if connected.len() == usize::from(size) {
                self.enter(now, Phase::Settling);
                self.stall_at = Some(now + SETTLE);
            }
        }
    }

    fn say_hello(&mut self, now: Time, rank: EngineIndex) {
        self.enter_watched(now, Phase::Hello(rank));
        self.actions.push_back(Action::SendHello { attempt: self.attempt, rank });
    }

    // === From HELLO to READY ===

    fn init(&mut self, now: Time, rank: EngineIndex, payload: &Bytes) {
        let Phase::Hello(asked) = self.phase else {
            return;
        };
        if asked != rank {
            return;
        }
        let address = self.address.clone();
        let init = match Init::decode(payload) {
            Ok(init) => init,
            Err(error) => {
                return self
                    .unfit(now, format!("frontend {address} sent a malformed INIT to rank {rank}: {error}"));
            }
        };
        if let Some(first) = &self.init {
            if first.addresses != init.addresses {
                return self
                    .lost(now, format!("INIT to rank {rank} has other addresses than INIT to rank 0"));
            }
        } else {
            let misfit = self.foreign(&init.addresses).or_else(|| self.misfit(&init));
            self.init = Some(init);
            if let Some(error) = misfit {
                return self.unfit(now, error);
            }
        }
        let next = EngineIndex(rank.0 + 1);
        if next.0 < self.size() {
            self.say_hello(now, next);
        } else {
            self.register(now);
        }
    }

    fn register(&mut self, now: Time) {
        let Some(Init { addresses, .. }) = self.init.clone() else {
            return;
        };
        let wanted = self.api_servers();
        if wanted > self.free_slots {
            let (free, missing) = (self.free_slots, wanted - self.free_slots);
            let error = format!(
                "frontend {} has {wanted} API servers (vLLM's default is one for each DP rank), {free} slots are free: start the sidecar with {missing} more --frontend-slots, or the frontend with a smaller --api-server-count",
                self.address
            );
            self.refuse(error);
            if !matches!(self.phase, Phase::NoSlots) {
                self.enter(now, Phase::NoSlots);
            }
            return;
        }
        self.accept();
        self.enter_watched(now, Phase::Registering(Registering::default()));
        let attempt = self.attempt;
        for rank in (0..self.size()).map(EngineIndex) {
            self.connect_coordinator(rank, &addresses);
            for (api_server, (input, output)) in (0u32..).zip(addresses.inputs.iter().zip(&addresses.outputs))
            {
                self.actions.push_back(Action::OpenRoute {
                    attempt,
                    rank,
                    api_server,
                    input: input.clone(),
                    output: output.clone(),
                    stats_address: addresses.frontend_stats_publish_address.clone(),
                });
            }
        }
        self.advance(now);
    }

    fn connect_coordinator(&mut self, rank: EngineIndex, addresses: &Addresses) {
        if let (Some(input), Some(output)) = (&addresses.coordinator_input, &addresses.coordinator_output) {
            self.actions.push_back(Action::ConnectCoordinator {
                attempt: self.attempt,
                rank,
                input: input.clone(),
                output: output.clone(),
            });
        }
    }

    /// READY when the DP coordinator has answered all ranks; attached when all is open.
    ///
    /// READY does not wait for the routes: frontends up to 0.16.0 bind their data sockets only after
    /// the handshake.
    fn advance(&mut self, now: Time) {
        let (size, attempt) = (usize::from(self.size()), self.attempt);
        let has_coordinator = self.has_coordinator();
        let Phase::Registering(state) = &mut self.phase else {
            return;
        };
        if !state.ready_sent
            && (!has_coordinator
                || state.coordinator_ready.len() == size
                || mutated(Mutation::ReadyBeforeCoordinator))
        {
            state.ready_sent = true;
            self.ready_at = Some(now);
            self.stall_at = Some(now + CONFIRM);
            self.accept();
            if has_coordinator {
                self.actions.push_back(Action::JoinCoordinator { attempt });
            }
            let addresses = self.init.as_ref().map(|init| &init.addresses);
            let stats = addresses.and_then(|addresses| addresses.frontend_stats_publish_address.clone());
            for rank in (0..self.size()).map(EngineIndex) {
                let stats_address = stats.clone();
                self.actions.push_back(Action::SendReady { attempt, rank, stats_address });
            }
        }
        if let Phase::Registering(state) = &self.phase
            && state.ready_sent
            && state.routes.len() == self.routes_needed()
            && self.handshake_closed.len() == size
        {
            self.attach(now);
        }
    }

    fn attach(&mut self, now: Time) {
        self.enter(now, Phase::Attached);
        self.attachments += 1;
        self.refused = false;
        self.backoff = BACKOFF_MIN;
        self.close_handshake();
        let (attempt, api_servers) = (self.attempt, self.api_servers());
        self.actions.push_back(Action::Attached { attempt, api_servers });
    }

    /// Once the frontend has closed all its sides; then there is nothing to remark.
    fn close_handshake(&mut self) {
        if self.handshake_closed.len() == usize::from(self.size()) {
            self.detail = None;
            self.actions.push_back(Action::CloseHandshake { attempt: self.attempt });
        }
    }
}
