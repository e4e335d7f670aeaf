//! What must be on record about engines so that a sidecar that takes over knows which of them to trust.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{EngineIndex, Incarnation, PausedBy, UpdateId, WeightVersion};

use super::record::Record;
use super::vocabulary::{Checkpoint, NodeId, Participant, PauseMode, RankProgress};

/// An update that is about to touch engines. Durable before the first of them is paused.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Begun {
    pub id: UpdateId,
    /// Version before; `None`: weights did not come from an update of ours.
    pub from_version: Option<WeightVersion>,
    /// Label of the new weights.
    pub to_version: WeightVersion,
    /// Where they come from.
    pub source: String,
    /// What happens to running requests.
    pub mode: PauseMode,
    /// Every engine that takes part.
    pub participants: BTreeMap<EngineIndex, Participant>,
    /// What the engines of each node are told to load.
    pub new: BTreeMap<NodeId, Checkpoint>,
    /// What they are told to load on the way back. Not there: no way back.
    pub previous: BTreeMap<NodeId, Checkpoint>,
}

/// Which engines may hold something else than the committed weights. Kept in the journal: written when an
/// update begins and when it ends. Where an update has ended is decided by the commit record alone.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ledger {
    /// The update that is open.
    #[serde(default)]
    pub begun: Option<Begun>,
    /// Lives that an update lost sight of: fenced, lost, or not there when it was recovered. They may be paused,
    /// torn, or at any version, should they still live.
    #[serde(default)]
    pub suspects: BTreeMap<EngineIndex, Incarnation>,
    /// A frontend has loaded weights by itself since the last update.
    #[serde(default)]
    pub external_weights: bool,
    /// All engines are paused, by the operator or a frontend: whoever takes over leaves them so.
    #[serde(default)]
    pub pause: Option<Pause>,
}

/// A pause that outlives the sidecar. Whether the engines sleep is known to their ranks' tasks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// Who has paused them.
    pub by: PausedBy,
}

impl Ledger {
    /// An update, or the recovery of one, has ended.
    pub fn end(&mut self, record: &Record) {
        let begun = self.begun.take();
        for (rank, participant) in begun.into_iter().flat_map(|begun| begun.participants) {
            if !record.ranks.contains_key(&rank) {
                self.suspects.insert(rank, participant.incarnation);
            }
        }
        for (rank, state) in &record.ranks {
            if matches!(state.times.state, RankProgress::Fenced | RankProgress::Lost) {
                self.suspects.insert(*rank, state.incarnation);
            } else {
                self.suspects.remove(rank);
            }
        }
    }

    /// A life of a rank holds the committed weights, so that the lives before it matter no more. Not while the
    /// update that is open runs here. Returns whether anything was to be forgotten.
    pub fn restored(&mut self, rank: EngineIndex, incarnation: Incarnation) -> bool {
        let mut stale = self.suspects.get(&rank).is_some_and(|life| *life <= incarnation);
        if stale {
            self.suspects.remove(&rank);
        }
        if let Some(begun) = &mut self.begun {
            let open = begun.participants.get(&rank);
            if open.is_some_and(|participant| participant.incarnation <= incarnation) {
                begun.participants.remove(&rank);
                stale = true;
            }
            if begun.participants.is_empty() {
                self.begun = None;
            }
        }
        stale
    }

    /// Whether this life may hold anything else than the committed weights, or be left paused.
    pub fn suspects(&self, rank: EngineIndex, incarnation: Incarnation) -> bool {
        let open = self.begun.as_ref().and_then(|begun| begun.participants.get(&rank));
        open.is_some_and(|participant| participant.incarnation == incarnation)
            || self.suspects.get(&rank) == Some(&incarnation)
    }
}
