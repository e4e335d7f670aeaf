//! Messages of the engine.

use bytes::Bytes;

use super::{Action, VirtualEngine, slot_of};
use crate::error::DecodeError;
use crate::frames::Frames;
use crate::ids::Slot;
use crate::output::{self, EngineOutput, OutputsView};
use crate::time::Time;

impl VirtualEngine {
    pub(super) fn on_engine_message(&mut self, now: Time, slot: Slot, frames: Frames) {
        let number = slot.0 as usize;
        if number >= self.slots.len() {
            return;
        }
        let view = match EngineOutput::parse(&frames) {
            Ok(EngineOutput::Outputs(view)) => view,
            Ok(EngineOutput::Dead) => return self.dead("it reported ENGINE_CORE_DEAD".to_owned()),
            Err(error) => return self.garbled(slot, &error),
        };
        self.engine_clock = view.timestamp.max(f64::MIN_POSITIVE);
        if let Some(call_id) = view.utility_call_id() {
            let pass_on = if number == 0 {
                match view.utility_output() {
                    Some(Ok(answer)) => self.control_answered(answer),
                    Some(Err(error)) => self.garbled(slot, &error),
                    None => {}
                }
                false
            } else if self.fence_answered(now, number, call_id) {
                false
            } else {
                self.call_answered(number, call_id, || view.utility_output()?.ok())
            };
            if pass_on {
                self.send_to_frontend(number, frames);
            }
            return;
        }
        if let Err(error) = self.note_finished(number, &view) {
            return self.garbled(slot, &error);
        }
        self.share_stats(now, number, &view, &frames);
        if number != 0 {
            self.send_to_frontend(number, frames);
        }
        self.free_if_settled(number);
        self.pump();
    }

    /// A message that cannot be read ends the engine's life. Nobody can know whose tokens were in it; dropped, a request
    /// would lack some, or never end; passed on, it would end the output task of the frontend
    /// (`process_outputs_socket`, `vllm/v1/engine/core_client.py` 0.32.0).
    fn garbled(&mut self, slot: Slot, error: &DecodeError) {
        self.dead(format!("it sent a message that cannot be read on slot {slot}: {error}"));
    }

    fn dead(&mut self, reason: String) {
        self.go_down(&reason);
        self.actions.push_back(Action::EngineDead { reason });
    }

    /// Forgets the requests that end with this message. All of it must be readable before anything is forgotten.
    fn note_finished(&mut self, number: usize, view: &OutputsView<'_>) -> Result<(), DecodeError> {
        let mut ended = Vec::new();
        for output in view.outputs() {
            let output = output?;
            if output.finished.is_some() {
                ended.push(output.request_id);
            }
        }
        let ids = view.finished_requests()?;
        for id in ended {
            if self.requests.get(id).is_some_and(|entry| entry.slot == number && !entry.resumable) {
                self.finished(number, id);
            }
        }
        for id in ids {
            let known = self.requests.get_mut(id);
            if known.is_some_and(|entry| entry.slot == number && entry.sent) {
                self.finished(number, id);
            }
        }
        Ok(())
    }

    pub(super) fn finished(&mut self, number: usize, id: &str) {
        if self.requests.remove(id).is_some() {
            let slot = &mut self.slots[number];
            slot.sent = slot.sent.saturating_sub(1);
        }
    }

    /// vLLM sends scheduler stats to one client only: to client 0 in a step without outputs, else to
    /// a client that has outputs. Each frontend has its own metrics, so the others get a copy, without what is counted
    /// since the last report: sums over all frontends add up.
    fn share_stats(&mut self, now: Time, from: usize, view: &OutputsView<'_>, frames: &[Bytes]) {
        let Some(stats) = view.scheduler_stats else {
            return;
        };
        let source = self.slots[from].owner().map(|owner| owner.frontend);
        let mut copy: Option<Bytes> = None;
        let idle = from == 0 && view.is_stats_only();
        let mut counted = !idle;
        for number in 1..self.slots.len() {
            let Some(owner) = self.slots[number].owner() else {
                continue;
            };
            if owner.api_server != 0 {
                continue;
            }
            let slot = &mut self.slots[number];
            if source == Some(owner.frontend) {
                slot.stats_at = Some(now);
                continue;
            }
            if !std::mem::replace(&mut counted, true) {
                slot.stats_at = Some(now);
                self.actions.push_back(Action::ToFrontend { slot: slot_of(number), frames: frames.to_vec() });
                continue;
            }
            let recent =
                slot.stats_at.is_some_and(|at| now.saturating_since(at) < self.config.stats_interval);
            if recent && !idle {
                continue;
            }
            slot.stats_at = Some(now);
            if copy.is_none() {
                let gauges = crate::stats::gauges(stats).ok();
                copy = gauges.map(|gauges| {
                    output::stats_message(&self.layout, self.config.rank, gauges, view.timestamp)
                });
            }
            let Some(copy) = &copy else { return };
            self.actions.push_back(Action::ToFrontend { slot: slot_of(number), frames: vec![copy.clone()] });
        }
    }
}
