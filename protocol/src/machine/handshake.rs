//! The startup handshake with hosted engines, seen from the server: who said HELLO, who got INIT,
//! who is READY, and who is turned away with which story.
//!
//! Each expected rank goes New -> Connected -> Ready. Ranks are independent: INIT never waits for
//! another rank's READY (an engine sends READY only after the DP coordinator has heard of *all*
//! engines, so waiting would be a deadlock), and a refused peer changes nothing for the others.
//! vLLM's own server aborts everything at the first wrong message
//! (`vllm/v1/engine/utils.py` 0.32.0, `wait_for_engine_startup`); this one refuses the one message.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::handshake::EngineMessage;
use crate::{EngineIdentity, EngineIndex, Frames, Incarnation, Time};

/// Bounds of the handshake.
#[derive(Clone, Debug)]
pub struct Config {
    /// The ranks whose engines do their handshake here.
    pub ranks: Range<u16>,
    /// From HELLO to READY: model load, profiling and warm-up, for which vLLM itself has no limit.
    pub ready_timeout: Duration,
    /// How often to report who is still missing.
    pub progress_interval: Duration,
}

impl Config {
    /// Generous bounds for the given ranks: one hour to become READY, progress every ten seconds.
    pub fn new(ranks: Range<u16>) -> Self {
        Self { ranks, ready_timeout: Duration::from_secs(3600), progress_interval: Duration::from_secs(10) }
    }
}

/// The listener through which a message came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Via {
    /// The shared address, for engines that somebody else starts.
    Shared,
    /// The port made for one incarnation of one rank.
    Own {
        /// Whose port it is.
        rank: EngineIndex,
        /// For which of its lives.
        incarnation: Incarnation,
    },
}

/// One connection to a listener. Numbers are never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PeerId(pub u64);

#[derive(Clone, Debug)]
pub enum Event {
    /// An engine of this rank is going to say HELLO. Replaces an earlier expectation of the rank.
    Expect {
        rank: EngineIndex,
        incarnation: Incarnation,
        /// It gets a port of its own; what comes by the shared one is not it.
        own: bool,
        /// The encoded INIT to answer with.
        init: Bytes,
    },
    /// The rank's engine is gone or given up.
    Forget {
        rank: EngineIndex,
        /// Which incarnation; an older one than the expected changes nothing.
        incarnation: Incarnation,
    },
    /// A message came in.
    Message {
        /// By which listener.
        via: Via,
        /// On which connection.
        peer: PeerId,
        /// Routing id as the peer announced it.
        identity: Bytes,
        /// The frames after the routing id.
        frames: Frames,
    },
    /// A connection has closed.
    Closed { peer: PeerId },
}

/// What an engine, or a stranger, has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// HELLO was accepted, and INIT sent.
    Connected { rank: EngineIndex, incarnation: Incarnation },
    /// READY was accepted.
    Ready {
        rank: EngineIndex,
        incarnation: Incarnation,
        /// vLLM's hash of the parallel flags (lockstep engines since 0.12.0).
        parallel_config_hash: Option<String>,
        /// Up to 0.19.1 READY carries it; later the ready response does.
        num_gpu_blocks: Option<u64>,
    },
    /// A message was refused.
    Refused {
        /// Set when the engine expected for this rank is disqualified by it.
        rank: Option<EngineIndex>,
        /// Who, at which stage, expected and actual.
        error: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send INIT to the engine.
    SendInit {
        peer: PeerId,
        /// The payload.
        init: Bytes,
    },
    Report(Report),
    /// Progress: who is missing.
    Waiting {
        /// Ranks that have not said HELLO.
        hello: Vec<EngineIndex>,
        /// Ranks that have INIT and are loading.
        ready: Vec<EngineIndex>,
    },
}

/// How far the handshake of one rank is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Expected, nothing heard.
    New,
    /// HELLO came, INIT went out.
    Connected,
    /// READY came.
    Ready,
    /// Disqualified; a new expectation is needed.
    Refused,
}

