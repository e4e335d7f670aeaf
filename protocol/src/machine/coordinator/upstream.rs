//! What makes the machine that of vLLM's `DPCoordinatorProc`, for tests: the trace of the real class is replayed
//! against it, and simulated frontends have it for their own DP coordinator.

use std::collections::VecDeque;

use super::cadence::Cadence;
use super::{Action, Config, Coordinator, Exclude, Note, Rank, Stage, Stamp, Waking, loads};
use crate::layout::{FirstReq, Layout};
use crate::machine::mutation::{Mutation, mutated};
use crate::stats::Load;
use crate::wave::Publication;
use crate::{GroupKind, Time, Wave};

/// How a machine differs from that of a sidecar.
#[derive(Clone, Copy, Debug, Default)]
pub struct Differences {
    /// Its rules are exactly those of `DPCoordinatorProc`: engines are never replaced.
    pub exact: bool,
    /// Frontends are connected directly: publish for them.
    pub publish: bool,
}

/// What directly connected frontends are told.
#[derive(Clone, Debug)]
pub(super) struct Publisher {
    cadence: Cadence,
    publications: VecDeque<Publication>,
}

impl Publisher {
    pub(super) fn new(lockstep: bool) -> Self {
        Self { cadence: Cadence::new(lockstep), publications: VecDeque::new() }
    }

    /// Stats came, and are not in `ranks` yet.
    pub(super) fn stats(&mut self, stamp: Stamp, ranks: &[Rank]) {
        self.cadence.stats(stamp, || loads(ranks));
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.cadence.deadline()
    }
}

impl Config {
    /// As `DPCoordinatorProc`, directly connected frontends.
    pub fn upstream(kind: GroupKind, size: u16, layout: Layout) -> Self {
        let upstream = Differences { exact: true, publish: true };
        Self { layout, upstream, ..Self::hosted(kind, size) }
    }
}

impl Coordinator {
    /// What to publish to directly connected frontends; after the actions of the same event or timeout.
    pub fn poll_publication(&mut self) -> Option<Publication> {
        self.publisher.publications.pop_front()
    }

    pub(super) fn hosted(&self) -> bool {
        !self.config.upstream.exact
    }

    fn publish(&mut self, counts: Option<Vec<Load>>) {
        if self.config.upstream.publish {
            let publication = Publication { counts, wave: self.wave, running: self.running };
            self.publisher.publications.push_back(publication);
        }
    }

    /// Publishes what an event has changed of wave and state.
    pub(super) fn event_handled(&mut self, now: Time, before: (Wave, bool)) {
        if before != (self.wave, self.running) {
            self.publish(None);
        }
        // The silence counts from when vLLM's coordinator enters its loop, past the READY gate.
        let ready = self.formed || self.ranks.iter().all(|rank| rank.stage == Stage::Ready);
        if self.config.upstream.publish && ready {
            self.publisher.cadence.rearm(now);
        }
    }

    pub(super) fn publish_due(&mut self, now: Time) {
        let ranks = &self.ranks;
        if let Some(counts) = self.publisher.cadence.due(now, || loads(ranks)) {
            self.publish(Some(counts));
        }
    }

    pub(super) fn first_request(&mut self, now: Time, target: Option<Exclude>, wave: Wave) {
        if !self.lockstep() {
            return;
        }
        if self.config.layout.first_req() == FirstReq::None {
            self.push(Action::Note(Note::FirstRequestUnsupported));
            return;
        }
        if self.running || !self.formed {
            return;
        }
        let stale = wave < self.wave;
        if stale && mutated(Mutation::StaleHintRewindsWave) {
            self.wave = wave;
        }
        // A request with an old wave number does not start its engine in the current wave.
        let exclude = if stale && !mutated(Mutation::StaleHintKeepsExclude) { None } else { target };
        if self.hosted() {
            self.waking = Some(Waking { wave: self.wave, sent: now, again: false });
        }
        self.send_start(exclude);
        // It takes its own START_DP_WAVE for a running group.
        let sets_running = self.config.layout.first_req() == FirstReq::StartsAndSetsRunning;
        if !self.hosted() && sets_running {
            self.running = true;
        }
    }
}
