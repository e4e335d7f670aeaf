//! The busy loop (`EngineCoreProc.run_busy_loop`, `DPEngineCoreProc.run_busy_loop`).

mod report;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rmpv::Value;
use serde_json::json;
use zmq::{PollEvents, Socket};

use super::group::{Group, GroupError, Operation};
use super::lora::Adapters;
use super::memory::Memory;
use super::options::{ControlFile, EngineOptions, Faults, Stage};
use super::parameters::Parameters;
use super::scheduler::{PauseState, Request, Scheduler};
use super::weights;
use super::{Command, EngineEnd, Orders};
use crate::{Reporter, VllmVersion, msg, sockets};

/// Steps between two synchronisations of a lockstep group (`dp_sync_interval` of 0.30.0).
const SYNC_INTERVAL: u64 = 16;

/// `FinishReason`.
pub(crate) const FINISH_LENGTH: u64 = 1;
pub(crate) const FINISH_ABORT: u64 = 2;
pub(crate) const FINISH_ERROR: u64 = 3;

pub(crate) struct Sockets {
    pub(crate) inputs: Vec<Socket>,
    pub(crate) outputs: Vec<Socket>,
    pub(crate) coordinator_input: Option<Socket>,
    pub(crate) coordinator_output: Option<Socket>,
}

/// State of a lockstep engine beyond that of an independent one.
pub(crate) struct Lockstep {
    pub(crate) group: Group,
    pub(crate) running: bool,
    pub(crate) wave: u64,
    pub(crate) step: u64,
    pub(crate) pending_pause: bool,
    pub(crate) ignore_start: bool,
}

/// A pause (or sleep) to be answered when the engine is idle.
pub(crate) struct PendingPause {
    pub(crate) client: usize,
    pub(crate) call: Value,
    /// Level of the sleep that follows; 0: none does.
    pub(crate) sleep: u64,
}

pub(crate) struct Engine {
    pub(crate) options: EngineOptions,
    pub(crate) faults: Faults,
    pub(crate) reporter: Reporter,
    pub(crate) scheduler: Scheduler,
    pub(crate) lockstep: Option<Lockstep>,
    pub(crate) pauses: Vec<PendingPause>,
    pub(crate) digest: String,
    digest_key: u64,
    /// None: the engine has made-up weights, and takes any.
    pub(crate) parameters: Option<Parameters>,
    pub(crate) weight_version: String,
    pub(crate) memory: Memory,
    /// Loads so far, for faults that hit only the first ones.
    pub(crate) loads: u32,
    /// LoRA adapters that the sidecar brought.
    pub(crate) adapters: Adapters,
    /// Where loads copy to.
    pub(crate) loader: weights::Loader,
    /// A load has torn the weights; a step would compute nonsense (vLLM: meta tensors, dies).
    pub(crate) torn: bool,
    /// `pause_generation` refuses new requests (0.33.0).
    pub(crate) refusing: bool,
    orders: Orders,
    control: ControlFile,
    sockets: Sockets,
    counts: (u64, u64),
    next_step: Instant,
    start: Instant,
}

impl Engine {
    pub(crate) fn new(
        options: EngineOptions,
        reporter: Reporter,
        orders: Orders,
        sockets: Sockets,
        group: Option<Group>,
    ) -> Result<Self, EngineEnd> {
        let served = match &options.model {
            Some(model) if model.is_dir() => {
                let served = weights::served(model);
                Some(served.map_err(|error| EngineEnd::Handshake(format!("model: {error}")))?)
            }
            _ => None,
        };
        let parameters = options.model.as_deref().zip(served.as_ref());
        let parameters = parameters.map(|(model, served)| Parameters::new(model, served));
        let digest = served.map_or_else(|| "made-up".to_owned(), |served| served.digest);
        let now = Instant::now();
        Ok(Self {
            faults: options.faults.clone(),
            scheduler: Scheduler::new(options.max_num_seqs),
            lockstep: group.map(|group| Lockstep {
                group,
                running: false,
                wave: 0,
                step: 0,
                pending_pause: false,
                ignore_start: false,
            }),
            pauses: Vec::new(),
            digest_key: weights::digest_key(&digest),
            digest,
            parameters,
            weight_version: "default".to_owned(),
            memory: Memory::default(),
            loads: 0,
            adapters: Adapters::default(),
            loader: weights::Loader::new(options.load_buffer),
            torn: false,
            refusing: false,
            control: ControlFile::new(options.control_file()),
            orders,
            sockets,
            counts: (0, 0),
            next_step: now,
            start: now,
            reporter,
            options,
        })
    }

