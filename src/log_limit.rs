//! Messages about what others do wrong, which they may do often.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// Lets one message of a kind (for example: about one address) pass in an interval.
#[derive(Debug)]
pub(crate) struct LogLimit<K> {
    interval: Duration,
    kinds: usize,
    /// When a message of this kind last passed, and how many have not since.
    logged: BTreeMap<K, (Instant, u64)>,
}

impl<K: Ord> LogLimit<K> {
    /// At most `kinds` are told apart in an interval; of others, nothing passes.
    pub(crate) const fn new(interval: Duration, kinds: usize) -> Self {
        Self { interval, kinds, logged: BTreeMap::new() }
    }

    /// Whether a message passes; with the number of those of its kind that did not since the last one.
    pub(crate) fn admit(&mut self, kind: K) -> Option<u64> {
        let now = Instant::now();
        let recent = |at: Instant| now.saturating_duration_since(at) < self.interval;
        if let Some((at, suppressed)) = self.logged.get_mut(&kind) {
            if recent(*at) {
                *suppressed += 1;
                return None;
            }
            *at = now;
            return Some(std::mem::take(suppressed));
        }
        if self.logged.len() >= self.kinds {
            self.logged.retain(|_, (at, _)| recent(*at));
        }
        (self.logged.len() < self.kinds).then(|| {
            self.logged.insert(kind, (now, 0));
            0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_message_of_a_kind_passes_in_an_interval_and_counts_the_others() {
        let second = Duration::from_secs(1);
        let mut limit = LogLimit::new(10 * second, 2);
        assert_eq!(limit.admit("a"), Some(0));
        tokio::time::advance(second).await;
        assert_eq!(limit.admit("b"), Some(0));
        assert_eq!((limit.admit("a"), limit.admit("a")), (None, None));
        assert_eq!(limit.admit("c"), None, "no room");
        tokio::time::advance(9 * second).await;
        assert_eq!(limit.admit("a"), Some(2));
        tokio::time::advance(second).await;
        assert_eq!(limit.admit("c"), Some(0), "in place of b");
    }
}
