//! When a process that ended is started again: exponential back-off, and giving up when it fails
//! too often. Used for engines and for supervised frontends.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

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

/// What happened to the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It was started.
    Started,
    /// It does its work (an engine: admitted).
    Ready,
    /// It ended, or could not be started, or was given up.
    Failed {
        /// Why, for people.
        reason: String,
    },
    /// It was stopped on purpose: no restart is due, nor is one that was planned.
    Stopped,
    /// An operator wants it started whatever happened before.
    Reset,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Start,
    /// Do not start it any more.
    GiveUp(GiveUp),
}

/// Too many failures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GiveUp {
    /// How many failures there were within the window.
    pub failures: u32,
    pub window: Duration,
    /// The last failure.
    pub last: String,
}

impl fmt::Display for GiveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "failed {} times within {:?}, last: {}", self.failures, self.window, self.last)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Never started, or stopped on purpose.
    Stopped,
    /// Started, not ready yet.
    Starting,
    /// Does its work since then.
    Ready {
        /// When it became ready.
        since: Time,
    },
    /// Failed; will be started.
    Waiting {
        /// When.
        until: Time,
    },
    /// Failed too often.
    GivenUp(GiveUp),
}

/// The machine; one per process. Driven like all machines, see [`crate::machine`].
#[derive(Clone, Debug)]
pub struct Restart {
    policy: RestartPolicy,
    state: State,
    /// When it failed, within the window.
    failures: VecDeque<Time>,
    actions: VecDeque<Action>,
}

impl Restart {
    /// Of a process that was not started yet.
    pub fn new(policy: RestartPolicy) -> Self {
        Self { policy, state: State::Stopped, failures: VecDeque::new(), actions: VecDeque::new() }
    }

    pub fn handle_event(&mut self, now: Time, event: Event) {
        match event {
            Event::Started => self.state = State::Starting,
            Event::Ready => {
                if !matches!(self.state, State::Ready { .. }) {
                    self.state = State::Ready { since: now };
                }
            }
            Event::Failed { reason } => self.failed(now, reason),
            Event::Stopped => self.state = State::Stopped,
            Event::Reset => {
                self.failures.clear();
                if matches!(self.state, State::Stopped | State::Waiting { .. } | State::GivenUp(_)) {
                    self.start();
                }
            }
        }
    }

    /// The time of [`Self::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Time) {
        match self.state {
            State::Waiting { until } if until <= now => self.start(),
            State::Ready { .. } => self.forget_if_healthy(now),
            _ => {}
        }
    }

    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        match self.state {
            State::Waiting { until } => Some(until),
            State::Ready { since } if !self.failures.is_empty() => Some(since + self.policy.healthy_after),
            _ => None,
        }
    }

    pub fn snapshot(&self) -> State {
        self.state.clone()
    }

    fn start(&mut self) {
        self.state = State::Starting;
        self.actions.push_back(Action::Start);
    }

    fn forget_if_healthy(&mut self, now: Time) {
        if let State::Ready { since } = self.state
            && now.saturating_since(since) >= self.policy.healthy_after
        {
            self.failures.clear();
        }
    }

    fn failed(&mut self, now: Time, last: String) {
        // One end may be reported twice: by the process and by its connection.
        if matches!(self.state, State::Waiting { .. } | State::GivenUp(_)) {
            return;
        }
        self.forget_if_healthy(now);
        let window = self.policy.window;
        while self.failures.front().is_some_and(|failed| now.saturating_since(*failed) > window) {
            self.failures.pop_front();
        }
        self.failures.push_back(now);
        let failures = u32::try_from(self.failures.len()).unwrap_or(u32::MAX);
        if failures > self.policy.budget {
            let why = GiveUp { failures, window, last };
            self.actions.push_back(Action::GiveUp(why.clone()));
            self.state = State::GivenUp(why);
        } else {
            self.state = State::Waiting { until: now + self.policy.delay(failures) };
        }
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

    fn fail(machine: &mut Restart, now: Time) -> Option<Duration> {
        machine.handle_event(now, Event::Failed { reason: "exit code 1".to_owned() });
        machine.poll_timeout().map(|until| until - now)
    }

    fn restart(machine: &mut Restart) -> Time {
        let due = machine.poll_timeout().unwrap();
        machine.handle_timeout(due);
        assert_eq!(machine.poll_action(), Some(Action::Start));
        machine.handle_event(due, Event::Started);
        due
    }

    #[test]
    fn waits_double_up_to_the_cap_and_then_it_gives_up() {
        let mut machine = Restart::new(POLICY);
        machine.handle_event(at(0), Event::Started);
        let mut now = at(0);
        for seconds in [1, 2, 4, 5] {
            assert_eq!(fail(&mut machine, now), Some(Duration::from_secs(seconds)));
            assert_eq!(machine.poll_action(), None, "not before the wait is over");
            now = restart(&mut machine);
        }
        assert_eq!(fail(&mut machine, now), None);
        let Some(Action::GiveUp(why)) = machine.poll_action() else {
            panic!("expected to give up, is {:?}", machine.snapshot());
        };
        assert_eq!(why.to_string(), "failed 5 times within 100s, last: exit code 1");
        assert_eq!(fail(&mut machine, now + Duration::from_secs(500)), None);
        assert_eq!(machine.poll_action(), None, "once");
    }

    #[test]
    fn a_healthy_time_forgets_failures() {
        let mut machine = Restart::new(POLICY);
        machine.handle_event(at(0), Event::Started);
        fail(&mut machine, at(0));
        let started = restart(&mut machine);
        fail(&mut machine, started);
        let started = restart(&mut machine);
        machine.handle_event(started, Event::Ready);
        let healthy = machine.poll_timeout().unwrap();
        assert_eq!(healthy, started + POLICY.healthy_after);
        machine.handle_timeout(healthy);
        assert_eq!(machine.poll_timeout(), None);
        assert_eq!(fail(&mut machine, healthy), Some(POLICY.first_delay));
    }

    #[test]
    fn a_process_that_was_ready_too_briefly_is_not_forgiven() {
        let mut machine = Restart::new(POLICY);
        machine.handle_event(at(0), Event::Started);
        fail(&mut machine, at(0));
        let started = restart(&mut machine);
        machine.handle_event(started, Event::Ready);
        let soon = started + Duration::from_secs(29);
        assert_eq!(fail(&mut machine, soon), Some(Duration::from_secs(2)));
    }

    #[test]
    fn failures_outside_of_the_window_do_not_count() {
        let mut machine = Restart::new(POLICY);
        machine.handle_event(at(0), Event::Started);
        for round in 0..20 {
            let now = at(round * 60);
            assert!(fail(&mut machine, now).is_some(), "round {round}");
            restart(&mut machine);
        }
    }

    #[test]
    fn one_end_reported_twice_is_one_failure() {
        let mut machine = Restart::new(POLICY);
        machine.handle_event(at(0), Event::Started);
        let wait = fail(&mut machine, at(0));
        assert_eq!(fail(&mut machine, at(0)), wait);
    }

    #[test]
    fn stopping_cancels_a_planned_start_and_reset_starts_after_giving_up() {
        let mut machine = Restart::new(POLICY);
        machine.handle_event(at(0), Event::Started);
        fail(&mut machine, at(0));
        machine.handle_event(at(0), Event::Stopped);
        machine.handle_timeout(at(100));
        assert_eq!(machine.poll_action(), None);
        machine.handle_event(at(100), Event::Reset);
        assert_eq!(machine.poll_action(), Some(Action::Start));
        assert_eq!(machine.poll_action(), None);
    }
}
