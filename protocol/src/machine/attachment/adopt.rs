//! Going on where a predecessor was killed.

use std::collections::BTreeSet;

use super::{Action, Attachment, Engines, Phase};
use crate::handshake::{Addresses, Init};
use crate::{EngineIndex, Time};

impl Attachment {
    pub(super) fn adopt(&mut self, now: Time, engines: Engines, addresses: Addresses, complete: bool) {
        if !matches!(self.phase, Phase::Incomplete) || self.attempt != 0 {
            return;
        }
        self.attempt = 1;
        self.handshake_closed = (0..engines.size).map(EngineIndex).collect();
        self.engines = Some(engines);
        self.init = Some(Init::independent(addresses.clone()));
        self.enter(now, Phase::Adopting(BTreeSet::new()));
        if !complete {
            return self.lost(now, "the sidecar ended while it attached this frontend".to_owned());
        }
        let attempt = self.attempt;
        for rank in (0..self.size()).map(EngineIndex) {
            self.connect_coordinator(rank, &addresses);
        }
        if self.has_coordinator() {
            self.actions.push_back(Action::JoinCoordinator { attempt });
        }
        for rank in (0..self.size()).map(EngineIndex) {
            for (api_server, _) in (0_u32..).zip(&addresses.inputs) {
                self.actions.push_back(Action::AdoptRoute { attempt, rank, api_server });
            }
        }
    }

    /// Attached again when all routes are there. Not when the DP coordinator has answered: it has nothing to say.
    pub(super) fn adopted(&mut self, now: Time, rank: EngineIndex, api_server: u32) {
        let needed = self.routes_needed();
        if let Phase::Adopting(routes) = &mut self.phase {
            routes.insert((rank, api_server));
            if routes.len() == needed {
                self.attach(now);
            }
        }
    }
}
