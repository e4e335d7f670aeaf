//! When load is published to directly connected frontends: the rhythm of vLLM's poll loop
//! (`vllm/v1/engine/coordinator.py` 0.32.0, `process_input_socket`).

use std::time::Duration;

use super::{Load, Stamp};
use crate::Time;

/// Between publishes while load changes (vLLM: `min_stats_update_interval_ms`).
const CHANGED: Duration = Duration::from_millis(100);
/// Between publishes while nothing changes.
const IDLE: Duration = Duration::from_secs(5);
/// How long a lockstep group must be silent before live counts are published, so that the counts of
/// all ranks are of one step.
const QUIET: Duration = Duration::from_millis(50);

/// A publish happens only when no message came for a while, so each message moves the deadline.
#[derive(Clone, Debug)]
pub(super) struct Cadence {
    /// The ranks step together, and their counts are grouped by step.
    lockstep: bool,
    changed: bool,
    newest: Option<Stamp>,
    /// Counts as they were at the last step boundary, not yet published.
    at_boundary: Option<Vec<Load>>,
    last_publish: Option<Time>,
    deadline: Option<Time>,
}

impl Cadence {
    pub(super) fn new(lockstep: bool) -> Self {
        Self { lockstep, changed: false, newest: None, at_boundary: None, last_publish: None, deadline: None }
    }

    /// Stats came; `loads` are the counts before they are applied.
    pub(super) fn stats(&mut self, stamp: Stamp, loads: impl FnOnce() -> Vec<Load>) {
        if self.lockstep && self.newest.is_none_or(|newest| stamp > newest) {
            if self.changed {
                self.at_boundary = Some(loads());
            }
            self.newest = Some(stamp);
        }
        self.changed = true;
    }

    /// Something was handled: the silence begins anew.
    pub(super) fn rearm(&mut self, now: Time) {
        let interval = if self.changed { CHANGED } else { IDLE };
        let remaining = self
            .last_publish
            .map_or(Duration::ZERO, |last| interval.saturating_sub(now.saturating_since(last)));
        let quiet = if self.lockstep && self.at_boundary.is_none() { QUIET } else { Duration::ZERO };
        self.deadline = Some(now + remaining.max(quiet));
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        self.deadline
    }

    /// The counts to publish, if it is time to.
    pub(super) fn due(&mut self, now: Time, loads: impl FnOnce() -> Vec<Load>) -> Option<Vec<Load>> {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return None;
        }
        let counts = self.at_boundary.take().unwrap_or_else(|| {
            self.changed = false;
            loads()
        });
        self.last_publish = Some(now);
        self.rearm(now);
        Some(counts)
    }
}
