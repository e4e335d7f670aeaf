//! The DP coordinator: which request wave a lockstep group is in and whether it runs, the READY
//! gate of the engines, and the load of each rank. See `docs/coordinator.md`.
//!
//! The transition table is that of vLLM's `DPCoordinatorProc` (`vllm/v1/engine/coordinator.py`
//! 0.32.0). For tests there is a machine that follows it to the letter (`upstream.rs`); a trace of the
//! real class is replayed against it. The one here differs where the sidecar knows more or outlives the
//! engines:
//!
//! * The wave never goes back, also over a restart of the group. Fresh engines count from 0, so the
//!   first thing they get after READY is START_DP_WAVE with the machine's number, and nothing else
//!   may reach them before they have finished that wave ([`Snapshot::in_step`]).
//! * A request on its way to an engine ([`Event::Wake`]) wakes the group unless an engine has reported
//!   that it runs. START_DP_WAVE is repeated until an engine reports something that can only have
//!   happened after it, because engines that are paused drop it without a word.
//! * A rank that takes no requests is reported with a load that steers them elsewhere, and the
//!   death of a lockstep group ends the wave for the frontends.
//!
//! * It may come after the engines ([`Event::Adopted`]): it starts from what their nodes have heard, and wakes a
//!   group of which it cannot know what was asked of it.
//!
//! `running` is what engines report, never what a START_DP_WAVE of ours is expected to cause.

mod adopt;
#[cfg(any(test, feature = "test-support"))]
mod cadence;
mod types;
#[cfg(any(test, feature = "test-support"))]
mod upstream;

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

pub use types::{Action, Adopted, Event, Exclude, Note, Report, Snapshot, Stamp};

use crate::layout::{Layout, VllmVersion};
use crate::machine::mutation::{Mutation, mutated};
use crate::stats::Load;
use crate::{EngineIndex, FrontendId, GroupKind, Incarnation, Time, Wave};

/// Wakes that follow a START_DP_WAVE sooner than this are answered by one more at its end.
const WAKE_INTERVAL: Duration = Duration::from_millis(2);
/// A START_DP_WAVE of which nothing came is repeated after this.
const WAKE_RETRY: Duration = Duration::from_millis(500);

/// How the machine is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// How the ranks depend on each other.
    pub kind: GroupKind,
    /// `--data-parallel-size`.
    pub size: u16,
    /// Of the engines' version; [`Event::Version`] corrects it.
    pub layout: Layout,
    /// A number no frontend's or engine's wave is above.
    pub wave: Wave,
    /// Differences from a machine in front of hosted engines and attached frontends.
    #[cfg(any(test, feature = "test-support"))]
    pub upstream: upstream::Differences,
}

