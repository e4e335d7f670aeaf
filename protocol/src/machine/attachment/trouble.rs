//! What goes wrong, and what is said about it.

use super::{Action, After, Attachment, BACKOFF_MAX, CONFIRM, Phase, REFUSAL_WINDOW};
use core::net::IpAddr;

use crate::handshake::{Addresses, Init};
use crate::machine::mutation::{Mutation, mutated};
use crate::{EngineIndex, Time};

/// The host of `HOST:PORT`.
fn host_of(address: &str) -> Option<&str> {
    let (host, _) = address.rsplit_once(':')?;
    Some(host.trim_matches(['[', ']']))
}

impl Attachment {
    /// Which of these sockets is not on the frontend's own host, and what to do about it. vLLM has them on
    /// `--data-parallel-address`, where its handshake socket is, too (`launch_core_engines`, vllm/v1/engine/utils.py
    /// 0.32.0); all but the one for frontends, to which nobody here connects.
    pub(super) fn foreign(&self, addresses: &Addresses) -> Option<String> {
        let address = &self.address;
        let named = host_of(address);
        let own = |host: &str| {
            named.is_some_and(|named| named.eq_ignore_ascii_case(host))
                || host.parse::<IpAddr>().is_ok_and(|ip| Some(ip.to_canonical()) == self.peer)
        };
        let coordinator = [&addresses.coordinator_input, &addresses.coordinator_output];
        let mut sockets =
            addresses.inputs.iter().chain(&addresses.outputs).chain(coordinator.into_iter().flatten());
        let other =
            sockets.find(|socket| !socket.strip_prefix("tcp://").and_then(host_of).is_some_and(own))?;
        let host = self.peer.map_or_else(|| address.clone(), |ip| ip.to_string());
        Some(format!(
            "frontend {address} wants its engines to connect to {other}, which is not on its own host, {host}: start it with --data-parallel-address HOST and --data-parallel-size-local 0, and add it to the sidecar by that HOST"
        ))
    }

    /// Why this INIT cannot be from a frontend of this deployment.
    pub(super) fn misfit(&self, init: &Init) -> Option<String> {
        let address = &self.address;
        let engines = self.engines.as_ref()?;
        if engines.size < 2 {
            return None;
        }
        match (engines.lockstep, init.data_parallel_size()) {
            (_, Some(theirs)) if theirs != i64::from(engines.size) => Some(format!(
                "frontend {address} runs with --data-parallel-size {theirs}, this deployment has {}",
                engines.size
            )),
            (true, None) => Some(format!(
                "frontend {address} expects independent engines (its INIT has no data_parallel_size), this deployment runs a MoE model in lockstep: does it serve another model?"
            )),
            (false, Some(_)) => Some(format!(
                "frontend {address} expects engines in lockstep (its INIT has a data_parallel_size), this deployment runs a dense model: does it serve another model, or run a vLLM older than 0.14.1?"
            )),
            _ => None,
        }
    }

    pub(super) fn stalled(&mut self, now: Time) {
        let (address, stall) = (self.address.clone(), self.stall);
        let size = self.size();
        match &self.phase {
            Phase::Connecting(connected) => {
                let n = connected.len();
                self.lost(now, format!("{n} of {size} handshake connections were accepted within {stall:?}"));
            }
            Phase::Settling => {
                self.accept();
                self.say_hello(now, EngineIndex(0));
            }
            Phase::Hello(rank) => self.refuse(format!(
                "frontend {address} accepts connections but has not answered HELLO of rank {rank} with INIT for {stall:?}"
            )),
            Phase::Registering(state) if !state.ready_sent && self.has_coordinator() => {
                let n = state.coordinator_ready.len();
                self.refuse(format!(
                    "the DP coordinator of frontend {address} has broadcast READY to {n} of {size} ranks for {stall:?}: it waits for more engines, so its --data-parallel-size is probably larger than {size}, or it serves local engines of its own (--data-parallel-size-local must be 0)"
                ));
            }
            Phase::Registering(state) if state.ready_sent => {
                let (open, needed) = (state.routes.len(), self.routes_needed());
                if open < needed {
                    self.detail = Some(format!("{open} of {needed} routes to frontend {address} are open"));
                    // Asked again: the routes have a deadline of their own.
                    self.stall_at = Some(now + CONFIRM);
                } else {
                    let remark = format!(
                        "frontend {address} has READY of all {size} ranks but keeps its handshake socket open: it may wait for more engines than {size}"
                    );
                    self.attach(now);
                    self.detail = Some(remark);
                }
            }
            _ => {}
        }
    }

