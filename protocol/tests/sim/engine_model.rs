//! A lockstep engine: the busy loop of `DPEngineCoreProc` (`vllm/v1/engine/core.py` 0.32.0), with
//! the rules of 0.28 and 0.33 where they differ. A forward pass and the all-reduce after it are one
//! barrier: both wait for every rank.

use std::collections::VecDeque;

use dp_sidecar_protocol::Wave;
use dp_sidecar_protocol::machine::coordinator::Report;

/// Steps between two all-reduces (vLLM: 32 up to 0.29, then `dp_sync_interval`, 16).
const SYNC_INTERVAL: u64 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    /// The DP coordinator sends START on FIRST_REQ; engines report a start only for a stale request.
    V28,
    /// Rank 0 also reports when the group begins to run.
    V32,
    /// No FIRST_REQ; an engine reports every request that finds it idle.
    V33,
}

pub(crate) type RequestId = u32;

#[derive(Clone, Debug)]
pub(crate) enum Input {
    Ready,
    StartWave { wave: u64, exclude: Option<u16> },
    Add { id: RequestId, steps: u32, wave: u64 },
    Abort { id: RequestId },
    Pause(PauseMode),
    Resume,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PauseMode {
    Abort,
    Wait,
    Keep,
}

#[derive(Clone, Debug)]
pub(crate) enum Output {
    Report(Report),
    Ended(RequestId),
    Paused,
    Resumed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    Open,
    /// `PAUSED_NEW`: what runs goes on.
    NoNew,
    /// `PAUSED_ALL`: frozen.
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Waits for READY.
    Starting,
    /// Blocks on its input queue.
    Idle,
    /// In the forward pass or the all-reduce after it, until all ranks are.
    Step,
    /// In the barrier of `resume_scheduler`, until all ranks are.
    Resume,
}

#[derive(Debug)]
pub(crate) struct Engine {
    index: u16,
    version: Version,
    inbox: VecDeque<Input>,
    pub(crate) phase: Phase,
    pub(crate) wave: u64,
    pub(crate) running: bool,
    was_running: bool,
    pub(crate) step_counter: u64,
    pub(crate) pending_pause: bool,
    ignore_start: bool,
    admission: Admission,
    waiting: Vec<(RequestId, u32)>,
    active: Vec<(RequestId, u32)>,
    executes: bool,
    /// A pause was asked for and is answered when the engine is idle.
    pause_answer_due: bool,
    /// The loop was left in the middle of reading its inputs.
    in_inputs: bool,
}

impl Engine {
    pub(crate) fn new(index: u16, version: Version) -> Self {
        Self {
            index,
            version,
            inbox: VecDeque::new(),
            phase: Phase::Starting,
            wave: 0,
            running: false,
            was_running: false,
            step_counter: 0,
            pending_pause: false,
            ignore_start: false,
            admission: Admission::Open,
            waiting: Vec::new(),
            active: Vec::new(),
            executes: false,
            pause_answer_due: false,
            in_inputs: false,
        }
    }

    /// `has_unfinished_requests` as the all-reduce sees it.
    pub(crate) fn unfinished(&self) -> bool {
        match self.admission {
            Admission::Open => !self.active.is_empty() || !self.waiting.is_empty(),
            Admission::NoNew => !self.active.is_empty(),
            Admission::Nothing => false,
        }
    }

    fn has_work(&self) -> bool {
        self.running || self.unfinished()
    }

    pub(crate) fn deliver(&mut self, input: Input, out: &mut Vec<Output>) {
        if self.phase == Phase::Starting {
            assert!(
                matches!(input, Input::Ready),
                "engine {} waits for READY and gets {input:?}",
                self.index
            );
            self.phase = Phase::Idle;
            return;
        }
        self.inbox.push_back(input);
        if self.phase == Phase::Idle {
            self.run(out);
        }
    }

    /// The busy loop until it blocks.
    fn run(&mut self, out: &mut Vec<Output>) {
        loop {
            if !std::mem::take(&mut self.in_inputs) {
                self.was_running = self.running;
            }
            while !self.has_work() {
                if std::mem::take(&mut self.pause_answer_due) {
                    out.push(Output::Paused);
                }
                let Some(input) = self.inbox.pop_front() else {
                    self.phase = Phase::Idle;
                    return;
                };
                if self.handle(input, out) {
                    return;
                }
            }
            while let Some(input) = self.inbox.pop_front() {
                if self.handle(input, out) {
                    return;
                }
            }
            if self.admission == Admission::Open {
                self.active.append(&mut self.waiting);
            }
            self.executes = self.admission != Admission::Nothing && !self.active.is_empty();
            if self.executes || self.unfinished() || self.running {
                self.phase = Phase::Step;
                return;
            }
        }
    }

