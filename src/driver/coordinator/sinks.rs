//! What goes to the DP coordinators of attached frontends. A frontend that does not read costs the
//! others nothing, and finds the newest when it reads again.

use std::collections::BTreeMap;

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIndex, FrontendId};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::driver::handles::ForFrontendCoordinator;

/// A message for frontends' DP coordinators, as far as its fate in a full queue depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Load of a rank: a later one replaces it.
    Load,
    /// Wave and state of the group: waves only grow, so a later one says all that matters.
    Wave,
}

#[derive(Debug)]
struct Sink {
    sender: mpsc::Sender<ForFrontendCoordinator>,
    /// What does not fit stays here.
    wave: Option<ForFrontendCoordinator>,
    loads: BTreeMap<EngineIndex, Bytes>,
}

/// All attached frontends.
#[derive(Debug, Default)]
pub(super) struct Sinks {
    by_frontend: BTreeMap<FrontendId, Sink>,
}

impl Sinks {
    pub(super) fn insert(&mut self, frontend: FrontendId, sender: mpsc::Sender<ForFrontendCoordinator>) {
        let sink = Sink { sender, wave: None, loads: BTreeMap::new() };
        self.by_frontend.insert(frontend, sink);
    }

    pub(super) fn remove(&mut self, frontend: FrontendId) -> bool {
        self.by_frontend.remove(&frontend).is_some()
    }

    /// Sends to one frontend, or to all; returns those that are gone.
    pub(super) fn send(
        &mut self,
        to: Option<FrontendId>,
        kind: Kind,
        message: &ForFrontendCoordinator,
    ) -> Vec<FrontendId> {
        for (&frontend, sink) in &mut self.by_frontend {
            if to.is_none_or(|one| one == frontend) {
                sink.keep(kind, message.clone());
            }
        }
        self.flush()
    }

    /// Whether something waits for room in a queue.
    pub(super) fn waiting(&self) -> bool {
        self.by_frontend.values().any(Sink::waiting)
    }

    /// Sends what waits, as far as there is room; returns the frontends that are gone.
    pub(super) fn flush(&mut self) -> Vec<FrontendId> {
        let gone = self.by_frontend.iter_mut().filter_map(|(&of, sink)| (!sink.flush()).then_some(of));
        gone.collect()
    }
}

impl Sink {
    fn waiting(&self) -> bool {
        self.wave.is_some() || !self.loads.is_empty()
    }

    fn keep(&mut self, kind: Kind, message: ForFrontendCoordinator) {
        match kind {
            Kind::Load => {
                self.loads.insert(message.rank, message.frame);
            }
            Kind::Wave => self.wave = Some(message),
        }
    }

    /// False if the frontend is gone.
    fn flush(&mut self) -> bool {
        while self.waiting() {
            let permit = match self.sender.try_reserve() {
                Ok(permit) => permit,
                Err(TrySendError::Full(())) => return true,
                Err(TrySendError::Closed(())) => return false,
            };
            let load = || self.loads.pop_first().map(|(rank, frame)| ForFrontendCoordinator { rank, frame });
            if let Some(message) = self.wave.take().or_else(load) {
                permit.send(message);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(rank: u16, text: &'static str) -> ForFrontendCoordinator {
        ForFrontendCoordinator { rank: EngineIndex(rank), frame: Bytes::from_static(text.as_bytes()) }
    }

    #[test]
    fn a_frontend_that_does_not_read_finds_the_newest_and_the_others_get_everything() {
        let (slow, mut from_slow) = mpsc::channel(1);
        let (quick, mut from_quick) = mpsc::channel(16);
        let mut sinks = Sinks::default();
        sinks.insert(FrontendId(1), slow);
        sinks.insert(FrontendId(2), quick);
        let sent = [
            (Kind::Load, message(0, "load a")),
            (Kind::Load, message(0, "load b")),
            (Kind::Wave, message(0, "start 1")),
            (Kind::Load, message(1, "load c")),
            (Kind::Load, message(0, "load d")),
            (Kind::Wave, message(0, "end 1")),
        ];
        for (kind, message) in &sent {
            assert_eq!(sinks.send(None, *kind, message), []);
        }
        let mut quick = Vec::new();
        while let Ok(message) = from_quick.try_recv() {
            quick.push(message.frame);
        }
        assert_eq!(quick.len(), sent.len());

        let mut slow = Vec::new();
        while let Ok(message) = from_slow.try_recv() {
            slow.push(message.frame);
            assert_eq!(sinks.flush(), []);
        }
        assert_eq!(slow, ["load a", "end 1", "load d", "load c"]);
        assert!(!sinks.waiting());
    }

    #[test]
    fn a_frontend_whose_attachment_ended_is_named() {
        let (sender, receiver) = mpsc::channel(1);
        let mut sinks = Sinks::default();
        sinks.insert(FrontendId(7), sender);
        drop(receiver);
        let gone = sinks.send(Some(FrontendId(7)), Kind::Wave, &message(0, "end 1"));
        assert_eq!(gone, [FrontendId(7)]);
    }
}