    pub(super) fn handshake_lost(&mut self, now: Time, rank: EngineIndex, reason: &str) {
        let address = self.address.clone();
        let size = self.size();
        match &mut self.phase {
            Phase::Connecting(_) | Phase::Settling => {
                self.lost(now, format!("handshake connection of rank {rank}: {reason}"));
            }
            Phase::Hello(asked) => {
                let asked = *asked;
                if asked.0 > 0 {
                    self.refuse(format!(
                        "frontend {address} closed its handshake after HELLO of rank {asked}: it runs with --data-parallel-size {asked} while this deployment has {size}, or it was stopped"
                    ));
                }
                self.lost(now, format!("handshake connection closed before INIT to rank {asked}: {reason}"));
            }
            Phase::Registering(state) if state.ready_sent => {
                // The frontend closes its handshake socket when all engines are READY.
                self.handshake_closed.insert(rank);
                self.advance(now);
            }
            Phase::Attached => {
                self.handshake_closed.insert(rank);
                self.close_handshake();
            }
            Phase::Registering(_) => {
                self.lost(now, format!("handshake connection of rank {rank} closed before READY: {reason}"))
            }
            Phase::Unfit | Phase::NoSlots => {
                self.lost(now, format!("handshake connection closed: {reason}"));
            }
            _ => {}
        }
    }

    /// Says so once per cause, and shows it until the next HELLO.
    pub(super) fn refuse(&mut self, error: String) {
        if self.detail.as_ref() != Some(&error) {
            self.actions.push_back(Action::Refused { error: error.clone() });
        }
        self.refused = true;
        self.detail = Some(error);
    }

    pub(super) fn unfit(&mut self, now: Time, error: String) {
        self.refuse(error);
        self.enter(now, Phase::Unfit);
    }

    pub(super) fn lost(&mut self, now: Time, reason: String) {
        let soon = self.ready_at.is_some_and(|at| now.saturating_since(at) < REFUSAL_WINDOW);
        let hash = self.engines.as_ref().and_then(|engines| engines.parallel_config_hash.as_ref());
        if let (true, Some(hash)) = (soon, hash) {
            self.refuse(format!(
                "frontend {} went away right after READY: either it was stopped, or its parallel flags differ from the engines' (their parallel_config_hash is {hash}; the frontend's log then says configuration mismatch) ({reason})",
                self.address
            ));
        } else if !self.refused {
            self.detail = Some(reason.clone());
        }
        self.last_loss = Some(reason.clone());
        self.tear_down(now, After::Retry, reason);
    }

    pub(super) fn tear_down(&mut self, now: Time, after: After, reason: String) {
        // Only a frontend that may have routes of ours needs to be told.
        let told_dead = match (&self.phase, &self.init) {
            (Phase::Registering(_) | Phase::Adopting(_) | Phase::Attached, Some(init)) => {
                init.addresses.outputs.clone()
            }
            _ => Vec::new(),
        };
        self.enter(now, Phase::TearingDown(after));
        self.actions.push_back(Action::Teardown { attempt: self.attempt, told_dead, reason });
        if after == After::Retry && mutated(Mutation::RetryBeforeTornDown) {
            self.back_off(now);
        }
    }

    pub(super) fn back_off(&mut self, now: Time) {
        self.init = None;
        self.ready_at = None;
        let until = now + self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
        self.enter(now, Phase::Backoff(until));
    }

    pub(super) fn remove(&mut self, now: Time) {
        match self.phase {
            Phase::Incomplete | Phase::Backoff(_) | Phase::Probing => self.removed(now),
            Phase::TearingDown(_) => self.phase = Phase::TearingDown(After::Remove),
            Phase::Removed => {}
            _ => self.tear_down(now, After::Remove, "removed".to_owned()),
        }
    }

    pub(super) fn removed(&mut self, now: Time) {
        self.enter(now, Phase::Removed);
        self.accept();
        self.actions.push_back(Action::Done);
    }
}
