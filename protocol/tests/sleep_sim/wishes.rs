//! What frontends and the operator want.

use super::*;

impl World {
    pub(super) fn frontend_calls(&mut self) {
        let frontend = self.rng.random_range(1..=2u32);
        let (method, args): (&str, Vec<Value>) = match self.rng.random_range(0..14) {
            0..=3 => {
                let mode = ["abort", "keep"][self.rng.random_range(0..2usize)];
                ("sleep", vec![Value::from(self.rng.random_range(0..=2)), Value::from(mode)])
            }
            4 | 5 => ("wake_up", vec![]),
            6 | 7 => ("wake_up", tags(&["weights"])),
            8 => ("wake_up", tags(&["kv_cache"])),
            9 => ("wake_up", tags(&["weights", "kv_cache"])),
            10 => ("resume_scheduler", vec![]),
            11 => ("pause_scheduler", vec![Value::from("keep"), Value::from(false)]),
            12 => ("wake_up", tags(&["scheduling"])),
            _ => ("collective_rpc", vec![Value::from("update_weights_from_ipc")]),
        };
        let call_id = CallId(i128::from(self.number()));
        for node in &mut self.nodes {
            let (method, args) = (method.to_owned(), args.clone());
            let frames = UtilityCall { client_index: ClientIndex(0), call_id, method, args }.encode();
            node.machine.handle_event(self.now, rank::Event::FromFrontend { slot: Slot(frontend), frames });
        }
    }

    pub(super) fn request(&mut self) {
        let id = self.number();
        let at = self.rng.random_range(0..self.nodes.len());
        let slot = Slot(self.rng.random_range(1..=2));
        let frames = NewRequest {
            request_id: format!("r{id}"),
            prompt_token_ids: vec![1],
            max_tokens: 1,
            client_index: ClientIndex(0),
            current_wave: Wave(0),
            arrival_time: 1.0,
        }
        .encode(&Layout::newest());
        self.nodes[at].machine.handle_event(self.now, rank::Event::FromFrontend { slot, frames });
    }

    pub(super) fn sidecar(&mut self, update: bool, method: &'static str, args: Vec<Value>) {
        if self.plan.is_some() || self.job.is_some() {
            return;
        }
        let owner = OwnerId(self.number());
        self.plan = Some((owner, update, method, args));
        let (name, patience) = (method.to_owned(), Duration::from_secs(1));
        self.control.handle_event(self.now, control::Event::Acquire { owner, name, patience });
    }

    pub(super) fn operator(&mut self) {
        let level = self.rng.random_range(1..=2);
        match self.rng.random_range(0..6) {
            0 => self.sidecar(false, "sleep", vec![Value::from(level)]),
            1 => self.sidecar(false, "wake_up", vec![]),
            2 => self.sidecar(false, "wake_up", tags(&["weights"])),
            3 => self.sidecar(false, "wake_up", tags(&["kv_cache"])),
            _ => self.sidecar(true, "collective_rpc", vec![Value::from("dp_sidecar_load")]),
        }
    }
}
