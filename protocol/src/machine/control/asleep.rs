//! What is known of the engines' memory, and what must not be done because of it.

use std::collections::BTreeMap;

use rmpv::Value;

use crate::machine::memory::{Memory, Weights};
use crate::machine::mutation::{Mutation, mutated};
use crate::machine::policy::{Effect, Wake};
use crate::{EngineIndex, GroupKind};

use super::Control;

/// How to go on after a sleep that has discarded the weights.
pub(super) const NO_WEIGHTS: &str = "the weights were discarded by a sleep of level 2, and the engines would answer with \
     garbage: call wake_up with tags=[\"weights\"], load weights (`sidecar update`, or the trainer's own load), then \
     call wake_up with tags=[\"kv_cache\"]";

/// vLLM resumes what is fully awake by itself. So the KV cache is woken up last: once it is awake, nothing can be loaded
/// before that.
pub(super) fn wakes_without_weights(engines: &BTreeMap<EngineIndex, Memory>, wake: Wake) -> bool {
    let too_early = |memory: &Memory| {
        memory.weights == Weights::Gone && (wake.asks_for_cache() || !memory.woken(wake).sleeps())
    };
    engines.values().any(too_early) && !mutated(Mutation::WakeWithoutWeights)
}

/// An independent engine would be resumed while others still sleep: it has started again meanwhile.
pub(super) fn would_go_ahead(
    engines: &BTreeMap<EngineIndex, Memory>,
    kind: GroupKind,
    rank: EngineIndex,
    wake: Wake,
) -> bool {
    let awake = engines.get(&rank).is_some_and(|memory| !memory.sleeps());
    awake && !kind.is_lockstep() && engines.values().any(|memory| memory.woken(wake).sleeps())
}

impl Control {
    pub(super) fn sleeps(&self) -> bool {
        self.memory.values().any(Memory::sleeps)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.memory.values().any(|memory| memory.weights == Weights::Gone)
    }

    /// Calls are about to reach these engines. True if the version of the weights is unknown from now on, and was not
    /// before.
    pub(super) fn sent<'a>(
        &mut self,
        ranks: impl IntoIterator<Item = &'a EngineIndex>,
        effect: Effect,
    ) -> bool {
        for rank in ranks {
            self.memory.entry(*rank).or_default().sent(effect);
        }
        let changed = self.memory.values().any(|memory| memory.weights != Weights::Known);
        changed && !std::mem::replace(&mut self.external_weights, true)
    }

    pub(super) fn remember(&mut self, rank: EngineIndex, effect: Effect, result: &Result<Value, String>) {
        if let Some(memory) = self.memory.get_mut(&rank) {
            memory.answered(effect, result);
        }
    }
}