#[derive(Debug)]
struct Rank {
    incarnation: Incarnation,
    own: bool,
    init: Bytes,
    stage: Stage,
    /// The connection that said HELLO.
    peer: Option<PeerId>,
    since: Time,
    hash: Option<String>,
}

/// The machine. See [`crate::machine`] for how to drive it.
#[derive(Debug)]
pub struct Handshake {
    config: Config,
    ranks: BTreeMap<EngineIndex, Rank>,
    /// HELLOs on the shared address that came before they were expected: an engine started early,
    /// or started again before the loss of its predecessor was noticed. Answered by Expect.
    early: BTreeMap<EngineIndex, PeerId>,
    next_progress: Option<Time>,
    actions: VecDeque<Action>,
}

/// Plain data about the handshakes.
#[cfg(any(test, feature = "test-support"))]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Stage and incarnation of each expected rank.
    pub ranks: BTreeMap<EngineIndex, (Incarnation, Stage)>,
    /// Ranks that said HELLO and are not expected yet.
    pub early: Vec<EngineIndex>,
}

impl Handshake {
    /// A machine that expects nobody yet.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            ranks: BTreeMap::new(),
            early: BTreeMap::new(),
            next_progress: None,
            actions: VecDeque::new(),
        }
    }

    pub fn handle_event(&mut self, now: Time, event: Event) {
        match event {
            Event::Expect { rank, incarnation, own, init } => self.expect(now, rank, incarnation, own, init),
            Event::Forget { rank, incarnation } => {
                if self.ranks.get(&rank).is_some_and(|known| known.incarnation == incarnation) {
                    self.ranks.remove(&rank);
                }
            }
            Event::Message { via, peer, identity, frames } => {
                self.message(now, via, peer, &identity, &frames)
            }
            Event::Closed { peer } => self.closed(peer),
        }
        self.arm(now);
    }

    /// Deadlines and progress reports.
    pub fn handle_timeout(&mut self, now: Time) {
        let limit = self.config.ready_timeout;
        for (rank, known) in &mut self.ranks {
            if known.stage == Stage::Connected && now.saturating_since(known.since) >= limit {
                known.stage = Stage::Refused;
                let error = format!(
                    "rank {rank} (incarnation {}) said HELLO and got INIT, but sent no READY within {limit:?}",
                    known.incarnation
                );
                self.actions.push_back(Action::Report(Report::Refused { rank: Some(*rank), error }));
            }
        }
        if self.next_progress.is_some_and(|due| due <= now) {
            let (hello, ready) = self.missing();
            self.actions.push_back(Action::Waiting { hello, ready });
            self.next_progress = None;
        }
        self.arm(now);
    }

    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let ready = self
            .ranks
            .values()
            .filter(|known| known.stage == Stage::Connected)
            .map(|known| known.since + self.config.ready_timeout);
        ready.chain(self.next_progress).min()
    }

    /// Plain data.
    #[cfg(any(test, feature = "test-support"))]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            ranks: self
                .ranks
                .iter()
                .map(|(rank, known)| (*rank, (known.incarnation, known.stage.clone())))
                .collect(),
            early: self.early.keys().copied().collect(),
        }
    }

    fn expect(&mut self, now: Time, rank: EngineIndex, incarnation: Incarnation, own: bool, init: Bytes) {
        self.ranks.insert(
            rank,
            Rank { incarnation, own, init, stage: Stage::New, peer: None, since: now, hash: None },
        );
        if !own && let Some(peer) = self.early.remove(&rank) {
            self.accept_hello(now, peer, rank);
        }
    }

    fn message(&mut self, now: Time, via: Via, peer: PeerId, identity: &[u8], frames: &Frames) {
        let rank = match self.rank_of(via, identity) {
            Ok(rank) => rank,
            Err(error) => return self.refuse(error),
        };
        let [payload] = frames.as_slice() else {
            let error = format!("rank {rank}: handshake message of {} frames, expected 1", frames.len());
            return self.broken(rank, peer, error);
        };
        match EngineMessage::decode(payload) {
            Ok(EngineMessage::Hello(_)) => self.hello(now, via, peer, rank),
            Ok(EngineMessage::Ready(ready)) => {
                self.ready(now, peer, rank, ready.parallel_config_hash, ready.num_gpu_blocks)
            }
            Err(error) => {
                self.broken(rank, peer, format!("rank {rank}: malformed handshake message: {error}"))
            }
        }
    }

    /// The rank behind an identity, if it is one of ours and came by the right listener.
    fn rank_of(&self, via: Via, identity: &[u8]) -> Result<EngineIndex, String> {
        let ours = &self.config.ranks;
        let expected = match ours.len() {
            1 => format!("rank {}", ours.start),
            _ => format!("ranks {}..{}", ours.start, ours.end.saturating_sub(1)),
        };
        let Some(rank) = EngineIdentity::from_frame(identity).map(EngineIdentity::index) else {
            return Err(format!(
                "handshake message from a peer with a {}-byte identity {}, expected 2 bytes naming {expected}",
                identity.len(),
                hex(identity),
            ));
        };
        let known = self.ranks.get(&rank);
        match via {
            _ if !ours.contains(&rank.0) => Err(format!(
                "handshake message from rank {rank}, expected {expected}: check --data-parallel-size and --data-parallel-start-rank of that engine"
            )),
            Via::Own { rank: owner, incarnation } if owner != rank => Err(format!(
                "handshake message from rank {rank} on the port made for rank {owner} (incarnation {incarnation})"
            )),
            Via::Own { incarnation, .. } if known.is_none_or(|known| known.incarnation != incarnation) => {
                Err(format!(
                    "handshake message from rank {rank}, incarnation {incarnation}, which has been given up"
                ))
            }
            Via::Shared if known.is_some_and(|known| known.own) => Err(format!(
                "handshake message from rank {rank} on the shared address, but this sidecar starts rank {rank} itself: is a second engine with this rank running?"
            )),
            _ => Ok(rank),
        }
    }

    fn hello(&mut self, now: Time, via: Via, peer: PeerId, rank: EngineIndex) {
        let Some(known) = self.ranks.get_mut(&rank) else {
            // Not prepared yet. vLLM waits five minutes for INIT.
            self.early.insert(rank, peer);
            return;
        };
        let incarnation = known.incarnation;
        if known.peer == Some(peer) {
            let error =
                format!("second HELLO from rank {rank} (incarnation {incarnation}) on the same connection");
            return self.broken(rank, peer, error);
        }
        let what = match known.stage {
            Stage::New => return self.accept_hello(now, peer, rank),
            Stage::Connected => "is starting",
            Stage::Ready => "is ready",
            Stage::Refused => "was refused",
        };
        if via == Via::Shared {
            self.early.insert(rank, peer);
        }
        self.refuse(format!(
            "HELLO from rank {rank}, whose engine (incarnation {incarnation}) {what}: either two engines run with rank {rank}, or its engine was restarted without its exit being noticed; the newcomer gets no INIT until the engine is given up"
        ));
    }

    fn accept_hello(&mut self, now: Time, peer: PeerId, rank: EngineIndex) {
        let Some(known) = self.ranks.get_mut(&rank) else {
            return;
        };
        known.stage = Stage::Connected;
        known.peer = Some(peer);
        known.since = now;
        self.actions.push_back(Action::SendInit { peer, init: known.init.clone() });
        let incarnation = known.incarnation;
        self.actions.push_back(Action::Report(Report::Connected { rank, incarnation }));
    }

    fn ready(
        &mut self,
        now: Time,
        peer: PeerId,
        rank: EngineIndex,
        hash: Option<String>,
        num_gpu_blocks: Option<u64>,
    ) {
        let Some(known) = self.ranks.get(&rank) else {
            return self.refuse(format!(
                "READY from rank {rank}, which is not expected: its incarnation has been given up, or it never said HELLO here"
            ));
        };
        let incarnation = known.incarnation;
        let fault = match known.stage {
            Stage::Connected if known.peer == Some(peer) => None,
            Stage::Connected => Some(format!(
                "READY from rank {rank} on another connection than its HELLO (incarnation {incarnation}): it belongs to an engine that has been given up, or to a second engine with this rank"
            )),
            Stage::New => {
                Some(format!("READY from rank {rank} (incarnation {incarnation}), expected HELLO first"))
            }
            Stage::Ready => Some(format!("second READY from rank {rank} (incarnation {incarnation})")),
            Stage::Refused => {
                Some(format!("READY from rank {rank}, whose incarnation {incarnation} was refused before"))
            }
        };
        if let Some(fault) = fault {
            return self.refuse(fault);
        }
        let other = self
            .ranks
            .iter()
            .find(|(_, other)| other.stage == Stage::Ready && other.hash != hash)
            .map(|(index, other)| (*index, other.hash.clone()));
        if let Some((index, other)) = other {
            let say = |hash: &Option<String>| hash.clone().unwrap_or_else(|| "none".to_owned());
            let error = format!(
                "parallel_config_hash of rank {rank} is {}, that of rank {index} is {}: the engines run with different parallel flags, or different vLLM versions",
                say(&hash),
                say(&other),
            );
            return self.disqualify(rank, error);
        }
        if let Some(known) = self.ranks.get_mut(&rank) {
            known.stage = Stage::Ready;
            known.since = now;
            known.hash.clone_from(&hash);
        }
        let ready = Report::Ready { rank, incarnation, parallel_config_hash: hash, num_gpu_blocks };
        self.actions.push_back(Action::Report(ready));
    }

    fn closed(&mut self, peer: PeerId) {
        self.early.retain(|_, held| *held != peer);
        let Some((rank, known)) = self.ranks.iter().find(|(_, known)| known.peer == Some(peer)) else {
            return;
        };
        // After READY an engine closes its handshake connection; before, only death closes it.
        if known.stage == Stage::Connected {
            let error = format!(
                "rank {rank} (incarnation {}) closed its handshake connection before READY: the engine died while it was starting",
                known.incarnation
            );
            let rank = *rank;
            self.disqualify(rank, error);
        }
    }

    /// A message that no engine sends. From an engine that is starting it disqualifies that engine.
    fn broken(&mut self, rank: EngineIndex, peer: PeerId, error: String) {
        match self.ranks.get(&rank) {
            Some(known) if known.stage == Stage::Connected && known.peer == Some(peer) => {
                self.disqualify(rank, error);
            }
            _ => self.refuse(error),
        }
    }

    fn refuse(&mut self, error: String) {
        self.actions.push_back(Action::Report(Report::Refused { rank: None, error }));
    }

    fn disqualify(&mut self, rank: EngineIndex, error: String) {
        if let Some(known) = self.ranks.get_mut(&rank) {
            known.stage = Stage::Refused;
        }
        self.actions.push_back(Action::Report(Report::Refused { rank: Some(rank), error }));
    }

    fn missing(&self) -> (Vec<EngineIndex>, Vec<EngineIndex>) {
        let of = |stage: Stage| {
            self.ranks.iter().filter(|(_, known)| known.stage == stage).map(|(rank, _)| *rank).collect()
        };
        (of(Stage::New), of(Stage::Connected))
    }

    fn arm(&mut self, now: Time) {
        let (hello, ready) = self.missing();
        if hello.is_empty() && ready.is_empty() {
            self.next_progress = None;
        } else if self.next_progress.is_none() {
            self.next_progress = Some(now + self.config.progress_interval);
        }
    }
}

/// At most eight bytes as hex digits.
fn hex(bytes: &[u8]) -> String {
    let mut text: String = bytes.iter().take(8).map(|b| format!("{b:02x}")).collect();
    if bytes.len() > 8 {
        text.push_str("..");
    }
    text
}