impl Config {
    /// Hosted engines, attached frontends.
    pub fn hosted(kind: GroupKind, size: u16) -> Self {
        Self {
            kind,
            size,
            layout: Layout::closest(VllmVersion::new(0, 32, 0)),
            wave: Wave(0),
            #[cfg(any(test, feature = "test-support"))]
            upstream: upstream::Differences::default(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Not there: reports are of a life that is over.
    Down,
    Subscribed,
    /// READY was sent.
    Ready,
}

#[derive(Clone, Debug)]
struct Rank {
    stage: Stage,
    incarnation: Option<Incarnation>,
    admitted: bool,
    load: Load,
    stamp: Stamp,
}

/// START_DP_WAVE that was sent and of which nothing has come yet.
#[derive(Clone, Copy, Debug)]
struct Waking {
    wave: Wave,
    sent: Time,
    /// Another wake came within [`WAKE_INTERVAL`].
    again: bool,
}

/// The machine. Driven like all machines, see [`crate::machine`].
#[derive(Clone, Debug)]
pub struct Coordinator {
    config: Config,
    wave: Wave,
    running: bool,
    ranks: Vec<Rank>,
    frontends: BTreeSet<FrontendId>,
    /// All ranks of a lockstep group have READY.
    formed: bool,
    in_step: bool,
    /// A frontend wanted a wave while there was no group; up to 0.28 its DP coordinator believes that
    /// the group runs until it hears of a wave's end.
    hinted: bool,
    waking: Option<Waking>,
    actions: VecDeque<Action>,
    #[cfg(any(test, feature = "test-support"))]
    publisher: upstream::Publisher,
}

impl Coordinator {
    /// A machine without engines and frontends.
    pub fn new(config: Config) -> Self {
        let rank = Rank {
            stage: Stage::Down,
            incarnation: None,
            admitted: false,
            load: Load::default(),
            stamp: Stamp::default(),
        };
        let lockstep = config.kind.is_lockstep();
        Self {
            wave: config.wave,
            running: false,
            ranks: vec![rank; usize::from(config.size)],
            frontends: BTreeSet::new(),
            formed: false,
            in_step: !lockstep,
            hinted: false,
            waking: None,
            actions: VecDeque::new(),
            #[cfg(any(test, feature = "test-support"))]
            publisher: upstream::Publisher::new(lockstep),
            config,
        }
    }

    pub fn handle_event(&mut self, now: Time, event: Event) {
        #[cfg(any(test, feature = "test-support"))]
        let before = (self.wave, self.running);
        match event {
            Event::Version(layout) => self.config.layout = *layout,
            Event::Adopted { wave, engines } => self.adopted(now, wave, &engines),
            Event::Subscribed { rank, incarnation } => self.subscribed(now, rank, incarnation),
            Event::Report { rank, incarnation, report } => self.report(now, rank, incarnation, &report),
            #[cfg(any(test, feature = "test-support"))]
            Event::FirstRequest { target, wave } => self.first_request(now, target, wave),
            Event::StartWave { wave, .. } => {
                // A frontend can be ahead only if the machine lost its memory. Falling behind is what
                // strands requests, so its number counts.
                if self.lockstep() && wave > self.wave {
                    self.wave = wave;
                }
                self.hinted |= !self.formed;
                self.wake(now);
            }
            Event::Wake { .. } => self.wake(now),
            Event::Admitted { rank } => self.admitted(rank),
            Event::EngineDown { rank, incarnation } => self.engine_down(rank, incarnation),
            Event::FrontendAttached { frontend } => self.frontend_attached(frontend),
            Event::FrontendDetached { frontend } => {
                self.frontends.remove(&frontend);
            }
        }
        #[cfg(any(test, feature = "test-support"))]
        self.event_handled(now, before);
    }

    /// The time of [`Self::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.wake_deadline().is_some_and(|deadline| deadline <= now) {
            self.send_wake(now);
        }
        #[cfg(any(test, feature = "test-support"))]
        self.publish_due(now);
    }

    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let deadline = self.wake_deadline();
        #[cfg(any(test, feature = "test-support"))]
        let deadline = deadline.into_iter().chain(self.publisher.deadline()).min();
        deadline
    }

    pub fn snapshot(&self) -> Snapshot {
        let subscribed = self.ranks.iter().filter(|rank| rank.stage != Stage::Down);
        Snapshot {
            wave: self.wave,
            running: self.running,
            loads: loads(&self.ranks),
            subscribed: u16::try_from(subscribed.count()).unwrap_or(u16::MAX),
            in_step: self.in_step,
        }
    }

    pub fn wave(&self) -> Wave {
        self.wave
    }

    /// Whether the group runs, as far as engines have reported.
    pub fn running(&self) -> bool {
        self.running
    }

    fn lockstep(&self) -> bool {
        self.config.kind.is_lockstep()
    }

    /// Always, but in tests.
    #[cfg(not(any(test, feature = "test-support")))]
    const fn hosted(&self) -> bool {
        true
    }

