//! The way to the engines: the edge tasks of all nodes. One whose queue is full delays neither the others nor the
//! DP coordinator: what it could not take is merged until it can.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use dp_sidecar_protocol::frames::COORDINATOR_READY;
use dp_sidecar_protocol::wave::StartDpWave;
use dp_sidecar_protocol::{EngineIndex, Frames, Incarnation, Wave};
use tokio::sync::mpsc;

use crate::driver::handles::{EdgeAsk, EdgeClose, EdgeHandle, EdgeNote, EdgePublish, Envelope, ReplyTo};

/// The engines of one node.
#[derive(Debug)]
struct Node {
    ranks: Vec<EngineIndex>,
    handle: EdgeHandle,
    pending: Pending,
}

/// What an edge must still be told. Bounded by its number of ranks.
#[derive(Debug, Default)]
struct Pending {
    close: BTreeMap<EngineIndex, Incarnation>,
    ready: BTreeSet<EngineIndex>,
    note: Option<(Wave, bool)>,
    start: Option<StartDpWave>,
}

#[derive(Debug)]
pub(super) struct Edges {
    nodes: Vec<Node>,
}

impl Edges {
    pub(super) fn new(edges: Vec<(Vec<EngineIndex>, EdgeHandle)>) -> Self {
        let node = |(ranks, handle): (_, EdgeHandle)| Node { ranks, handle, pending: Pending::default() };
        Self { nodes: edges.into_iter().map(node).collect() }
    }

    /// Drops the sockets of an incarnation.
    pub(super) fn close(&mut self, rank: EngineIndex, incarnation: Incarnation) {
        if let Some(node) = self.nodes.iter_mut().find(|node| node.ranks.contains(&rank)) {
            node.pending.close.insert(rank, incarnation);
            node.flush();
        }
    }

    /// READY to these engines.
    pub(super) fn ready(&mut self, to: &[EngineIndex]) {
        for node in &mut self.nodes {
            node.pending.ready.extend(to.iter().filter(|rank| node.ranks.contains(rank)));
            node.flush();
        }
    }

    /// The wave as the machine has it, for a successor.
    pub(super) fn note(&mut self, wave: Wave, running: bool) {
        for node in &mut self.nodes {
            node.pending.note = Some((wave, running));
            node.flush();
        }
    }

    /// START_DP_WAVE to all engines.
    pub(super) fn start(&mut self, wave: Wave, exclude: Option<EngineIndex>) {
        for node in &mut self.nodes {
            let exclude = match &node.pending.start {
                // The one before excluded somebody else, who is meant by this one, and the other way round.
                Some(before) if before.wave == wave && before.exclude != exclude => None,
                _ => exclude,
            };
            node.pending.start = Some(StartDpWave { wave, exclude });
            node.flush();
        }
    }

    /// Whether something waits for room in a queue.
    pub(super) fn waiting(&self) -> bool {
        self.nodes.iter().any(|node| !node.pending.is_empty())
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&mut self) {
        for node in &mut self.nodes {
            node.flush();
        }
    }
}

impl Node {
    fn flush(&mut self) {
        while !self.pending.is_empty() {
            match self.handle.reserve() {
                Ok(permit) => {
                    if let Some(ask) = self.pending.take(&self.ranks) {
                        let limit = ask.about().limit;
                        permit.send(Envelope { ask, limit, reply: ReplyTo::NOWHERE });
                    }
                }
                Err(mpsc::error::TrySendError::Full(())) => return,
                // The node is gone, and its engines with it: others notice that.
                Err(mpsc::error::TrySendError::Closed(())) => self.pending = Pending::default(),
            }
        }
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.close.is_empty() && self.ready.is_empty() && self.note.is_none() && self.start.is_none()
    }

    /// The next command. READY comes before START_DP_WAVE, which an engine may not see before.
    fn take(&mut self, ranks: &[EngineIndex]) -> Option<EdgeAsk> {
        if let Some((rank, incarnation)) = self.close.pop_first() {
            return Some(EdgeClose { rank, incarnation }.into());
        }
        if let Some((wave, running)) = self.note.take() {
            return Some(EdgeNote { wave, running }.into());
        }
        if !self.ready.is_empty() {
            let ranks = std::mem::take(&mut self.ready).into_iter().collect();
            let frames: Frames = vec![Bytes::from_static(COORDINATOR_READY)];
            return Some(EdgePublish { ranks, frames }.into());
        }
        let frames = self.start.take()?.encode();
        Some(EdgePublish { ranks: ranks.to_vec(), frames }.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::handles::{EdgePrepare, queue_of};

    fn words(commands: &mut mpsc::Receiver<Envelope<EdgeAsk>>) -> Vec<String> {
        let mut all = Vec::new();
        while let Ok(Envelope { ask, .. }) = commands.try_recv() {
            all.push(match ask {
                EdgeAsk::EdgePublish(EdgePublish { ranks, frames }) => {
                    let ranks: Vec<u16> = ranks.iter().map(|rank| rank.0).collect();
                    format!("{ranks:?} {:?}", frames.last().map(|frame| frame.to_vec()))
                }
                EdgeAsk::EdgeNote(EdgeNote { wave, running }) => format!("note {wave} {running}"),
                EdgeAsk::EdgeClose(EdgeClose { rank, .. }) => format!("close {rank}"),
                EdgeAsk::EdgePrepare(EdgePrepare { rank, .. }) => format!("prepare {rank}"),
                EdgeAsk::EdgeVersion(_) => "version".to_owned(),
            });
        }
        all
    }

    type Edge = ((Vec<EngineIndex>, EdgeHandle), mpsc::Receiver<Envelope<EdgeAsk>>);

    fn edge(ranks: &[u16], size: usize) -> Edge {
        let (handle, receiver) = queue_of("edge", size);
        ((ranks.iter().copied().map(EngineIndex).collect(), handle), receiver)
    }

    #[test]
    fn a_node_that_takes_nothing_delays_no_other_and_gets_the_newest_later() {
        let (stuck, mut from_stuck) = edge(&[0, 1], 1);
        let (quick, mut from_quick) = edge(&[2], 64);
        let mut edges = Edges::new(vec![stuck, quick]);
        let start = |wave: u8, exclude: u8| Some(vec![0x92, wave, exclude]);
        edges.ready(&[EngineIndex(0), EngineIndex(1), EngineIndex(2)]);
        edges.start(Wave(3), None);
        edges.start(Wave(4), Some(EngineIndex(1)));
        edges.start(Wave(4), Some(EngineIndex(0)));
        edges.note(Wave(4), true);
        let ready = Some(b"READY".to_vec());
        let expected = [
            format!("[2] {ready:?}"),
            format!("[2] {:?}", start(3, 0xc0)),
            format!("[2] {:?}", start(4, 1)),
            format!("[2] {:?}", start(4, 0)),
            "note 4 true".to_owned(),
        ];
        assert_eq!(words(&mut from_quick), expected);
        assert!(edges.waiting());

        let mut told = Vec::new();
        while edges.waiting() {
            told.extend(words(&mut from_stuck));
            edges.flush();
        }
        told.extend(words(&mut from_stuck));
        let expected =
            [format!("[0, 1] {ready:?}"), "note 4 true".to_owned(), format!("[0, 1] {:?}", start(4, 0xc0))];
        assert_eq!(told, expected);
    }
}
