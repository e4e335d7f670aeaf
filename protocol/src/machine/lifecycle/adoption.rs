//! Engines that lived before this sidecar did, and nodes that go away and come back.
//!
//! Nothing is believed that a process does not report now: a node says which sockets are open, which engine has
//! completed its handshake, and which child of its keeper runs. An engine that was still starting is not adopted,
//! because the sidecar that answered its HELLO is gone.

use std::collections::BTreeMap;

use super::{Action, Found, Lifecycle, LifecycleConfig, Phase};
use crate::machine::mutation::{Mutation, mutated};
use crate::{EngineIndex, Time};

impl Lifecycle {
    /// A machine that takes over from a sidecar that ended: what can go on does, everything else is stopped and
    /// started anew. Ranks that are missing in `found` have no engine. Without any it is [`Lifecycle::new`].
    pub fn resume(config: LifecycleConfig, found: &BTreeMap<EngineIndex, Found>, now: Time) -> Self {
        let mut machine = Self::idle(config, now);
        machine.remember(found.values());
        let spawn = machine.config.spawn;
        let alive = |found: &Found| found.alive(spawn);
        let ranks: Vec<EngineIndex> = machine.ranks.keys().copied().collect();
        let life = |rank: &EngineIndex| found.get(rank).and_then(alive);
        // Of a lockstep group all ranks go on, or none: the collectives of the others are gone for ever.
        let generation = ranks.first().and_then(life);
        let whole = generation.is_some() && ranks.iter().all(|rank| life(rank) == generation);
        let whole = whole || mutated(Mutation::AdoptPartOfGroup);
        let had_served = found.values().any(|f| f.admitted);
        let mut to_adopt = Vec::new();
        let mut to_restore = Vec::new();
        for &rank in &ranks {
            let report = found.get(&rank).cloned().unwrap_or_default();
            let Some(state) = machine.ranks.get_mut(&rank) else {
                continue;
            };
            // Had the deployment come up, an engine that does not start is no reason to end it.
            state.served = had_served;
            state.last_error = report.ended.clone();
            match life(&rank).filter(|_| whole || !machine.config.kind.is_lockstep()) {
                Some(incarnation) => {
                    state.incarnation = incarnation;
                    state.process = spawn;
                    state.registered = true;
                    state.handshaken = true;
                    state.until = None;
                    // Whoever is admitted holds the committed weights, and so does its whole group.
                    let adopt = if machine.config.kind.is_lockstep() { had_served } else { report.admitted };
                    let adopt = adopt || mutated(Mutation::AdoptUnrestored);
                    if adopt {
                        state.phase = Phase::Adopting;
                        to_adopt.push((rank, incarnation));
                    } else {
                        state.phase = Phase::Restoring;
                        to_restore.push((rank, incarnation));
                    }
                }
                None => machine.discard(now, rank, &report),
            }
        }
        if !to_adopt.is_empty() {
            machine.actions.push_back(Action::Adopt { ranks: to_adopt });
        }
        if machine.config.kind.is_lockstep() {
            if !to_restore.is_empty() {
                machine.actions.push_back(Action::Restore { ranks: to_restore });
            }
        } else {
            machine.actions.extend(to_restore.into_iter().map(|life| Action::Restore { ranks: vec![life] }));
        }
        machine.handle_timeout(now);
        machine
    }

