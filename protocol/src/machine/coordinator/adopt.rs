//! Taking over engines that were there before, and after a connection to their node was lost.
//!
//! What may have been lost in between: a wake for a request, START_DP_WAVE, reports of engines that had left the edge,
//! what frontends were to be told. What cannot be lost, because the edges outlive the DP coordinator and note it: the
//! newest wave.

use super::{Adopted, Coordinator, EngineIndex, Report, Stage};
use crate::machine::mutation::{Mutation, mutated};
use crate::{Time, Wave};

impl Coordinator {
    pub(super) fn adopted(&mut self, now: Time, wave: Wave, engines: &[Adopted]) {
        if self.lockstep() && !mutated(Mutation::AdoptFromZero) {
            self.raise(wave);
        }
        for engine in engines {
            self.adopt(engine);
        }
        let subscribed: Vec<EngineIndex> = (0..)
            .map(EngineIndex)
            .zip(&self.ranks)
            .filter(|(_, rank)| rank.stage == Stage::Subscribed)
            .map(|(index, _)| index)
            .collect();
        if !self.lockstep() {
            if !subscribed.is_empty() {
                self.send_ready(subscribed);
            }
            return;
        }
        if self.formed {
            self.wake_unknown(now);
            return;
        }
        if self.ranks.iter().any(|rank| rank.stage == Stage::Down) {
            return;
        }
        // READY goes to all at once, so those that seem to lack it had none, or their node was cut off.
        let fresh = subscribed.len() == self.ranks.len();
        if !subscribed.is_empty() {
            self.send_ready(subscribed);
        }
        self.formed = true;
        if fresh {
            self.form(now);
        } else {
            // Admitted means that it was in step.
            self.in_step = self.wave == Wave(0) || self.ranks.iter().all(|rank| rank.admitted);
            self.wake_unknown(now);
        }
    }

    /// An engine that is there, but was not adopted yet: its event has overtaken [`super::Event::Adopted`].
    pub(super) fn unknown_reports(&mut self, report: &Report) {
        if self.lockstep() {
            let next = report.wave_complete.map(|wave| Wave(wave.0.saturating_add(1)));
            self.raise(next.or(report.start_wave).unwrap_or_default());
        }
    }

    /// A node has heard of a later wave than this machine.
    fn raise(&mut self, wave: Wave) {
        if let Some(last) = wave.0.checked_sub(1)
            && wave > self.wave
        {
            self.wave = wave;
            self.running = false;
            self.waking = None;
            self.tell_all(EngineIndex(0), Report::wave_complete(Wave(last)));
        }
    }

    fn adopt(&mut self, engine: &Adopted) {
        let Adopted { rank: index, incarnation, ready, admitted } = *engine;
        let Some((fresh, stage)) = self.appears(index, incarnation) else { return };
        if let Some(rank) = self.rank(index) {
            let was_ready = !fresh && stage == Stage::Ready;
            rank.stage = if ready || was_ready { Stage::Ready } else { Stage::Subscribed };
        }
        if admitted && ready {
            self.admitted(index);
        }
    }

    /// Whether the group runs, and what was asked of it, cannot be known. START_DP_WAVE does no harm to a group that
    /// runs, and costs one that does not a single step.
    fn wake_unknown(&mut self, now: Time) {
        self.running = false;
        if !mutated(Mutation::AdoptWithoutWake) {
            self.send_wake(now);
        }
    }
}