    /// True if the engine now blocks in the barrier of resume.
    fn handle(&mut self, input: Input, out: &mut Vec<Output>) -> bool {
        match input {
            Input::Ready => panic!("engine {} got READY twice", self.index),
            Input::StartWave { wave, exclude } => {
                if !self.ignore_start && exclude != Some(self.index) && wave >= self.wave {
                    self.wave = wave;
                    self.running = true;
                }
            }
            Input::Add { id, steps, wave } => self.add(id, steps, wave, out),
            Input::Abort { id } => {
                self.waiting.retain(|(other, _)| *other != id);
                self.active.retain(|(other, _)| *other != id);
            }
            Input::Pause(mode) => {
                if mode == PauseMode::Abort {
                    let all = self.waiting.drain(..).chain(self.active.drain(..));
                    out.extend(all.map(|(id, _)| Output::Ended(id)));
                }
                self.admission = match mode {
                    PauseMode::Keep => Admission::Nothing,
                    PauseMode::Abort | PauseMode::Wait => Admission::NoNew,
                };
                self.pending_pause = true;
                self.running = true;
                self.pause_answer_due = true;
            }
            Input::Resume => {
                assert!(
                    !(self.pending_pause || self.running && self.ignore_start),
                    "engine {} resumed while its pause is in flight",
                    self.index
                );
                if self.running {
                    out.push(Output::Resumed);
                    return false;
                }
                self.admission = Admission::Open;
                self.ignore_start = false;
                self.phase = Phase::Resume;
                self.in_inputs = true;
                return true;
            }
        }
        false
    }

    fn add(&mut self, id: RequestId, steps: u32, wave: u64, out: &mut Vec<Output>) {
        self.waiting.push((id, steps));
        let idle = !self.running && self.admission == Admission::Open;
        let older = wave < self.wave;
        self.wave = self.wave.max(wave);
        if idle && (older || self.version >= Version::V33) {
            self.running = true;
            out.push(Output::Report(Report::start_wave(Wave(self.wave))));
        }
    }

    /// All ranks are in the barrier of resume.
    pub(crate) fn finish_resume(&mut self, any_unfinished: bool, out: &mut Vec<Output>) {
        if any_unfinished {
            self.running = true;
        }
        out.push(Output::Resumed);
        self.run(out);
    }

    /// All ranks have done the forward pass: first half, up to the all-reduce.
    pub(crate) fn finish_forward(&mut self, out: &mut Vec<Output>) {
        if self.executes {
            for (_, steps) in &mut self.active {
                *steps -= 1;
            }
            self.active.retain(|(id, steps)| {
                if *steps == 0 {
                    out.push(Output::Ended(*id));
                }
                *steps > 0
            });
        }
        self.step_counter += 1;
    }

    /// Whether this step ends with an all-reduce.
    pub(crate) fn syncs(&self) -> bool {
        let first = self.version >= Version::V32 && self.step_counter == 1;
        first || self.step_counter.is_multiple_of(SYNC_INTERVAL)
    }

    /// Second half: `verdict` is `(has_unfinished, pause_consensus)` of the all-reduce, or `None` if
    /// there was none.
    pub(crate) fn finish_step(&mut self, verdict: Option<(bool, bool)>, out: &mut Vec<Output>) {
        self.running = match verdict {
            None => true,
            Some((unfinished, consensus)) => {
                if consensus {
                    self.ignore_start = true;
                    self.pending_pause = false;
                }
                unfinished
            }
        };
        if !self.running {
            if self.index == 0 {
                out.push(Output::Report(Report::wave_complete(Wave(self.wave))));
            }
            self.wave += 1;
            self.step_counter = 0;
        } else if !self.was_running && self.index == 0 && !self.pending_pause && self.version >= Version::V32
        {
            out.push(Output::Report(Report::start_wave(Wave(self.wave))));
        }
        self.run(out);
    }
}
