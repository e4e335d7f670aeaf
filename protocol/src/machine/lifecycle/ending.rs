//! How lives end: lost, fenced, exited, stopped; and what follows.

use super::{Action, Lifecycle, Phase};
use crate::{EngineIndex, Incarnation, Time};

impl Lifecycle {
    /// One engine is not to be used any more. In lockstep that ends the whole group.
    pub(super) fn lose(&mut self, now: Time, rank: EngineIndex, reason: &str, timeout: bool) {
        if self.failed || self.stopping {
            return;
        }
        let Some(state) = self.ranks.get(&rank) else {
            return;
        };
        let first_life = self.config.spawn && state.first_life();
        // A lost connection of a process of ours is followed by its exit, which knows more: only
        // then is a first start called failed. A process that hangs is failed by its time limit.
        let exit_will_tell = self.config.spawn && state.process && !timeout;
        if first_life && !exit_will_tell {
            self.end_rank(now, rank, reason);
            self.failed = true;
            self.actions.push_back(Action::Fail { reason: reason.to_owned(), timeout });
            return;
        }
        self.end_rank(now, rank, reason);
        if self.config.kind.is_lockstep() {
            self.end_group(now, rank, reason, false);
        }
    }

    /// Ends a life that cannot go on for a reason of ours: no back-off, nothing charged to anybody's budget.
    pub(super) fn set_aside(&mut self, now: Time, rank: EngineIndex, reason: &str) {
        if let Some(state) = self.ranks.get_mut(&rank) {
            state.discarded = true;
        }
        self.end_rank(now, rank, reason);
        if self.config.kind.is_lockstep() {
            self.end_group(now, rank, reason, true);
        }
    }

    /// What is left of the lockstep group of a rank that has ended is ended, too.
    pub(super) fn end_group(&mut self, now: Time, rank: EngineIndex, reason: &str, at_no_charge: bool) {
        let others: Vec<EngineIndex> = self.ranks.keys().copied().filter(|&r| r != rank).collect();
        for other in others {
            let alive = self.ranks.get(&other).is_some_and(|s| s.phase.is_alive());
            // Engines that somebody else starts may already be of the next generation.
            let same = self.config.spawn
                || self.ranks.get(&other).map(|s| s.incarnation)
                    == self.ranks.get(&rank).map(|s| s.incarnation);
            if alive && same {
                let text = format!("lockstep group of engine {rank} ended: {reason}");
                if let Some(state) = self.ranks.get_mut(&other) {
                    state.discarded |= at_no_charge;
                }
                self.end_rank(now, other, &text);
            }
        }
    }

    /// Marks the rank down and has its process stopped.
    pub(super) fn end_rank(&mut self, now: Time, rank: EngineIndex, reason: &str) {
        let spawn = self.config.spawn;
        let Some(state) = self.ranks.get_mut(&rank) else {
            return;
        };
        let incarnation = state.incarnation;
        let was_alive = state.phase.is_alive();
        state.last_error = Some(reason.to_owned());
        state.phase = Phase::Stopping;
        state.until = None;
        state.since = now;
        self.actions.push_back(Action::Down { rank, incarnation, reason: reason.to_owned() });
        if spawn && state.process {
            self.actions.push_back(Action::StopProcess { rank, incarnation });
        } else if spawn || was_alive {
            // Nothing to wait for: no process of ours. An engine of somebody else whose connection
            // closed is gone; one that is only fenced keeps its old sockets until they are replaced.
            self.gone(now, rank);
        }
    }

    pub(super) fn exited(&mut self, now: Time, rank: EngineIndex, incarnation: Incarnation, reason: &str) {
        let Some(state) = self.ranks.get_mut(&rank).filter(|s| s.incarnation == incarnation) else {
            return;
        };
        state.process = false;
        match state.phase {
            Phase::Stopping => {
                if state.first_life() && !state.discarded && !self.stopping && !self.failed {
                    let told = state.last_error.clone().unwrap_or_default();
                    self.failed = true;
                    let reason = format!("{told}; {reason}");
                    self.actions.push_back(Action::Fail { reason, timeout: false });
                } else {
                    self.gone(now, rank);
                }
            }
            Phase::Waiting | Phase::GivenUp | Phase::Stopped => {}
            _ => {
                let reason = format!("engine {rank} exited: {reason}");
                self.lose(now, rank, &reason, false);
            }
        }
        self.report_stopped();
    }