    pub(crate) fn run(&mut self) -> EngineEnd {
        let end = self.busy_loop();
        match &end {
            EngineEnd::Core(_) => self.say_dead(),
            EngineEnd::Stopped if !self.orders.stop.load(Ordering::Relaxed) => {}
            _ => self.no_linger(),
        }
        end
    }

    fn busy_loop(&mut self) -> EngineEnd {
        if let Err(end) = self.ordered(Stage::AfterReady) {
            return end;
        }
        loop {
            if let Err(end) = self.turn() {
                return end;
            }
        }
    }

    fn turn(&mut self) -> Result<(), EngineEnd> {
        let was_running = self.lockstep.as_ref().is_some_and(|group| group.running);
        while !self.has_work() {
            self.finish_pauses()?;
            self.wait(None)?;
        }
        self.wait(Some(self.next_step))?;
        self.publish_counts()?;
        let executed = self.step()?;
        self.publish_counts()?;
        let unfinished = self.scheduler.has_unfinished();
        let Some(lockstep) = &mut self.lockstep else {
            return Ok(());
        };
        if !executed && !unfinished && !lockstep.running {
            return Ok(());
        }
        lockstep.step += 1;
        let synchronise = lockstep.step == 1 || lockstep.step.is_multiple_of(SYNC_INTERVAL);
        lockstep.running = if synchronise {
            let stop = &self.orders.stop;
            let values = [u32::from(unfinished), u32::from(lockstep.pending_pause)];
            let [unfinished, pausing] = lockstep
                .group
                .sum(Operation::Sync, values, &|| stop.load(Ordering::Relaxed))
                .map_err(group_end)?;
            let size = u32::from(self.options.size);
            if pausing == size {
                lockstep.ignore_start = true;
                lockstep.pending_pause = false;
            }
            unfinished > 0 || pausing % size != 0
        } else {
            true
        };
        if !lockstep.running {
            let wave = lockstep.wave;
            lockstep.wave += 1;
            lockstep.step = 0;
            if self.options.rank == 0 {
                self.send_coordinator(|fields| fields[6] = Value::from(wave))?;
            }
        } else if !was_running
            && self.options.rank == 0
            && !lockstep.pending_pause
            && self.options.version.reports_wave_start()
        {
            let wave = lockstep.wave;
            self.send_coordinator(|fields| fields[7] = Value::from(wave))?;
        }
        Ok(())
    }

    fn has_work(&self) -> bool {
        self.lockstep.as_ref().is_some_and(|group| group.running) || self.scheduler.has_unfinished()
    }

