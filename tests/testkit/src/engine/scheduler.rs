//! The part of vLLM's scheduler that a peer can observe.

use std::collections::VecDeque;

/// `v1/core/sched/interface.py`, `PauseState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PauseState {
    Unpaused,
    /// Running requests go on, new ones wait.
    PausedNew,
    /// Nothing steps.
    PausedAll,
}

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) id: String,
    pub(crate) client: usize,
    pub(crate) prompt: u64,
    /// `lora_name` of its LoRA request.
    pub(crate) adapter: Option<String>,
    pub(crate) max_tokens: u32,
    pub(crate) produced: u32,
}

#[derive(Debug)]
pub(crate) struct Scheduler {
    pub(crate) waiting: VecDeque<Request>,
    pub(crate) running: Vec<Request>,
    pub(crate) pause: PauseState,
    max_num_seqs: usize,
}

impl Scheduler {
    pub(crate) fn new(max_num_seqs: usize) -> Self {
        Self { waiting: VecDeque::new(), running: Vec::new(), pause: PauseState::Unpaused, max_num_seqs }
    }

    /// `get_request_counts`: running, waiting.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.running.len() as u64, self.waiting.len() as u64)
    }

    /// `has_unfinished_requests`: what is queued behind a pause does not count.
    pub(crate) fn has_unfinished(&self) -> bool {
        match self.pause {
            PauseState::PausedAll => false,
            PauseState::PausedNew => !self.running.is_empty(),
            PauseState::Unpaused => !self.running.is_empty() || !self.waiting.is_empty(),
        }
    }

    /// `has_requests`.
    pub(crate) fn has_requests(&self) -> bool {
        !self.running.is_empty() || !self.waiting.is_empty()
    }

    /// Moves what may run into the running set.
    pub(crate) fn schedule(&mut self) {
        while self.pause == PauseState::Unpaused && self.running.len() < self.max_num_seqs {
            let Some(request) = self.waiting.pop_front() else {
                break;
            };
            self.running.push(request);
        }
    }

    /// Requests that this step computes.
    pub(crate) fn stepping(&mut self) -> &mut Vec<Request> {
        &mut self.running
    }

    /// Takes out requests by id; unknown ids are ignored.
    pub(crate) fn abort(&mut self, ids: &[String]) -> Vec<Request> {
        let wanted = |request: &mut Request| ids.contains(&request.id);
        let mut found: Vec<Request> = self.running.extract_if(.., wanted).collect();
        let (aborted, waiting): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|request| ids.contains(&request.id));
        self.waiting = waiting;
        found.extend(aborted);
        found
    }

    /// Takes out everything (`finish_requests(None, FINISHED_ABORTED)`).
    pub(crate) fn take_all(&mut self) -> Vec<Request> {
        let mut all: Vec<Request> = self.running.drain(..).collect();
        all.extend(self.waiting.drain(..));
        all
    }
}
