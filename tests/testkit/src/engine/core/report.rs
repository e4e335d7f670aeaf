//! What the fake engine sends: outputs, answers, load.

use super::*;

impl Engine {
    /// The next step names aborted requests in `finished_requests`, without an output for them.
    pub(super) fn report_aborted(&mut self, requests: Vec<Request>) -> Result<(), EngineEnd> {
        if self.sockets.coordinator_output.is_none() {
            return Ok(());
        }
        let mut by_client: BTreeMap<usize, Vec<Value>> = BTreeMap::new();
        for request in requests {
            let ids = by_client.entry(request.client).or_default();
            ids.push(Value::from(request.id));
        }
        for (client, ids) in by_client {
            self.send_client(client, |fields| fields[5] = Value::Array(ids))?;
        }
        Ok(())
    }

    /// Ends requests with an empty output.
    pub(crate) fn finish(&mut self, requests: Vec<Request>, reason: u64) -> Result<(), EngineEnd> {
        let version = self.options.version;
        let mut by_client: BTreeMap<usize, Vec<String>> = BTreeMap::new();
        for request in requests {
            by_client.entry(request.client).or_default().push(request.id);
        }
        for (client, ids) in by_client {
            self.send_client(client, |fields| {
                fields[1] = ids.iter().map(|id| output(version, id, Vec::new(), Some(reason))).collect();
                fields[5] = ids.iter().map(|id| Value::from(id.as_str())).collect();
            })?;
        }
        Ok(())
    }

    /// Answers the pauses that waited for the engine to be idle.
    pub(super) fn finish_pauses(&mut self) -> Result<(), EngineEnd> {
        for pause in std::mem::take(&mut self.pauses) {
            if pause.sleep > 0 {
                self.fall_asleep(pause.sleep);
            }
            self.answer(pause.client, pause.call, Ok(Value::Nil))?;
        }
        Ok(())
    }

    /// Sends the result of a utility call: `[call_id, failure, [type info, data]]`.
    pub(crate) fn answer(
        &mut self,
        client: usize,
        call: Value,
        result: Result<Value, String>,
    ) -> Result<(), EngineEnd> {
        let output = match result {
            Ok(data) => vec![call, Value::Nil, Value::Array(vec![Value::Nil, data])],
            Err(text) => vec![call, Value::from(text), Value::Nil],
        };
        self.send_client(client, |fields| fields[4] = Value::Array(output))
    }

    pub(super) fn publish_counts(&mut self) -> Result<(), EngineEnd> {
        let reports = self.lockstep.is_some() || self.options.version.dense_reports_load();
        let counts = self.scheduler.counts();
        if !reports || counts == self.counts || self.sockets.coordinator_output.is_none() {
            return Ok(());
        }
        self.counts = counts;
        let stats = self.stats(false);
        self.send_coordinator(|fields| fields[2] = stats)
    }

    /// `SchedulerStats`, with the keys that every version has and some that come and go.
    pub(super) fn stats(&self, of_step: bool) -> Value {
        let (running, waiting) = self.scheduler.counts();
        let (step, wave) = match &self.lockstep {
            Some(group) if !of_step => (group.step, group.wave),
            _ => (0, 0),
        };
        let use_ = (running as f64 / 256.0).min(1.0);
        msg::map([
            ("num_running_reqs", Value::from(running)),
            ("num_waiting_reqs", Value::from(waiting)),
            ("num_skipped_waiting_reqs", Value::from(0)),
            ("num_kv_fetch_reqs_by_stage", Value::Map(Vec::new())),
            ("step_counter", Value::from(step)),
            ("current_wave", Value::from(wave)),
            ("kv_cache_usage", Value::from(use_)),
            ("encoder_cache_usage", Value::from(0.0)),
            (
                "prefix_cache_stats",
                msg::map([
                    ("reset", Value::from(false)),
                    ("requests", Value::from(0)),
                    ("queries", Value::from(0)),
                    ("hits", Value::from(0)),
                    // vLLM's Rust frontend insists on these.
                    ("preempted_requests", Value::from(0)),
                    ("preempted_queries", Value::from(0)),
                    ("preempted_hits", Value::from(0)),
                    ("hits_by_source", Value::Map(Vec::new())),
                ]),
            ),
            ("connector_prefix_cache_stats", Value::Nil),
            ("kv_cache_eviction_events", Value::Array(Vec::new())),
            ("spec_decoding_stats", Value::Nil),
            ("kv_connector_stats", Value::Nil),
            ("ec_connector_stats", Value::Nil),
            ("waiting_lora_adapters", Value::Map(Vec::new())),
            ("running_lora_adapters", Value::Map(Vec::new())),
            ("cudagraph_stats", Value::Nil),
            ("perf_stats", Value::Nil),
        ])
    }

    pub(super) fn outputs(&self) -> Vec<Value> {
        let mut fields = vec![Value::Nil; self.options.version.outputs_len()];
        fields[0] = Value::from(self.options.rank);
        fields[1] = Value::Array(Vec::new());
        fields[3] = Value::from(self.start.elapsed().as_secs_f64());
        fields
    }

    pub(crate) fn send_client(
        &mut self,
        client: usize,
        fill: impl FnOnce(&mut [Value]),
    ) -> Result<(), EngineEnd> {
        let mut fields = self.outputs();
        fill(&mut fields);
        // The high water mark is 0: this neither blocks nor fails for want of a reader.
        let mut frame = msg::encode(&Value::Array(fields));
        if self.faults.garbled_output {
            frame.truncate(frame.len() / 2);
        }
        self.sockets.outputs[client].send(frame, 0)?;
        Ok(())
    }

    pub(crate) fn send_coordinator(&mut self, fill: impl FnOnce(&mut [Value])) -> Result<(), EngineEnd> {
        let mut fields = self.outputs();
        fill(&mut fields);
        match &self.sockets.coordinator_output {
            Some(socket) => Ok(socket.send(msg::encode(&Value::Array(fields)), 0)?),
            None => {
                Err(EngineEnd::OutputThread("a message for the DP coordinator, and there is none".to_owned()))
            }
        }
    }
}