    /// Stops a process that nobody waits for; the next life begins when it is gone, at no charge.
    pub(super) fn stop_stray(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        if let Some(state) = self.ranks.get_mut(&rank) {
            state.incarnation = incarnation;
            state.phase = Phase::Stopping;
            state.process = true;
            state.discarded = true;
            state.until = None;
        }
        self.actions.push_back(Action::StopProcess { rank, incarnation });
    }

    /// Nothing is left of the incarnation: decide when the next one begins.
    pub(super) fn gone(&mut self, now: Time, rank: EngineIndex) {
        let spawn = self.config.spawn;
        let Some(state) = self.ranks.get_mut(&rank) else {
            return;
        };
        if self.stopping || self.failed {
            state.phase = Phase::Stopped;
            self.report_stopped();
            return;
        }
        // Where somebody else starts the engines, they decide when: be ready for HELLO at once.
        if state.discarded || !spawn {
            state.phase = Phase::Waiting;
            state.until = Some(now);
            return;
        }
        match state.restart.failed(now, state.last_error.as_deref().unwrap_or_default()) {
            Ok(until) => {
                state.phase = Phase::Waiting;
                state.until = Some(until);
            }
            Err(why) => {
                state.phase = Phase::GivenUp;
                state.until = None;
                let none_left =
                    self.config.kind.is_lockstep() || self.ranks.values().all(|s| s.phase == Phase::GivenUp);
                let reason = format!("engine {rank} is not started again: {why}");
                if none_left {
                    self.failed = true;
                    self.actions.push_back(Action::Fail { reason, timeout: false });
                } else {
                    self.actions.push_back(Action::GiveUp { rank, reason });
                }
            }
        }
    }

    /// The keeper of a node was killed, and with it the processes of its `ranks`.
    pub(super) fn keeper_lost(&mut self, now: Time, ranks: &[EngineIndex]) {
        if self.stopping || self.failed {
            return;
        }
        let mut any = None;
        for &rank in ranks {
            let Some(state) = self.ranks.get_mut(&rank) else {
                continue;
            };
            let incarnation = state.incarnation;
            state.process = false;
            state.registered = false;
            if state.phase.is_alive() || state.phase == Phase::Stopping {
                let reason = "the keeper was killed; its processes were stopped".to_owned();
                state.last_error = Some(reason.clone());
                // Not the engine's fault: no back-off, nothing charged to its budget.
                state.phase = Phase::Waiting;
                state.until = Some(now);
                self.actions.push_back(Action::Down { rank, incarnation, reason });
                any = any.or(Some(rank));
            }
        }
        if let Some(rank) = any.filter(|_| self.config.kind.is_lockstep()) {
            self.end_group(now, rank, "the keeper of its node was killed", true);
        }
    }

    pub(super) fn stop(&mut self) {
        if self.stopping {
            return;
        }
        self.stopping = true;
        let spawn = self.config.spawn;
        for (&rank, state) in &mut self.ranks {
            let incarnation = state.incarnation;
            state.until = None;
            if state.phase.is_open() {
                let reason = "the sidecar is stopping".to_owned();
                self.actions.push_back(Action::Down { rank, incarnation, reason });
                if spawn && state.process {
                    self.actions.push_back(Action::StopProcess { rank, incarnation });
                }
            }
            state.phase = if state.process { Phase::Stopping } else { Phase::Stopped };
        }
        self.report_stopped();
    }

    pub(super) fn report_stopped(&mut self) {
        if self.stopping
            && !self.stopped_reported
            && self.ranks.values().all(|s| matches!(s.phase, Phase::Stopped | Phase::GivenUp))
        {
            self.stopped_reported = true;
            self.actions.push_back(Action::Stopped);
        }
    }
}
