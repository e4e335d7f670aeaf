//! The engine's side of the simulated world: its lives, what it reads, computes and answers.

use super::*;

impl World {
    pub(super) fn advance_engine_life(&mut self) -> Result<(), String> {
        match self.life {
            Life::Down => {
                self.incarnation.0 += 1;
                self.engine = FakeEngine::default();
                self.life = Life::Prepared;
                self.event(Event::Prepared(self.incarnation))
            }
            Life::Prepared => {
                self.life = Life::Ready;
                let (incarnation, layout) = (self.incarnation, Box::new(self.layout));
                self.event(Event::Ready { incarnation, layout })
            }
            Life::Ready => {
                self.life = Life::Admitted;
                self.event(Event::Admitted(self.incarnation))
            }
            Life::Admitted => Ok(()),
        }
    }

    pub(super) fn crash(&mut self) -> Result<(), String> {
        if self.life == Life::Down {
            return Ok(());
        }
        let engine = std::mem::take(&mut self.engine);
        if self.chance(30) {
            // The socket still has what it sent.
            for (slot, queue) in engine.outbox {
                let incarnation = self.incarnation;
                let late = queue.into_iter().map(|frames| (incarnation, slot, frames));
                self.ghosts.extend(late);
            }
        }
        self.life = Life::Down;
        if self.chance(30) {
            let slot = Slot(self.rng.random_range(0..=SLOTS));
            let frames = vec![Bytes::from_static(ENGINE_CORE_DEAD)];
            let incarnation = self.incarnation;
            self.event(Event::FromEngine { incarnation, slot, frames })?;
        }
        if self.chance(80) {
            let incarnation = self.incarnation;
            let reason = "crash".to_owned();
            self.event(Event::Down { incarnation, reason })?;
        }
        Ok(())
    }

    pub(super) fn send(&mut self, slot: Slot, outputs: NewOutputs) {
        let outputs = NewOutputs { engine_index: EngineIndex(1), timestamp: 1.0, ..outputs };
        let frames = vec![outputs.encode(&self.layout)];
        self.engine.outbox.entry(slot).or_default().push_back(frames);
    }

    /// The engine takes one message from its queue.
    pub(super) fn engine_reads(&mut self) -> Result<(), String> {
        let Some((slot, frames)) = self.engine.inbox.pop_front() else {
            return Ok(());
        };
        let layout = self.layout;
        let message = check_frontend_message(&layout, &frames)
            .map_err(|refusal| format!("the engine would have died: {refusal}"))?;
        match message {
            FrontendMessage::Add(add) => {
                if add.client_index.0 != slot.0 {
                    return Err(format!("ADD on slot {slot} says {}", add.client_index));
                }
                let tokens = self.rng.random_range(1..4);
                let id = add.request_id.to_owned();
                if self.engine.running.insert(id, (slot, tokens)).is_some() {
                    return Err(format!("the engine died: {} twice", add.request_id));
                }
            }
            FrontendMessage::Abort(ids) => {
                for id in ids {
                    if let Some((slot, _)) = self.engine.running.remove(id) {
                        let finished = self.engine.finished.entry(slot).or_default();
                        finished.push(id.to_owned());
                    }
                }
            }
            FrontendMessage::Utility(call) => {
                if call.client_index.0 != slot.0 {
                    return Err(format!("UTILITY on slot {slot} says {}", call.client_index));
                }
                let call_id = call.call_id;
                if call.method.starts_with("pause") {
                    self.engine.deferred.push((slot, call_id));
                } else {
                    self.answer(slot, call_id);
                }
            }
        }
        Ok(())
    }

    pub(super) fn answer(&mut self, slot: Slot, call_id: CallId) {
        let result = Ok(rmpv::Value::Nil);
        let outputs =
            NewOutputs { utility_output: Some(UtilityOutput { call_id, result }), ..NewOutputs::default() };
        self.send(slot, outputs);
    }

    pub(super) fn engine_steps(&mut self) {
        let mut by_slot: BTreeMap<Slot, NewOutputs> = BTreeMap::new();
        let mut done = Vec::new();
        for (id, (slot, left)) in &mut self.engine.running {
            *left -= 1;
            let finish_reason = (*left == 0).then_some(FinishReason::Length);
            if finish_reason.is_some() {
                done.push((*slot, id.clone()));
            }
            by_slot.entry(*slot).or_default().outputs.push(NewOutput {
                request_id: id.clone(),
                new_token_ids: vec![1],
                finish_reason,
            });
        }
        for (slot, id) in done {
            self.engine.running.remove(&id);
            self.engine.finished.entry(slot).or_default().push(id);
        }
        for (slot, ids) in std::mem::take(&mut self.engine.finished) {
            by_slot.entry(slot).or_default().finished_requests = Some(ids);
        }
        let first = by_slot.keys().next().copied().unwrap_or(Slot::CONTROL);
        by_slot.entry(first).or_default().scheduler_stats = Some(vec![0x80]);
        for (slot, outputs) in by_slot {
            self.send(slot, outputs);
        }
        if !self.engine.deferred.is_empty() && self.chance(50) {
            for (slot, call_id) in std::mem::take(&mut self.engine.deferred) {
                self.answer(slot, call_id);
            }
        }
    }

    /// Delivers the next message of one output socket.
    pub(super) fn engine_delivers(&mut self) -> Result<(), String> {
        let slots: Vec<Slot> = self.engine.outbox.keys().copied().collect();
        if slots.is_empty() {
            return Ok(());
        }
        let slot = slots[self.rng.random_range(0..slots.len())];
        let Some(queue) = self.engine.outbox.get_mut(&slot) else {
            return Ok(());
        };
        let frames = queue.pop_front();
        if queue.is_empty() {
            self.engine.outbox.remove(&slot);
        }
        match frames {
            Some(frames) => {
                let incarnation = self.incarnation;
                self.event(Event::FromEngine { incarnation, slot, frames })
            }
            None => Ok(()),
        }
    }

    // === frontends ===
}
