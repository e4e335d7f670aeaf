//! When a process that ended is started again: exponential back-off, and giving up when it fails
//! too often. Used for engines and for supervised frontends.

use std::collections::VecDeque;
use std::time::Duration;

use thiserror::Error;

use crate::Time;

/// How often and how fast to start again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// Wait after the first failure; doubled with each further one.
    pub first_delay: Duration,
    /// Longest wait.
    pub max_delay: Duration,
    /// The failure that exceeds this number within `window` is the last.
    pub budget: u32,
    /// See `budget`.
    pub window: Duration,
    /// Ready for this long: earlier failures are forgotten.
    pub healthy_after: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            first_delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(60),
            budget: 5,
            window: Duration::from_secs(600),
            healthy_after: Duration::from_secs(120),
        }
    }
}

impl RestartPolicy {
    /// The wait after the `failures`-th failure in a row.
    fn delay(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        self.first_delay.saturating_mul(1 << doublings).min(self.max_delay)
    }
}

/// Too many failures.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("failed {failures} times within {window:?}, last: {last}")]
pub struct GiveUp {
    /// How many failures there were within the window.
    pub failures: u32,
    pub window: Duration,
    /// The last failure.
    pub last: String,
}

/// What is known of the process; one per process.
#[derive(Clone, Debug)]
pub struct Restart {
    policy: RestartPolicy,
    /// It does its work since then.
    ready: Option<Time>,
    /// When it failed, within the window.
    failures: VecDeque<Time>,
    /// What follows from the last failure, until it is started.
    next: Option<Result<Time, GiveUp>>,
}

impl Restart {
    /// Of a process that was not started yet.
    pub const fn new(policy: RestartPolicy) -> Self {
        Self { policy, ready: None, failures: VecDeque::new(), next: None }
    }

    /// It was started.
    pub fn started(&mut self) {
        (self.ready, self.next) = (None, None);
    }

    /// It does its work (an engine: admitted).
    pub fn ready(&mut self, now: Time) {
        self.ready.get_or_insert(now);
        self.next = None;
    }

    /// It ended, or could not be started, or was given up; `last` says why, for people. When to start it again.
    ///
    /// # Errors
    /// Never: it has failed too often.
    pub fn failed(&mut self, now: Time, last: &str) -> Result<Time, GiveUp> {
        // One end may be reported twice: by the process and by its connection.
        if let Some(next) = &self.next {
            return next.clone();
        }
        let RestartPolicy { budget, window, healthy_after, .. } = self.policy;
        if self.ready.take().is_some_and(|since| now.saturating_since(since) >= healthy_after) {
            self.failures.clear();
        }
        self.failures.retain(|failed| now.saturating_since(*failed) <= window);
        self.failures.push_back(now);
        let failures = u32::try_from(self.failures.len()).unwrap_or(u32::MAX);
        let next = if failures > budget {
            Err(GiveUp { failures, window, last: last.to_owned() })
        } else {
            Ok(now + self.policy.delay(failures))
        };
        self.next.insert(next).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: RestartPolicy = RestartPolicy {
        first_delay: Duration::from_secs(1),
        max_delay: Duration::from_secs(5),
        budget: 4,
        window: Duration::from_secs(100),
        healthy_after: Duration::from_secs(30),
    };

    fn at(seconds: u64) -> Time {
        Time::from_millis(seconds * 1000)
    }

    fn fail(process: &mut Restart, now: Time) -> Option<Duration> {
        process.failed(now, "exit code 1").ok().map(|until| until - now)
    }

    /// It fails, and is started when that is due.
    fn fail_and_start(process: &mut Restart, now: Time) -> Time {
        let due = process.failed(now, "exit code 1").unwrap();
        process.started();
        due
    }

    #[test]
    fn waits_double_up_to_the_cap_and_then_it_gives_up() {
        let mut process = Restart::new(POLICY);
        process.started();
        let mut now = at(0);
        for seconds in [1, 2, 4, 5] {
            let due = fail_and_start(&mut process, now);
            assert_eq!(due - now, Duration::from_secs(seconds));
            now = due;
        }
        let why = process.failed(now, "exit code 1").unwrap_err();
        assert_eq!(why.to_string(), "failed 5 times within 100s, last: exit code 1");
        assert_eq!(process.failed(now + Duration::from_secs(500), "it ended"), Err(why), "once");
    }

    #[test]
    fn a_healthy_time_forgets_failures() {
        let mut process = Restart::new(POLICY);
        process.started();
        let started = fail_and_start(&mut process, at(0));
        let started = fail_and_start(&mut process, started);
        process.ready(started);
        assert_eq!(fail(&mut process, started + POLICY.healthy_after), Some(POLICY.first_delay));
    }

    #[test]
    fn a_process_that_was_ready_too_briefly_is_not_forgiven() {
        let mut process = Restart::new(POLICY);
        process.started();
        let started = fail_and_start(&mut process, at(0));
        process.ready(started);
        let soon = started + Duration::from_secs(29);
        assert_eq!(fail(&mut process, soon), Some(Duration::from_secs(2)));
    }

    #[test]
    fn failures_outside_of_the_window_do_not_count() {
        let mut process = Restart::new(POLICY);
        process.started();
        for round in 0..20 {
            let now = at(round * 60);
            assert!(fail(&mut process, now).is_some(), "round {round}");
            process.started();
        }
    }

    #[test]
    fn one_end_reported_twice_is_one_failure() {
        let mut process = Restart::new(POLICY);
        process.started();
        let wait = fail(&mut process, at(0));
        assert_eq!(fail(&mut process, at(0)), wait);
    }
}
