//! What an engine reported and nobody has taken yet.

use std::collections::VecDeque;

use bytes::Bytes;

/// Wave edges kept per engine. Waves only grow, so the newest say all that matters; a few more keep the order
/// of an end and the beginning after it.
const EDGES: usize = 16;

/// Something an engine reported to its DP coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reported {
    /// It receives from now on what is published.
    Subscribed,
    /// End or beginning of a wave.
    Edge(Bytes),
    /// Its load: a later one replaces it.
    Load(Bytes),
}

/// Bounded: one subscription, [`EDGES`] wave edges, one load.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    subscribed: bool,
    edges: VecDeque<Bytes>,
    load: Option<Bytes>,
}

impl Backlog {
    pub(super) fn is_empty(&self) -> bool {
        !self.subscribed && self.edges.is_empty() && self.load.is_none()
    }

    pub(super) fn keep(&mut self, reported: Reported) {
        match reported {
            Reported::Subscribed => self.subscribed = true,
            Reported::Edge(frame) => {
                if self.edges.len() == EDGES {
                    self.edges.pop_front();
                }
                self.edges.push_back(frame);
            }
            Reported::Load(frame) => self.load = Some(frame),
        }
    }

    pub(super) fn take(&mut self) -> Option<Reported> {
        if std::mem::take(&mut self.subscribed) {
            return Some(Reported::Subscribed);
        }
        self.edges.pop_front().map(Reported::Edge).or_else(|| self.load.take().map(Reported::Load))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(number: usize) -> Bytes {
        Bytes::from(vec![u8::try_from(number).unwrap()])
    }

    #[test]
    fn the_newest_edges_and_the_newest_load_are_kept_in_order() {
        let mut backlog = Backlog::default();
        assert!(backlog.is_empty());
        for number in 0..100 {
            backlog.keep(Reported::Load(frame(number)));
            backlog.keep(Reported::Edge(frame(100 + number)));
        }
        backlog.keep(Reported::Subscribed);
        let mut all = Vec::new();
        while let Some(reported) = backlog.take() {
            all.push(reported);
        }
        let mut expected = vec![Reported::Subscribed];
        expected.extend((200 - EDGES..200).map(|number| Reported::Edge(frame(number))));
        expected.push(Reported::Load(frame(99)));
        assert_eq!(all, expected);
        assert!(backlog.is_empty());
    }
}