    /// Handles what comes in; until `until`, or without it until something came.
    fn wait(&mut self, until: Option<Instant>) -> Result<(), EngineEnd> {
        loop {
            let handled = self.drain()?;
            let left = match until {
                None if handled => return Ok(()),
                None => None,
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() || !self.has_work() {
                        return Ok(());
                    }
                    Some(left)
                }
            };
            let limit = match left {
                // Rounded up: a poll of 0 ms would spin.
                Some(left) => i64::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i64::MAX),
                None => -1,
            };
            let limit = match (limit, self.control.wanted()) {
                (-1, true) => 20,
                (limit, true) => limit.min(20),
                (limit, false) => limit,
            };
            let mut items = vec![self.orders.wake.as_poll_item(PollEvents::POLLIN)];
            if !self.faults.stop_reading {
                let inputs = self.sockets.inputs.iter();
                let all = inputs.chain(&self.sockets.coordinator_input);
                items.extend(all.map(|socket| socket.as_poll_item(PollEvents::POLLIN)));
            }
            match zmq::poll(&mut items, limit) {
                Ok(_) | Err(zmq::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Handles everything that is there. True if there was anything.
    fn drain(&mut self) -> Result<bool, EngineEnd> {
        self.obey()?;
        if self.faults.stop_reading {
            return Ok(false);
        }
        let mut handled = false;
        for at in 0..self.sockets.inputs.len() {
            while let Some(frames) = sockets::take(&self.sockets.inputs[at])? {
                handled = true;
                self.message(&frames)?;
            }
        }
        while let Some(socket) = &self.sockets.coordinator_input {
            let Some(frames) = sockets::take(socket)? else {
                break;
            };
            handled = true;
            if frames.len() == 1 && frames[0] == b"READY" {
                if !self.options.version.tolerates_second_ready() {
                    return Err(EngineEnd::InputThread("second READY".to_owned()));
                }
                continue;
            }
            self.message(&frames)?;
        }
        Ok(handled)
    }

    fn obey(&mut self) -> Result<(), EngineEnd> {
        while sockets::take(&self.orders.wake)?.is_some() {}
        while let Ok(command) = self.orders.commands.try_recv() {
            match command {
                Command::Kill => return Err(EngineEnd::Stopped),
                Command::Terminate => {
                    let left = self.scheduler.take_all();
                    self.finish(left, FINISH_ABORT)?;
                    return Err(EngineEnd::Stopped);
                }
                Command::Faults(faults) => self.faults = *faults,
            }
        }
        if let Some(text) = self.control.changed() {
            match Faults::for_rank(&text, self.options.rank) {
                Ok(faults) => self.faults = faults,
                Err(error) => self
                    .reporter
                    .report("bad_control_file", json!({"rank": self.options.rank, "error": error})),
            }
        }
        self.ordered(Stage::Now)
    }

    /// Ends here if a fault of this stage is ordered.
    fn ordered(&self, stage: Stage) -> Result<(), EngineEnd> {
        if self.faults.die == Some(stage) {
            return Err(EngineEnd::Fault(format!("die at {stage:?}")));
        }
        if self.faults.dead == Some(stage) {
            return Err(EngineEnd::Core(format!("ordered fault: dead at {stage:?}")));
        }
        Ok(())
    }

    /// One message of an input socket or of the DP coordinator.
    fn message(&mut self, frames: &[Vec<u8>]) -> Result<(), EngineEnd> {
        let dead = |text: String| EngineEnd::InputThread(text);
        let [kind] = frames[0][..] else {
            return Err(dead(format!("type frame {}", msg::hex(&frames[0]))));
        };
        if kind > 5 || (kind == 5 && !self.options.version.at_least(18, 0)) {
            return Err(dead(format!("unknown type byte {kind}")));
        }
        let payload = frames.get(1).ok_or_else(|| dead(format!("type byte {kind} without a payload")))?;
        let payload = msg::decode(payload).map_err(|error| dead(error.to_string()))?;
        match kind {
            0 => self.add(&payload),
            1 => {
                let ids = payload
                    .as_array()
                    .map(|ids| ids.iter().filter_map(|id| id.as_str().map(str::to_owned)).collect::<Vec<_>>())
                    .ok_or_else(|| EngineEnd::Core(format!("ABORT of {payload}")))?;
                let found = self.scheduler.abort(&ids);
                self.reporter
                    .report("abort", json!({"rank": self.options.rank, "ids": ids, "found": found.len()}));
                self.report_aborted(found)
            }
            2 => self.start_wave(&payload),
            3 => self.utility(&payload),
            4 => Err(EngineEnd::Core("Executor failed.".to_owned())),
            _ => Ok(()),
        }
    }

    fn add(&mut self, payload: &Value) -> Result<(), EngineEnd> {
        let bad = |text: String| EngineEnd::InputThread(format!("EngineCoreRequest: {text}"));
        let version = self.options.version;
        let at = version.request();
        let fields = payload.as_array().ok_or_else(|| bad(format!("{payload} is not an array")))?;
        // Everything up to data_parallel_rank has no default.
        let required = at.client_index - if version.at_least(21, 0) { 2 } else { 1 };
        if fields.len() < required {
            return Err(bad(format!("{} fields, {required} needed", fields.len())));
        }
        let id = fields[0].as_str().ok_or_else(|| bad(format!("request_id is {}", fields[0])))?.to_owned();
        let prompt: Vec<u64> = match &fields[1] {
            Value::Nil => Vec::new(),
            Value::Array(tokens) => tokens
                .iter()
                .map(|token| token.as_u64().ok_or_else(|| bad(format!("token {token}"))))
                .collect::<Result<_, _>>()?,
            other => return Err(bad(format!("prompt_token_ids is {other}"))),
        };
        if !fields[at.sampling_params].is_nil() && !fields[at.sampling_params].is_map() {
            return Err(bad("sampling_params is not a map".to_owned()));
        }
        let number = |at: usize, name: &str| match fields.get(at) {
            None => Ok(0),
            Some(value) => value.as_i64().ok_or_else(|| bad(format!("{name} is {value}"))),
        };
        if !fields[at.arrival_time].is_number() {
            return Err(bad(format!("arrival_time is {}", fields[at.arrival_time])));
        }
        number(at.priority, "priority")?;
        for flag in at.flags {
            if let Some(value) = fields.get(*flag).filter(|value| !value.is_bool()) {
                return Err(bad(format!("position {flag} is {value}, not a boolean")));
            }
        }
        let client = number(at.client_index, "client_index")?;
        let wave = u64::try_from(number(at.current_wave, "current_wave")?).unwrap_or_default();
        let client = self.client(client)?;
        let max_tokens = msg::get(&fields[at.sampling_params], "max_tokens")
            .and_then(Value::as_u64)
            .and_then(|tokens| u32::try_from(tokens).ok())
            .unwrap_or(self.options.tokens);
        self.reporter.report(
            "add",
            json!({"rank": self.options.rank, "id": id, "client_index": client, "wave": wave}),
        );
        let lora = fields.get(at.arrival_time + 1).and_then(Value::as_array).and_then(|lora| lora.first());
        let adapter = lora.and_then(Value::as_str).map(str::to_owned);
        let prompt = weights::prompt_key(&prompt);
        let request = Request { id, client, prompt, adapter, max_tokens, produced: 0 };
        if self.refusing {
            return self.finish(vec![request], FINISH_ERROR);
        }
        self.scheduler.waiting.push_back(request);
        let paused = self.scheduler.pause != PauseState::Unpaused;
        let starts = self.options.version.engines_start_waves();
        let Some(group) = &mut self.lockstep else {
            return Ok(());
        };
        let mut start = starts && !group.running && !paused;
        if wave > group.wave {
            group.wave = wave;
        } else if wave < group.wave && !group.running && !paused {
            start = true;
        }
        if start {
            group.running = true;
            let wave = group.wave;
            self.send_coordinator(|fields| fields[7] = Value::from(wave))?;
        }
        Ok(())
    }

    /// Checks a client index as vLLM's output thread does: by indexing with it.
    pub(crate) fn client(&self, index: i64) -> Result<usize, EngineEnd> {
        usize::try_from(index).ok().filter(|index| *index < self.sockets.outputs.len()).ok_or_else(|| {
            EngineEnd::OutputThread(format!("client_index {index} of {} outputs", self.sockets.outputs.len()))
        })
    }

    fn start_wave(&mut self, payload: &Value) -> Result<(), EngineEnd> {
        let rank = self.options.rank;
        self.reporter.report("start_dp_wave", json!({"rank": rank, "payload": msg::to_json(payload)}));
        let Some(group) = &mut self.lockstep else {
            // vLLM logs "Unrecognized input request type".
            self.reporter.report("unrecognized_start_dp_wave", json!({"rank": rank}));
            return Ok(());
        };
        if group.ignore_start {
            return Ok(());
        }
        let parts = payload.as_array().filter(|parts| parts.len() == 2);
        let Some((Some(wave), exclude)) = parts.map(|parts| (parts[0].as_u64(), &parts[1])) else {
            return Err(EngineEnd::Core(format!("START_DP_WAVE of {payload}")));
        };
        if exclude.as_u64() != Some(u64::from(rank)) && wave >= group.wave {
            group.wave = wave;
            group.running = true;
        }
        Ok(())
    }

    /// One forward pass. True if a request was computed.
    fn step(&mut self) -> Result<bool, EngineEnd> {
        let dummy = self.lockstep.is_some();
        let mut pace = self.options.step + self.faults.slow;
        self.scheduler.schedule();
        let stepping = self.scheduler.pause != PauseState::PausedAll;
        let mut by_client: BTreeMap<usize, (Vec<Value>, Vec<Value>)> = BTreeMap::new();
        let mut executed = false;
        let mut first_token = false;
        if stepping && !self.scheduler.running.is_empty() {
            self.touch("a step", &["weights", "kv_cache"])?;
            if self.torn {
                let text = "a step with torn weights (vLLM: NotImplementedError on meta tensors)";
                return Err(EngineEnd::Core(text.to_owned()));
            }
            executed = true;
            let (key, version, adapters) = (self.digest_key, self.options.version, &self.adapters);
            let per_step = self.options.tokens_per_step.max(1);
            self.scheduler.stepping().retain_mut(|request| {
                first_token |= request.produced == 0;
                let key = key ^ request.adapter.as_deref().map_or(0, |name| adapters.key(name));
                let count = per_step.min(request.max_tokens.saturating_sub(request.produced));
                let tokens = (request.produced..request.produced + count)
                    .map(|at| Value::from(weights::token(key, request.prompt, at)))
                    .collect();
                request.produced += count;
                let done = request.produced >= request.max_tokens;
                let (outputs, finished) = by_client.entry(request.client).or_default();
                outputs.push(output(version, &request.id, tokens, done.then_some(FINISH_LENGTH)));
                if done {
                    finished.push(Value::from(request.id.as_str()));
                }
                !done
            });
        }
        if !executed {
            if !dummy {
                return Ok(false);
            }
            // A dummy batch of zero duration would only burn the machine.
            pace = pace.max(Duration::from_millis(1));
        }
        self.next_step = Instant::now() + pace;
        // `include_finished_set` of the scheduler: only with a DP coordinator.
        let names_finished = self.sockets.coordinator_output.is_some();
        let mut stats = executed.then(|| self.stats(true));
        for (client, (outputs, finished)) in by_client {
            let stats = stats.take();
            let version = self.weight_version.clone();
            self.send_client(client, |fields| {
                fields[1] = Value::Array(outputs);
                fields[2] = stats.unwrap_or(Value::Nil);
                if names_finished && !finished.is_empty() {
                    fields[5] = Value::Array(finished);
                }
                if let Some(field) = fields.get_mut(8) {
                    *field = Value::from(version);
                }
            })?;
        }
        if executed && self.scheduler.running.is_empty() && self.scheduler.waiting.is_empty() {
            // vLLM sends the stats of a step without outputs to client 0.
            let stats = self.stats(true);
            self.send_client(0, |fields| fields[2] = stats)?;
        }
        if first_token {
            self.ordered(Stage::MidRequest)?;
        }
        Ok(executed)
    }

    /// New weights are in.
    pub(crate) fn set_digest(&mut self, digest: String) {
        self.digest_key = weights::digest_key(&digest);
        self.digest = digest;
    }

    /// Runs a collective operation of the group; blocks, as in vLLM.
    pub(crate) fn collective(&mut self, operation: Operation, unfinished: bool) -> Result<bool, EngineEnd> {
        let stop = &self.orders.stop;
        match &mut self.lockstep {
            None => Ok(unfinished),
            Some(lockstep) => lockstep
                .group
                .sum(operation, [u32::from(unfinished), 0], &|| stop.load(Ordering::Relaxed))
                .map(|[unfinished, _]| unfinished > 0)
                .map_err(group_end),
        }
    }

    /// Blocks without answering anything, until the test ends the engine or changes its faults.
    pub(crate) fn hang(&mut self) -> Result<(), EngineEnd> {
        while self.faults.load_hangs {
            self.obey()?;
            let mut items = [self.orders.wake.as_poll_item(PollEvents::POLLIN)];
            let limit = if self.control.wanted() { 20 } else { -1 };
            zmq::poll(&mut items, limit)?;
        }
        Ok(())
    }

    /// Blocks for a while, as a load does.
    pub(crate) fn block(&mut self, time: Duration) -> Result<(), EngineEnd> {
        let end = Instant::now() + time;
        loop {
            self.obey()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let mut items = [self.orders.wake.as_poll_item(PollEvents::POLLIN)];
            let limit = left.as_micros().div_ceil(1000);
            zmq::poll(&mut items, i64::try_from(limit).unwrap_or(i64::MAX))?;
        }
    }

    fn say_dead(&mut self) {
        for socket in &self.sockets.outputs {
            // The peer may be gone; nothing else can be told.
            let _ = socket.send(&b"ENGINE_CORE_DEAD"[..], 0);
        }
    }

    /// What is unsent stays unsent, as after SIGKILL.
    fn no_linger(&self) {
        let sockets = &self.sockets;
        for socket in sockets.outputs.iter().chain(&sockets.coordinator_output) {
            let _ = socket.set_linger(0);
        }
    }
}

fn group_end(error: GroupError) -> EngineEnd {
    match error {
        GroupError::Stopped => EngineEnd::Stopped,
        error => EngineEnd::Core(error.to_string()),
    }
}

/// One `EngineCoreOutput`.
fn output(version: VllmVersion, id: &str, tokens: Vec<Value>, finish: Option<u64>) -> Value {
    let mut fields = vec![Value::Nil; version.output_len()];
    for at in version.output_numbers() {
        fields[*at] = Value::from(0);
    }
    fields[0] = Value::from(id);
    fields[1] = Value::Array(tokens);
    fields[5] = finish.map_or(Value::Nil, Value::from);
    Value::Array(fields)
}
