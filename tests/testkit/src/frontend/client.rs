//! One API server: `DPLBAsyncMPClient` of `v1/engine/core_client.py`, stepped by the test.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, Instant};

use rmpv::Value;
use serde_json::json;
use zmq::{Context, PollEvents, Socket, SocketType};

use super::{FrontendError, FrontendOptions};
use crate::{Reporter, VllmVersion, msg, sockets};

/// A request to send.
#[derive(Clone, Debug)]
pub struct NewRequest {
    /// Its id.
    pub id: String,
    /// `prompt_token_ids`.
    pub prompt: Vec<u64>,
    /// `sampling_params.max_tokens`.
    pub max_tokens: u32,
    /// Engine to use; `None` leaves it to the load balancing.
    pub rank: Option<u16>,
}

impl NewRequest {
    /// A request with a prompt of three tokens.
    pub fn new(id: impl Into<String>, max_tokens: u32) -> Self {
        Self { id: id.into(), prompt: vec![1, 2, 3], max_tokens, rank: None }
    }

    /// The same for one rank.
    #[must_use]
    pub fn to(mut self, rank: u16) -> Self {
        self.rank = Some(rank);
        self
    }
}

/// What became of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// Which engine it was sent to.
    pub rank: u16,
    /// Tokens so far.
    pub tokens: Vec<u32>,
    /// `FinishReason`, once it is finished: 0 stop, 1 length, 2 abort, 3 error.
    pub finish: Option<u64>,
    /// Weight versions its step outputs were stamped with.
    pub versions: BTreeSet<String>,
    /// Output messages that carried something of it.
    pub messages: u32,
}

/// A fake API server.
pub struct ApiServer {
    index: usize,
    version: VllmVersion,
    size: u16,
    input: Socket,
    input_address: String,
    output: Socket,
    output_address: String,
    stats: Option<Socket>,
    stats_address: Option<String>,
    /// `lb_engines`: waiting, running.
    counts: Vec<[u64; 2]>,
    inflight: Vec<u64>,
    next_start: usize,
    wave: u64,
    running: bool,
    next_call: u64,
    calls: BTreeMap<u64, (u16, String)>,
    results: BTreeMap<u64, Result<Value, String>>,
    requests: BTreeMap<String, Completion>,
    registrations: BTreeMap<u16, Value>,
    stats_messages: Vec<u64>,
    server_count: u64,
    reporter: Reporter,
}

impl fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiServer").field("index", &self.index).finish_non_exhaustive()
    }
}

impl ApiServer {
    pub(super) fn bind(
        context: &Context,
        index: usize,
        options: &FrontendOptions,
        stats_address: Option<&str>,
        reporter: &Reporter,
    ) -> Result<Self, FrontendError> {
        let any = &options.any_port();
        let (input, input_address) = sockets::bind(context, SocketType::ROUTER, any)?;
        let (output, output_address) = sockets::bind(context, SocketType::PULL, any)?;
        let stats = match stats_address {
            None => None,
            Some(address) => {
                let socket = sockets::connect(context, SocketType::XSUB, address, None)?;
                socket.send(&b"\x01"[..], 0)?;
                Some(socket)
            }
        };
        let size = usize::from(options.size);
        Ok(Self {
            index,
            version: options.version,
            size: options.size,
            input,
            input_address,
            output,
            output_address,
            stats,
            stats_address: stats_address.map(str::to_owned),
            counts: vec![[0, 0]; size],
            inflight: vec![0; size],
            next_start: size * index / options.api_servers.max(1),
            wave: 0,
            running: false,
            // Unique over frontends and restarts, as the halves of vLLM's UUIDs are.
            next_call: unique() | (index as u64) << 20,
            calls: BTreeMap::new(),
            results: BTreeMap::new(),
            requests: BTreeMap::new(),
            registrations: BTreeMap::new(),
            stats_messages: vec![0; size],
            server_count: options.api_servers.max(1) as u64,
            reporter: reporter.clone(),
        })
    }

    /// Address of its input ROUTER.
    pub fn input_address(&self) -> &str {
        &self.input_address
    }

    /// Address of its output PULL.
    pub fn output_address(&self) -> &str {
        &self.output_address
    }

