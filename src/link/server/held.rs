//! Control calls of frontends that wait for a decision of who is connected.

use std::collections::BTreeMap;

use dp_sidecar_protocol::{EngineIndex, FrontendId};
use uuid::Uuid;

use crate::driver::handles::HeldCall;

/// More of them at a time are refused.
const LIMIT: usize = 1024;

#[derive(Debug)]
struct Entry {
    call: HeldCall,
    /// Who was told.
    told: Option<Uuid>,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Held(BTreeMap<(EngineIndex, u64), Entry>);

impl Held {
    /// False: there are too many.
    pub(super) fn add(&mut self, call: HeldCall, told: Option<Uuid>) -> bool {
        if self.0.len() >= LIMIT {
            return false;
        }
        self.0.insert((call.rank, call.ticket), Entry { call, told });
        true
    }

    pub(super) fn released(&mut self, rank: EngineIndex, ticket: u64) {
        self.0.remove(&(rank, ticket));
    }

    pub(super) fn frontend_gone(&mut self, rank: EngineIndex, frontend: FrontendId) {
        self.0.retain(|_, entry| entry.call.rank != rank || entry.call.frontend != frontend);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, to be refused.
    pub(super) fn take(&mut self) -> Vec<HeldCall> {
        std::mem::take(&mut self.0).into_values().map(|entry| entry.call).collect()
    }

    /// Somebody has connected: those that were told to another process, to be refused.
    pub(super) fn connected(&mut self, session: Uuid) -> Vec<HeldCall> {
        let all = std::mem::take(&mut self.0);
        let (stale, fresh): (BTreeMap<_, _>, BTreeMap<_, _>) =
            all.into_iter().partition(|(_, entry)| entry.told.is_some_and(|told| told != session));
        self.0 = fresh;
        stale.into_values().map(|entry| entry.call).collect()
    }

    /// The rest, to be told (again: it may not have arrived).
    pub(super) fn tell(&mut self, session: Uuid) -> Vec<HeldCall> {
        self.0.values_mut().for_each(|entry| entry.told = Some(session));
        self.0.values().map(|entry| entry.call.clone()).collect()
    }
}
