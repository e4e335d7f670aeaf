//! A sidecar takes over engines that an earlier one may have left half way through an update.
//!
//! Whether that update is rolled back or forward was decided by the commit record; either way the engines are brought
//! to the committed weights: paused once more (a second pause does no harm, and its answer shows that the engine has
//! done what it was told before), loaded, stamped, their caches reset, resumed. There is no way back from it; an
//! engine that does not follow is fenced.

use std::collections::VecDeque;

use crate::Time;
use crate::machine::mutation::{Mutation, mutated};

use super::super::Config;
use super::super::record::Record;
use super::super::types::{Action, Recover, Target};
use super::{Cx, Recovery, Run};

impl Run {
    pub(in super::super) fn recover(
        now: Time,
        recover: Recover,
        config: &Config,
        actions: &mut VecDeque<Action>,
    ) -> Self {
        let mut run = Self::start(now, recover.begin, None, config, actions);
        run.record = Record { recovered: true, ..run.record };
        run.committed = recover.committed;
        // The one before may have closed it.
        run.admission_closed = true;
        run.stamp = recover.version;
        run.recovery = Some(Recovery { digest: recover.digest });
        run
    }

    /// Ends what cannot be done on any rank: nothing is touched by an update, but engines that are taken over
    /// cannot be left as they are.
    pub(super) fn give_up(&mut self, cx: &mut Cx<'_>, error: String) {
        if self.recovery.is_some() {
            self.fence_those(cx, &error, |_| true);
        }
        self.fail(error);
        self.finish(cx);
    }

    pub(super) fn all_recovered_paused(&mut self, cx: &mut Cx<'_>) {
        self.fence_those(cx, "it refused the pause", |state| state.pause_failed);
        if self.active().is_empty() {
            self.finish(cx);
        } else if mutated(Mutation::RecoverWithoutReload) {
            self.start_resume(cx);
        } else {
            self.start_load(cx, Target::New);
        }
    }
}