    /// The registration frame of each engine, decoded (nil: empty frame).
    pub fn registrations(&self) -> &BTreeMap<u16, Value> {
        &self.registrations
    }

    /// What is known of a request.
    pub fn request(&self, id: &str) -> Option<&Completion> {
        self.requests.get(id)
    }

    /// All requests.
    pub fn requests(&self) -> &BTreeMap<String, Completion> {
        &self.requests
    }

    /// `[waiting, running]` by rank, as last published by the DP coordinator (plus what this client
    /// has added to it since).
    pub fn counts(&self) -> &[[u64; 2]] {
        &self.counts
    }

    /// Wave and running flag, as last published.
    pub fn wave(&self) -> (u64, bool) {
        (self.wave, self.running)
    }

    /// How many output messages of each rank carried scheduler stats.
    pub fn stats_messages(&self) -> &[u64] {
        &self.stats_messages
    }

    pub(super) fn await_registrations(&mut self, end: Instant, limit: Duration) -> Result<(), FrontendError> {
        while self.registrations.len() < usize::from(self.size) {
            let Some(frames) = sockets::take(&self.input)? else {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(FrontendError::Timeout {
                        what: format!(
                            "registration at API server {} from {} of {} engines",
                            self.index,
                            usize::from(self.size) - self.registrations.len(),
                            self.size
                        ),
                        limit,
                    });
                }
                poll(&[&self.input], left)?;
                continue;
            };
            let malformed = |reason: String| FrontendError::Malformed { stage: "registration", reason };
            let [identity, payload] = frames.as_slice() else {
                return Err(malformed(format!("{} frames", frames.len())));
            };
            let rank = <[u8; 2]>::try_from(identity.as_slice())
                .map(u16::from_le_bytes)
                .ok()
                // `identities.remove(identity)` raises KeyError.
                .filter(|rank| *rank < self.size && !self.registrations.contains_key(rank))
                .ok_or_else(|| FrontendError::UnknownIdentity(msg::hex(identity)))?;
            let response = if payload.is_empty() && !self.version.registers_with_a_map() {
                Value::Nil
            } else {
                msg::decode(payload).map_err(|error| malformed(error.to_string()))?
            };
            if self.version.registers_with_a_map() {
                self.check_response(rank, &response)?;
            }
            self.reporter.report(
                "registration",
                json!({"server": self.index, "rank": rank, "response": msg::to_json(&response)}),
            );
            self.registrations.insert(rank, response);
        }
        Ok(())
    }

    /// `_apply_ready_response`: required keys, and the address of the stats must be ours.
    fn check_response(&self, rank: u16, response: &Value) -> Result<(), FrontendError> {
        let mut required = vec!["max_model_len", "num_gpu_blocks"];
        if self.version.at_least(23, 0) {
            required.extend(["dtype", "block_size", "vllm_version"]);
        }
        if let Some(key) = required.iter().find(|key| msg::get(response, key).is_none_or(Value::is_nil)) {
            return Err(FrontendError::Malformed {
                stage: "registration",
                reason: format!("rank {rank}: no {key} in {response}"),
            });
        }
        let actual = msg::text(response, "dp_stats_address");
        if actual.is_some() && actual != self.stats_address {
            return Err(FrontendError::Malformed {
                stage: "registration",
                reason: format!(
                    "rank {rank}: dp_stats_address {actual:?}, this frontend's is {:?}",
                    self.stats_address
                ),
            });
        }
        Ok(())
    }

    /// Sends a request; returns the rank it went to.
    pub fn add(&mut self, request: &NewRequest) -> Result<u16, FrontendError> {
        self.read_stats()?;
        let rank = match request.rank {
            Some(rank) => rank,
            None => self.choose(),
        };
        let at = self.version.request();
        let mut fields = vec![Value::Nil; at.len];
        fields[0] = Value::from(request.id.as_str());
        fields[1] = request.prompt.iter().copied().map(Value::from).collect();
        fields[at.sampling_params] =
            msg::map([("temperature", Value::from(0.0)), ("max_tokens", Value::from(request.max_tokens))]);
        fields[at.arrival_time] = Value::from(0.0);
        fields[at.client_index] = Value::from(self.index as u64);
        fields[at.current_wave] = Value::from(self.wave);
        fields[at.priority] = Value::from(0);
        for flag in at.flags {
            fields[*flag] = Value::from(false);
        }
        self.inflight[usize::from(rank)] += 1;
        self.requests.insert(request.id.clone(), Completion { rank, ..Completion::default() });
        self.send_raw(rank, &[b"\x00", &msg::encode(&Value::Array(fields))])?;
        if !self.running && !self.version.engines_start_waves() {
            self.first_request(rank)?;
        }
        Ok(rank)
    }

    /// `DPLBAsyncMPClient.get_core_engine_for_request`, without the KV penalty.
    fn choose(&mut self) -> u16 {
        let size = usize::from(self.size);
        let score = |rank: usize| {
            let [waiting, running] = self.counts[rank];
            (self.server_count * self.inflight[rank]).max(waiting + running)
        };
        let rank = (0..size)
            .map(|at| (self.next_start + at) % size)
            .min_by_key(|rank| score(*rank))
            .unwrap_or_default();
        self.counts[rank][0] += self.server_count;
        self.next_start = (self.next_start + 1) % size;
        u16::try_from(rank).unwrap_or_default()
    }

    /// FIRST_REQ to the DP coordinator.
    pub fn first_request(&mut self, rank: u16) -> Result<(), FrontendError> {
        let Some(stats) = &self.stats else {
            return Ok(());
        };
        self.running = true;
        let target = Value::Binary(sockets::identity(rank).to_vec());
        let message = Value::Array(vec![target, Value::from(self.wave)]);
        stats.send(msg::encode(&message), 0)?;
        Ok(())
    }

    /// Aborts requests on the engines they went to.
    pub fn abort(&mut self, ids: &[&str]) -> Result<(), FrontendError> {
        let mut by_rank: BTreeMap<u16, Vec<Value>> = BTreeMap::new();
        for id in ids {
            if let Some(request) = self.requests.get(*id) {
                by_rank.entry(request.rank).or_default().push(Value::from(*id));
            }
        }
        for (rank, ids) in by_rank {
            self.send_raw(rank, &[b"\x01", &msg::encode(&Value::Array(ids))])?;
        }
        Ok(())
    }

    /// Sends frames to an engine as they are.
    pub fn send_raw(&self, rank: u16, frames: &[&[u8]]) -> Result<(), FrontendError> {
        let identity = sockets::identity(rank);
        let all = std::iter::once(&identity[..]).chain(frames.iter().copied());
        Ok(self.input.send_multipart(all, 0)?)
    }

    /// Sends a utility call; returns its id.
    pub fn start_call(&mut self, rank: u16, method: &str, args: Vec<Value>) -> Result<u64, FrontendError> {
        self.next_call += 1;
        let call = self.next_call;
        self.calls.insert(call, (rank, method.to_owned()));
        let message = Value::Array(vec![
            Value::from(self.index as u64),
            Value::from(call),
            Value::from(method),
            Value::Array(args),
        ]);
        self.send_raw(rank, &[b"\x03", &msg::encode(&message)])?;
        Ok(call)
    }

    /// The answer to a call, if it is there.
    pub fn result(&mut self, call: u64) -> Option<Result<Value, String>> {
        self.results.remove(&call)
    }

    /// Waits for the answer to a call.
    pub fn await_call(&mut self, call: u64, limit: Duration) -> Result<Value, FrontendError> {
        let (rank, method) = self.calls.get(&call).cloned().unwrap_or_default();
        let what = format!("answer of rank {rank} to {method}");
        self.until(&what, limit, |server| server.results.contains_key(&call))?;
        match self.results.remove(&call) {
            Some(Ok(value)) => Ok(value),
            Some(Err(reason)) => Err(FrontendError::Call { method, rank, reason }),
            None => Err(FrontendError::Timeout { what, limit }),
        }
    }

    /// Calls a method of one engine.
    pub fn call(
        &mut self,
        rank: u16,
        method: &str,
        args: Vec<Value>,
        limit: Duration,
    ) -> Result<Value, FrontendError> {
        let call = self.start_call(rank, method, args)?;
        self.await_call(call, limit)
    }

    /// Calls a method of all engines at once, as `call_utility_async` does.
    pub fn call_all(
        &mut self,
        method: &str,
        args: &[Value],
        limit: Duration,
    ) -> Result<Vec<Value>, FrontendError> {
        let calls = (0..self.size)
            .map(|rank| self.start_call(rank, method, args.to_vec()))
            .collect::<Result<Vec<_>, _>>()?;
        calls.into_iter().map(|call| self.await_call(call, limit)).collect()
    }

    /// Waits until a request is finished.
    pub fn await_request(&mut self, id: &str, limit: Duration) -> Result<Completion, FrontendError> {
        self.until(&format!("end of request {id}"), limit, |server| {
            server.requests.get(id).is_none_or(|request| request.finish.is_some())
        })?;
        Ok(self.requests.get(id).cloned().unwrap_or_default())
    }

    /// Sends a request and waits for its end.
    pub fn complete(&mut self, request: &NewRequest, limit: Duration) -> Result<Completion, FrontendError> {
        self.add(request)?;
        self.await_request(&request.id, limit)
    }

    /// Reads until a condition holds.
    pub fn until(
        &mut self,
        what: &str,
        limit: Duration,
        done: impl Fn(&Self) -> bool,
    ) -> Result<(), FrontendError> {
        let end = Instant::now() + limit;
        loop {
            self.pump()?;
            if done(self) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(FrontendError::Timeout {
                    what: format!("{what} at API server {}", self.index),
                    limit,
                });
            }
            let mut watched = vec![&self.output];
            watched.extend(&self.stats);
            poll(&watched, left)?;
        }
    }

    /// Reads for a while, whatever comes.
    pub fn pump_for(&mut self, time: Duration) -> Result<(), FrontendError> {
        let end = Instant::now() + time;
        loop {
            self.pump()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let mut watched = vec![&self.output];
            watched.extend(&self.stats);
            poll(&watched, left)?;
        }
    }

    /// Reads what is there; returns how many output messages.
    pub fn pump(&mut self) -> Result<usize, FrontendError> {
        self.read_stats()?;
        let mut count = 0;
        while let Some(frames) = sockets::take(&self.output)? {
            count += 1;
            self.outputs(&frames)?;
        }
        Ok(count)
    }

    fn outputs(&mut self, frames: &[Vec<u8>]) -> Result<(), FrontendError> {
        if let [only] = frames
            && only == b"ENGINE_CORE_DEAD"
        {
            self.reporter.report("engine_core_dead", json!({"server": self.index}));
            return Err(FrontendError::EngineDead { server: self.index });
        }
        let malformed = |reason: String| FrontendError::Malformed { stage: "EngineCoreOutputs", reason };
        let message = msg::decode(&frames[0]).map_err(|error| malformed(error.to_string()))?;
        let fields = message.as_array().ok_or_else(|| malformed(format!("{message} is not an array")))?;
        let field = |at: usize| fields.get(at).filter(|value| !value.is_nil());
        let rank = field(0)
            .and_then(Value::as_u64)
            .and_then(|rank| usize::try_from(rank).ok())
            .filter(|rank| *rank < usize::from(self.size))
            .ok_or_else(|| malformed(format!("engine_index {:?}", fields.first())))?;
        if let Some(stats) = field(2) {
            // vLLM's Rust frontend gives up on a report without them; in Python they have a default.
            if !msg::get(stats, "prefix_cache_stats").is_some_and(Value::is_map) {
                return Err(malformed(format!("SchedulerStats without prefix_cache_stats: {stats}")));
            }
            self.stats_messages[rank] += 1;
        }
        let version = field(8).and_then(Value::as_str);
        for output in field(1).and_then(Value::as_array).into_iter().flatten() {
            let parts = output
                .as_array()
                .filter(|parts| parts.len() >= 2)
                .ok_or_else(|| malformed(format!("EngineCoreOutput {output}")))?;
            let id = parts[0].as_str().ok_or_else(|| malformed(format!("request_id {}", parts[0])))?;
            let numbers = self.version.output_numbers();
            if let Some(at) = numbers.iter().find(|at| parts.get(**at).is_some_and(Value::is_nil)) {
                return Err(malformed(format!("EngineCoreOutput: nil at position {at}")));
            }
            let Some(request) = self.requests.get_mut(id) else {
                // vLLM's output processor ignores an output of an unknown request.
                self.reporter.report("unknown_request", json!({"server": self.index, "id": id}));
                continue;
            };
            let tokens =
                parts[1].as_array().ok_or_else(|| malformed(format!("new_token_ids {}", parts[1])))?;
            request.messages += 1;
            request.tokens.extend(
                tokens.iter().filter_map(|token| token.as_u64().and_then(|token| u32::try_from(token).ok())),
            );
            if let (Some(version), false) = (version, tokens.is_empty()) {
                request.versions.insert(version.to_owned());
            }
            if let Some(reason) = parts.get(5).and_then(Value::as_u64) {
                request.finish = Some(reason);
                self.reporter.report(
                    "finished",
                    json!({
                        "server": self.index,
                        "id": id,
                        "rank": rank,
                        "finish": reason,
                        "tokens": request.tokens.len(),
                        "versions": request.versions,
                    }),
                );
            }
        }
        for id in field(5).and_then(Value::as_array).into_iter().flatten() {
            if let Some(request) = id.as_str().and_then(|id| self.requests.get(id)) {
                let count = &mut self.inflight[usize::from(request.rank)];
                *count = count.saturating_sub(1);
            }
        }
        if let Some(utility) = field(4) {
            let parts = utility
                .as_array()
                .filter(|parts| parts.len() == 3)
                .ok_or_else(|| malformed(format!("UtilityOutput {utility}")))?;
            let call = parts[0].as_u64();
            let known = call.and_then(|call| self.calls.remove(&call).map(|known| (call, known)));
            let Some((call, _)) = known else {
                return Err(FrontendError::UnknownCall { server: self.index, call: parts[0].to_string() });
            };
            let result = match (parts[1].as_str(), parts[2].as_array()) {
                (Some(text), _) => Err(text.to_owned()),
                (None, Some(result)) if result.len() == 2 && result[0].is_nil() => Ok(result[1].clone()),
                _ => return Err(malformed(format!("UtilityResult {}", parts[2]))),
            };
            self.results.insert(call, result);
        }
        Ok(())
    }

    /// Drains what the DP coordinator published.
    fn read_stats(&mut self) -> Result<(), FrontendError> {
        let mut latest = Vec::new();
        if let Some(stats) = &self.stats {
            while let Some(frames) = sockets::take(stats)? {
                latest.push(frames);
            }
        }
        let malformed = |reason: String| FrontendError::Malformed { stage: "DP coordinator", reason };
        for frames in latest {
            let message = msg::decode(&frames[0]).map_err(|error| malformed(error.to_string()))?;
            let parts = message.as_array().filter(|parts| parts.len() == 3);
            let Some([counts, wave, running]) = parts.map(Vec::as_slice) else {
                return Err(malformed(message.to_string()));
            };
            self.wave = wave.as_u64().ok_or_else(|| malformed(format!("wave {wave}")))?;
            self.running = running.as_bool().ok_or_else(|| malformed(format!("running {running}")))?;
            let arity = if self.version.counts_carry_kv_use() { 3 } else { 2 };
            for (at, entry) in counts.as_array().into_iter().flatten().enumerate() {
                let entry = entry
                    .as_array()
                    .filter(|entry| entry.len() == arity)
                    .ok_or_else(|| malformed(format!("counts {entry}, {arity} elements needed")))?;
                let number = |at: usize| entry[at].as_u64().unwrap_or_default();
                if let Some(slot) = self.counts.get_mut(at) {
                    *slot = [number(0), number(1)];
                }
            }
        }
        Ok(())
    }
}

/// A number that no other client uses: time and process, 20 bits left free.
fn unique() -> u64 {
    let time =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    let time = u64::try_from(time & 0xffff_ffff_ffff_ffff).unwrap_or_default();
    (time ^ u64::from(std::process::id()).rotate_left(40)) & !0xff_ffff
}

fn poll(sockets: &[&Socket], limit: Duration) -> Result<(), zmq::Error> {
    let mut items: Vec<_> = sockets.iter().map(|socket| socket.as_poll_item(PollEvents::POLLIN)).collect();
    let limit = i64::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(i64::MAX);
    match zmq::poll(&mut items, limit) {
        Ok(_) | Err(zmq::Error::EINTR) => Ok(()),
        Err(error) => Err(error),
    }
}
