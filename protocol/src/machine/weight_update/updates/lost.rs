//! Work that was lost: what becomes of whatever waits for it.

use super::super::Call;
use super::*;

impl Updates {
    pub(super) fn job_lost(&mut self, now: Time, action: Action, error: &str) {
        if mutated(Mutation::DropJobLost) {
            return;
        }
        let error = format!("its work was lost: {error}");
        match action {
            Action::Acquire { run, .. } => self.acquired(now, run, Err(error)),
            Action::Inspect { ticket, .. }
            | Action::Forget { ticket, .. }
            | Action::Restore { ticket, .. }
            | Action::TakeOver { ticket, .. } => self.failed(ticket, None, error),
            Action::Stage { run, nodes, .. } => {
                let node = nodes.first().copied().unwrap_or_default();
                self.reported(now, run, Answer::StageFailed { node, error });
            }
            Action::StageCommitted { run, node, .. } => {
                self.reported(now, run, Answer::StageFailed { node, error });
            }
            Action::SaveLedger { begun: Some(run), .. } => {
                self.reported(now, run, Answer::BegunWritten { result: Err(error) });
            }
            Action::CloseGates { run, .. } => self.reported(now, run, Answer::AdmissionFailed { error }),
            Action::WriteCommit { run, committed, attempt } => {
                if let Some(asked) = self.current(run) {
                    asked.commit_lost = true;
                }
                if attempt < ATTEMPTS {
                    let attempt = attempt + 1;
                    self.actions.push_back(Action::WriteCommit { run, committed, attempt });
                } else {
                    self.reported(now, run, Answer::CommitUnknown { error });
                }
            }
            Action::OpenGates { engines, attempt } if attempt < ATTEMPTS => {
                self.actions.push_back(Action::OpenGates { engines, attempt: attempt + 1 });
            }
            Action::OpenGates { engines, .. } => {
                let engines = engines.into_iter().collect();
                self.start_again(RunId::default(), engines, &format!("its gate may be closed: {error}"));
            }
            Action::Step { run, action: Step::Fence { rank, incarnation, why }, attempt } => {
                if attempt < ATTEMPTS {
                    let action = Step::Fence { rank, incarnation, why };
                    self.actions.push_back(Action::Step { run, action, attempt: attempt + 1 });
                }
            }
            // It may be in force, or yet to be: to send it again could hang a lockstep group.
            Action::Step { run, action: Step::Pause { call, .. } | Step::Resume { call }, .. } => {
                let Call { rank, incarnation, .. } = call;
                self.reported(now, run, Answer::CallLost { rank, incarnation, error });
            }
            Action::Step { run, action, .. } => {
                if let Some(event) = failure(action, error) {
                    self.reported(now, run, event);
                }
            }
            Action::Conclude { run, conclusion, attempt } if attempt < ATTEMPTS => {
                self.actions.push_back(Action::Conclude { run, conclusion, attempt: attempt + 1 });
            }
            Action::Conclude { run, conclusion, .. } => {
                let closed = conclusion.record.ranks.iter().filter(|(rank, state)| {
                    let gone = matches!(state.times.state, RankProgress::Fenced | RankProgress::Lost);
                    conclusion.gates.contains(rank) && !gone
                });
                let closed = closed.map(|(rank, state)| (*rank, state.incarnation)).collect();
                self.start_again(run, closed, &format!("its gate may be closed: {error}"));
                self.concluded(run);
            }
            // Done without waiting, or made up for by the next one.
            Action::Accept { .. }
            | Action::Join
            | Action::Repeat(_)
            | Action::Refuse { .. }
            | Action::Answer { .. }
            | Action::SaveLedger { begun: None, .. }
            | Action::Ended { .. } => {}
        }
    }

    /// Fences engines that cannot be left as they are, outside of the transaction.
    pub(super) fn start_again(&mut self, run: RunId, engines: Vec<(EngineIndex, Incarnation)>, why: &str) {
        for (rank, incarnation) in engines {
            if self.lives.get(&rank).is_none_or(|life| life.incarnation != incarnation) {
                continue;
            }
            self.lives.remove(&rank);
            let action = Step::Fence { rank, incarnation, why: why.to_owned() };
            self.actions.push_back(Action::Step { run, action, attempt: 1 });
        }
    }
}

/// The answer to a call that was not made, or may be made again.
pub(in super::super) fn failure(step: Step, error: String) -> Option<Answer> {
    Some(match step {
        Step::Pause { call, .. } => Answer::Paused { call, result: Err(error) },
        Step::Load { call, target, .. } => Answer::Loaded { call, target, result: Err(error) },
        Step::SetVersion { call, .. } => Answer::VersionSet { call, result: Err(error) },
        Step::ResetCaches { call, .. } => Answer::CachesReset { call, result: Err(error) },
        Step::Resume { call } => Answer::Resumed { call, result: Err(error) },
        _ => return None,
    })
}