    fn push(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    fn tell_all(&mut self, rank: EngineIndex, report: Report) {
        if !self.frontends.is_empty() {
            self.push(Action::Tell { frontend: None, rank, report });
        }
    }

    /// Looks a rank up; notes what is not ours.
    fn rank(&mut self, rank: EngineIndex) -> Option<&mut Rank> {
        let at = usize::from(rank.0);
        if at >= self.ranks.len() {
            let size = self.config.size;
            self.push(Action::Note(Note::OutOfRange { rank, size }));
            return None;
        }
        self.ranks.get_mut(at)
    }

    // --- engines come and go ---

    /// An engine is there: whether its life is new, and how far it was known to be. Nothing if that life is over.
    fn appears(&mut self, index: EngineIndex, incarnation: Incarnation) -> Option<(bool, Stage)> {
        let rank = self.rank(index)?;
        let (known, stage) = (rank.incarnation, rank.stage);
        let fresh = known.is_none_or(|known| incarnation > known);
        if known.is_some_and(|known| incarnation < known) || (!fresh && stage == Stage::Down) {
            self.push(Action::Note(Note::Stale { rank: index, incarnation }));
            return None;
        }
        if fresh && stage != Stage::Down {
            // Its predecessor's death was not reported, but it cannot be alive.
            self.take_down(index);
        }
        if fresh && let Some(rank) = self.rank(index) {
            rank.incarnation = Some(incarnation);
            rank.stage = Stage::Subscribed;
            rank.admitted = false;
            rank.load = Load::default();
        }
        Some((fresh, stage))
    }

    fn subscribed(&mut self, now: Time, index: EngineIndex, incarnation: Incarnation) {
        let Some((fresh, stage)) = self.appears(index, incarnation) else { return };
        if !fresh {
            return self.subscribed_again(index, stage);
        }
        if !self.lockstep() && self.hosted() {
            self.send_ready(vec![index]);
        } else if self.ranks.iter().all(|rank| rank.stage == Stage::Subscribed) {
            let all = (0..self.config.size).map(EngineIndex).collect();
            self.send_ready(all);
            self.formed = true;
            self.form(now);
        }
    }

    /// All engines of a new group are idle, at wave 0, and have read nothing but READY.
    fn form(&mut self, now: Time) {
        let fresh = self.wave == Wave(0) && !std::mem::take(&mut self.hinted);
        self.in_step = !self.lockstep() || !self.hosted() || fresh || mutated(Mutation::NoWaveForFreshGroup);
        if !self.in_step {
            self.send_wake(now);
        }
    }

    fn subscribed_again(&mut self, index: EngineIndex, stage: Stage) {
        if stage != Stage::Ready {
            return;
        }
        if !self.hosted() {
            let all = (0..self.config.size).map(EngineIndex).collect();
            self.send_ready(all);
        } else if self.config.layout.second_ready_tolerated() {
            self.send_ready(vec![index]);
        } else {
            self.push(Action::Note(Note::SecondReadyWithheld { rank: index }));
        }
    }

    fn send_ready(&mut self, to: Vec<EngineIndex>) {
        for index in &to {
            if let Some(rank) = self.rank(*index) {
                rank.stage = Stage::Ready;
            }
        }
        self.push(Action::SendReady { to });
    }

    fn admitted(&mut self, index: EngineIndex) {
        let Some(rank) = self.rank(index) else { return };
        if rank.stage != Stage::Ready {
            self.push(Action::Note(Note::AdmittedWhileDown { rank: index }));
            return;
        }
        if !rank.admitted {
            rank.admitted = true;
            let report = Report::stats(rank.load, rank.stamp);
            self.tell_all(index, report);
        }
    }

    fn engine_down(&mut self, index: EngineIndex, incarnation: Incarnation) {
        let Some(rank) = self.rank(index) else { return };
        if rank.incarnation.is_some_and(|known| incarnation < known) {
            return;
        }
        rank.incarnation = Some(incarnation);
        // A rank that is down already went with its group, or never came up.
        if rank.stage != Stage::Down {
            self.take_down(index);
        }
    }

    /// The life of this rank is over; with it that of its group, if it was complete.
    fn take_down(&mut self, index: EngineIndex) {
        let group = self.lockstep() && std::mem::take(&mut self.formed);
        for at in 0..self.config.size {
            if group || at == index.0 {
                self.take_rank_down(EngineIndex(at));
            }
        }
        if group {
            self.waking = None;
            self.in_step = false;
            self.running = false;
            // Frontends may believe that it runs even if no engine said so: they assume it once they
            // have sent FIRST_REQ.
            let wave = self.wave;
            self.wave = Wave(wave.0.saturating_add(1));
            self.tell_all(EngineIndex(0), Report::wave_complete(wave));
        }
    }

    fn take_rank_down(&mut self, index: EngineIndex) {
        let Some(rank) = self.rank(index) else { return };
        let was_admitted = std::mem::take(&mut rank.admitted);
        rank.stage = Stage::Down;
        rank.load = Load::default();
        let stamp = rank.stamp;
        if was_admitted {
            self.tell_all(index, Report::stats(Load::STEER_AWAY, stamp));
        }
    }

    // --- frontends come and go ---

    fn frontend_attached(&mut self, frontend: FrontendId) {
        self.frontends.insert(frontend);
        let mut reports: Vec<(EngineIndex, Report)> = (0..)
            .map(EngineIndex)
            .zip(&self.ranks)
            .map(|(index, rank)| {
                let load = if rank.admitted { rank.load } else { Load::STEER_AWAY };
                (index, Report::stats(load, rank.stamp))
            })
            .collect();
        if self.lockstep() {
            // Its DP coordinator counts from 0. With our number its requests are not stale from the
            // start.
            if self.running {
                reports.push((EngineIndex(0), Report::start_wave(self.wave)));
            } else if let Some(last) = self.wave.0.checked_sub(1) {
                reports.push((EngineIndex(0), Report::wave_complete(Wave(last))));
            }
        }
        for (rank, report) in reports {
            self.push(Action::Tell { frontend: Some(frontend), rank, report });
        }
    }

    // --- waves ---

    fn report(&mut self, now: Time, index: EngineIndex, incarnation: Incarnation, report: &Report) {
        let Some(rank) = self.rank(index) else { return };
        if rank.stage == Stage::Down || rank.incarnation != Some(incarnation) {
            if rank.incarnation.is_none_or(|known| incarnation > known) {
                self.unknown_reports(report);
            }
            self.push(Action::Note(Note::Stale { rank: index, incarnation }));
            return;
        }
        let mut forward = false;
        if let Some((load, stamp)) = report.stats {
            #[cfg(any(test, feature = "test-support"))]
            self.publisher.stats(stamp, &self.ranks);
            if let Some(rank) = self.rank(index) {
                rank.load = load;
                rank.stamp = stamp;
                forward = rank.admitted;
            }
        }
        if self.lockstep() {
            if let Some(wave) = report.wave_complete {
                forward |= self.wave_complete(wave);
            } else if let Some(wave) = report.start_wave {
                forward |= self.start_wave(now, index, wave);
            }
        }
        if forward && !self.frontends.is_empty() {
            self.push(Action::Forward { rank: index });
        }
    }

    /// Rank 0: the group has finished this wave. True if that is news.
    fn wave_complete(&mut self, wave: Wave) -> bool {
        if wave < self.wave {
            return false;
        }
        self.running = false;
        self.in_step = true;
        self.waking = None;
        self.wave = Wave(wave.0.saturating_add(1));
        true
    }

    /// An engine runs in this wave. True if that is news.
    fn start_wave(&mut self, now: Time, from: EngineIndex, wave: Wave) -> bool {
        if wave > self.wave || (wave == self.wave && !self.running) {
            self.wave = wave;
            self.running = true;
            self.waking = None;
            self.push(Action::SendStartWave { wave, exclude: Some(Exclude::Index(from)) });
            return true;
        }
        if wave < self.wave && self.hosted() {
            // The engine is behind the group: the others would drop a START_DP_WAVE with its number.
            self.wake(now);
        }
        false
    }

    /// Something was sent to an engine: the others have to run with it.
    fn wake(&mut self, now: Time) {
        if self.running || !self.formed || !self.lockstep() {
            return;
        }
        match &mut self.waking {
            Some(waking) if waking.wave == self.wave && now.saturating_since(waking.sent) < WAKE_INTERVAL => {
                waking.again = true;
            }
            _ => self.send_wake(now),
        }
    }

    fn send_wake(&mut self, now: Time) {
        if self.formed {
            self.waking = Some(Waking { wave: self.wave, sent: now, again: false });
            self.send_start(None);
        }
    }

    fn send_start(&mut self, exclude: Option<Exclude>) {
        self.push(Action::SendStartWave { wave: self.wave, exclude });
        if mutated(Mutation::ForwardedWakeSetsRunning) {
            self.running = true;
            self.waking = None;
        }
    }

    fn wake_deadline(&self) -> Option<Time> {
        let waking = self.waking?;
        if waking.again {
            Some(waking.sent + WAKE_INTERVAL)
        } else if self.config.layout.two_phase_pause() && !mutated(Mutation::NoSecondStart) {
            Some(waking.sent + WAKE_RETRY)
        } else {
            // It would set paused engines in motion.
            None
        }
    }
}

fn loads(ranks: &[Rank]) -> Vec<Load> {
    ranks.iter().map(|rank| rank.load).collect()
}