    /// No new life may have a number that any process has seen.
    fn remember<'a>(&mut self, found: impl Iterator<Item = &'a Found>) {
        if mutated(Mutation::ForgetNewest) {
            return;
        }
        for report in found {
            let seen = [report.newest].into_iter().chain(report.sockets).chain(report.process);
            self.newest = seen.map(|i| i.0).fold(self.newest, u64::max);
        }
    }

    /// What is left of a life that cannot go on is removed; the next one begins then, at no charge.
    fn discard(&mut self, now: Time, rank: EngineIndex, report: &Found) {
        let spawn = self.config.spawn;
        let Some(state) = self.ranks.get_mut(&rank) else {
            return;
        };
        let reason = "its start was not complete, or its group was not, when the sidecar was started again";
        let seen = report.process.or(report.sockets);
        if let Some(incarnation) = seen {
            state.incarnation = incarnation;
            let reason = reason.to_owned();
            state.last_error = state.last_error.take().or_else(|| Some(reason.clone()));
            self.actions.push_back(Action::Down { rank, incarnation, reason });
        }
        match report.process.filter(|_| spawn) {
            Some(incarnation) => self.stop_stray(rank, incarnation),
            None => {
                state.phase = Phase::Waiting;
                state.until = Some(now);
            }
        }
    }

    /// The link to the node of these ranks is lost. Nothing is known to have happened to its engines.
    pub(super) fn node_away(&mut self, ranks: &[EngineIndex]) {
        for rank in ranks {
            if let Some(state) = self.ranks.get_mut(rank) {
                self.away.insert(*rank);
                state.unsure = state.phase != Phase::Preparing;
            }
        }
    }

    /// A node joined again, and this is what it has.
    pub(super) fn node_back(&mut self, now: Time, found: &BTreeMap<EngineIndex, Found>) {
        self.remember(found.values());
        for (&rank, report) in found {
            if !self.ranks.contains_key(&rank) {
                continue;
            }
            self.away.remove(&rank);
            self.reconcile(now, rank, report);
        }
        let adopting = self.ranks.iter().filter(|(_, s)| s.phase == Phase::Adopting);
        let ranks: Vec<_> = adopting.map(|(&rank, s)| (rank, s.incarnation)).collect();
        if !ranks.is_empty() && !self.stopping {
            self.actions.push_back(Action::Adopt { ranks });
        }
        self.report_stopped();
    }

    fn reconcile(&mut self, now: Time, rank: EngineIndex, report: &Found) {
        let spawn = self.config.spawn;
        let limit = now + self.config.startup_timeout;
        let Some(state) = self.ranks.get_mut(&rank) else {
            return;
        };
        let incarnation = state.incarnation;
        let ended = || report.ended.clone().unwrap_or_else(|| "it ended while its node was away".to_owned());
        let process_gone = spawn && report.process != Some(incarnation);
        // A start that began after the report was made is not judged by it.
        let judged = std::mem::take(&mut state.unsure);
        match state.phase {
            Phase::Waiting | Phase::GivenUp | Phase::Stopped | Phase::Preparing => {
                // A start that was given up while the node was away may have succeeded there.
                let Some(stray) = report.process.filter(|_| spawn) else {
                    return;
                };
                match state.phase {
                    Phase::Preparing => {
                        state.incarnation = stray;
                        self.discard(now, rank, report);
                        if self.config.kind.is_lockstep() {
                            let reason = "a process of an earlier life is still there";
                            self.end_group(now, rank, reason, true);
                        }
                    }
                    Phase::Waiting => self.stop_stray(rank, stray),
                    _ => self.actions.push_back(Action::StopProcess { rank, incarnation: stray }),
                }
            }
            Phase::Starting | Phase::Connected if judged => {
                if process_gone {
                    if let Some(stray) = report.process {
                        state.until = Some(limit);
                        self.actions.push_back(Action::StopProcess { rank, incarnation: stray });
                        return;
                    }
                    if !state.spawned && report.expected == Some(incarnation) {
                        // The command to start it may still be on its way.
                        state.until = Some(limit);
                        return;
                    }
                    if !state.spawned {
                        state.process = false;
                        let reason = format!(
                            "engine {rank} was to start when the sidecar of its node was started again"
                        );
                        self.set_aside(now, rank, &reason);
                        return;
                    }
                    let reason = ended();
                    self.exited(now, rank, incarnation, &reason);
                } else if report.expected != Some(incarnation) {
                    // The sidecar that answered its HELLO is gone; its READY would reach nobody.
                    let reason =
                        format!("engine {rank} was starting when the sidecar of its node was started again");
                    self.set_aside(now, rank, &reason);
                } else if report.sockets != Some(incarnation) {
                    let reason = format!("engine {rank} was lost while its node was away");
                    self.lose(now, rank, &reason, false);
                } else if spawn {
                    state.spawned = true;
                    state.until = Some(limit);
                }
            }
            Phase::Ready | Phase::Restoring | Phase::Adopting | Phase::Serving => {
                if process_gone {
                    let reason = ended();
                    self.exited(now, rank, incarnation, &reason);
                } else if report.sockets != Some(incarnation) {
                    let reason = format!("engine {rank} was lost while its node was away");
                    self.lose(now, rank, &reason, false);
                } else if state.phase == Phase::Serving && !report.admitted {
                    self.actions.push_back(Action::Admit { rank, incarnation });
                }
            }
            Phase::Starting | Phase::Connected => {}
            Phase::Stopping => {
                if process_gone {
                    let reason = ended();
                    self.exited(now, rank, incarnation, &reason);
                } else if spawn {
                    self.actions.push_back(Action::StopProcess { rank, incarnation });
                }
            }
        }
    }
}
