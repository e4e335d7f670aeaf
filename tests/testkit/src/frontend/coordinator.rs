//! `DPCoordinatorProc.process_input_socket` of `v1/engine/coordinator.py`.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rmpv::Value;
use serde_json::json;
use zmq::{Context, PollEvents, Socket, SocketType};

use super::{FrontendError, FrontendOptions};
use crate::{Reporter, VllmVersion, msg, sockets};

/// Where the coordinator listens.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// Frontends subscribe here.
    pub front: String,
    /// Engines subscribe here (named from the engine: input).
    pub back_input: String,
    /// Engines push here.
    pub back_output: String,
}

/// What it knows.
#[derive(Clone, Debug, Default)]
pub struct CoordinatorState {
    /// Subscriptions of engines seen.
    pub subscriptions: u32,
    /// READY was sent.
    pub ready: bool,
    /// Current wave.
    pub wave: u64,
    /// Whether the engines run, as they said.
    pub running: bool,
    /// `[waiting, running]` by rank.
    pub counts: Vec<[u64; 2]>,
    /// Stats messages by rank.
    pub stats_messages: Vec<u64>,
    /// Why it ended, if it did: what kills vLLM's process.
    pub died: Option<String>,
}

/// A running fake DP coordinator. Dropping it ends it.
pub struct Coordinator {
    addresses: Addresses,
    state: Arc<Mutex<CoordinatorState>>,
    stop: Arc<AtomicBool>,
    wake: Mutex<Socket>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Coordinator").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

impl Coordinator {
    /// Binds its sockets and starts.
    pub(super) fn start(options: &FrontendOptions, reporter: Reporter) -> Result<Self, FrontendError> {
        // A context of its own: it must not share the fate of the API servers' sockets.
        let context = Context::new();
        let any = &options.any_port();
        let (front, front_address) = sockets::bind(&context, SocketType::XPUB, any)?;
        let (publish_back, back_input) = sockets::bind(&context, SocketType::XPUB, any)?;
        let (output_back, back_output) = sockets::bind(&context, SocketType::PULL, any)?;
        let wake_inner = context.socket(SocketType::PAIR)?;
        wake_inner.bind("inproc://coordinator")?;
        let wake = context.socket(SocketType::PAIR)?;
        wake.connect("inproc://coordinator")?;
        wake.set_linger(0)?;
        let size = usize::from(options.size);
        let state = Arc::new(Mutex::new(CoordinatorState {
            counts: vec![[0, 0]; size],
            stats_messages: vec![0; size],
            ..CoordinatorState::default()
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let mut runner = Runner {
            front,
            publish_back,
            output_back,
            wake: wake_inner,
            stop: Arc::clone(&stop),
            state: Arc::clone(&state),
            reporter,
            version: options.version,
            waves: options.moe || !options.version.dense_is_independent(),
            kv_use: vec![0.0; size],
            stats_changed: false,
            last_stats: None,
            last_step_counts: None,
            last_publish: None,
        };
        let thread = std::thread::Builder::new()
            .name("fake-dp-coordinator".to_owned())
            .spawn(move || {
                if let Err(reason) = runner.run() {
                    runner.reporter.report("coordinator_died", json!({"reason": reason}));
                    runner.lock(|state| state.died = Some(reason));
                }
            })
            .map_err(|_| zmq::Error::EMTHREAD)?;
        Ok(Self {
            addresses: Addresses { front: front_address, back_input, back_output },
            state,
            stop,
            wake: Mutex::new(wake),
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// What it knows now.
    pub fn state(&self) -> CoordinatorState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = wake.send(&b""[..], zmq::DONTWAIT);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Runner {
    front: Socket,
    publish_back: Socket,
    output_back: Socket,
    wake: Socket,
    stop: Arc<AtomicBool>,
    state: Arc<Mutex<CoordinatorState>>,
    reporter: Reporter,
    version: VllmVersion,
    waves: bool,
    kv_use: Vec<f64>,
    stats_changed: bool,
    last_stats: Option<(u64, u64)>,
    last_step_counts: Option<Value>,
    last_publish: Option<Instant>,
}

impl Runner {
    fn lock<T>(&self, change: impl FnOnce(&mut CoordinatorState) -> T) -> T {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn run(&mut self) -> Result<(), String> {
        let text = |error: zmq::Error| error.to_string();
        let size = self.lock(|state| state.counts.len());
        for seen in 0..size {
            let message = loop {
                if self.stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                if let Some(frames) = sockets::take(&self.publish_back).map_err(text)? {
                    break frames;
                }
                self.poll_one(-1)?;
            };
            if message != [b"\x01".to_vec()] {
                return Err("unexpected message while waiting for engines to subscribe".to_owned());
            }
            self.reporter.report("subscription", json!({"seen": seen + 1}));
            self.lock(|state| state.subscriptions += 1);
        }
        self.publish_back.send(&b"READY"[..], 0).map_err(text)?;
        self.lock(|state| state.ready = true);
        self.reporter.report("coordinator_ready_sent", json!({}));
        while !self.stop.load(Ordering::Relaxed) {
            self.turn()?;
        }
        Ok(())
    }

    /// Waits for a subscription or the end, before READY.
    fn poll_one(&self, limit: i64) -> Result<(), String> {
        let mut items =
            [self.publish_back.as_poll_item(PollEvents::POLLIN), self.wake.as_poll_item(PollEvents::POLLIN)];
        match zmq::poll(&mut items, limit) {
            Ok(_) | Err(zmq::Error::EINTR) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn turn(&mut self) -> Result<(), String> {
        let text = |error: zmq::Error| error.to_string();
        let interval = Duration::from_millis(if self.stats_changed { 100 } else { 5000 });
        let elapsed = self.last_publish.map_or(interval, |at| at.elapsed());
        let quiet = if self.waves && self.last_step_counts.is_none() { 50 } else { 0 };
        let left = interval.saturating_sub(elapsed).as_millis();
        let limit = i64::try_from(left).unwrap_or(i64::MAX).max(quiet);
        let mut items = [
            self.front.as_poll_item(PollEvents::POLLIN),
            self.publish_back.as_poll_item(PollEvents::POLLIN),
            self.output_back.as_poll_item(PollEvents::POLLIN),
            self.wake.as_poll_item(PollEvents::POLLIN),
        ];
        match zmq::poll(&mut items, limit) {
            Ok(0) => return self.publish_counts(),
            Ok(_) | Err(zmq::Error::EINTR) => {}
            Err(error) => return Err(error.to_string()),
        }
        let readable = items.map(|item| item.is_readable());
        let mut changed = false;
        if readable[1]
            && let Some(frames) = sockets::take(&self.publish_back).map_err(text)?
        {
            match frames.first().map(Vec::as_slice) {
                Some(b"\x01") => {
                    self.lock(|state| state.subscriptions += 1);
                    if self.version.tolerates_second_ready() {
                        self.publish_back.send(&b"READY"[..], 0).map_err(text)?;
                    }
                }
                Some(b"\x00") => {}
                _ => self.reporter.report("unexpected_back_message", json!({})),
            }
        }
        if readable[0]
            && let Some(frames) = sockets::take(&self.front).map_err(text)?
        {
            let buffer = frames.first().map_or(&[][..], Vec::as_slice);
            if buffer != b"\x01" && buffer != b"\x00" {
                self.first_request(buffer)?;
            }
        }
        if readable[2]
            && let Some(frames) = sockets::take(&self.output_back).map_err(text)?
        {
            changed = self.outputs(&frames)?;
        }
        if changed {
            let (wave, running) = self.lock(|state| (state.wave, state.running));
            self.publish(Value::Nil, wave, running)?;
        }
        Ok(())
    }

    fn first_request(&mut self, buffer: &[u8]) -> Result<(), String> {
        let message = msg::decode(buffer).map_err(|error| format!("front: {error}"))?;
        let parts = message.as_array().filter(|parts| parts.len() == 2);
        let Some([target, wave]) = parts.map(Vec::as_slice) else {
            return Err(format!("front: {message}"));
        };
        self.reporter.report("first_req", json!({"message": msg::to_json(&message)}));
        if !self.waves || self.version.engines_start_waves() {
            return Ok(());
        }
        let wave = wave.as_u64().ok_or_else(|| format!("front: wave {wave}"))?;
        let (current, running) = self.lock(|state| (state.wave, state.running));
        if running {
            return Ok(());
        }
        let exclude = if wave < current { Value::Nil } else { target.clone() };
        self.send_start(current, exclude)
    }

    fn outputs(&mut self, frames: &[Vec<u8>]) -> Result<bool, String> {
        let message = msg::decode(&frames[0]).map_err(|error| format!("back: {error}"))?;
        let fields = message
            .as_array()
            .filter(|fields| frames.len() == 1 && fields.len() >= 2)
            .ok_or_else(|| format!("back: {message}"))?;
        let field = |at: usize| fields.get(at).filter(|value| !value.is_nil());
        let whole = |at: usize| field(at).and_then(Value::as_u64);
        if fields[1].as_array().is_some_and(|outputs| !outputs.is_empty()) || field(4).is_some() {
            return Err("assert not outputs.outputs".to_owned());
        }
        let rank = whole(0).ok_or("engine_index")?;
        let at = usize::try_from(rank).map_err(|error| error.to_string())?;
        if let Some(stats) = field(2) {
            let number = |key: &str| msg::get(stats, key).and_then(Value::as_u64).unwrap_or(0);
            let counts = [number("num_waiting_reqs"), number("num_running_reqs")];
            if self.waves {
                let at = (number("current_wave"), number("step_counter"));
                if self.last_stats.is_none_or(|last| at > last) {
                    if self.stats_changed {
                        self.last_step_counts = Some(self.counts());
                    }
                    self.last_stats = Some(at);
                }
            }
            let known = self.lock(|state| match state.counts.get_mut(at) {
                Some(slot) => {
                    *slot = counts;
                    state.stats_messages[at] += 1;
                    true
                }
                None => false,
            });
            if known {
                self.kv_use[at] = msg::get(stats, "kv_cache_usage").and_then(Value::as_f64).unwrap_or(0.0);
                self.stats_changed = true;
            }
            self.reporter.report("stats", json!({"rank": rank, "counts": counts}));
        }
        if !self.waves {
            return Ok(false);
        }
        if let Some(wave) = whole(6) {
            self.reporter.report("wave_complete", json!({"rank": rank, "wave": wave}));
            return Ok(self.lock(|state| {
                let news = state.wave <= wave;
                if news {
                    state.wave = wave + 1;
                    state.running = false;
                }
                news
            }));
        }
        if let Some(wave) = whole(7) {
            self.reporter.report("start_wave", json!({"rank": rank, "wave": wave}));
            let news = self.lock(|state| {
                let news = wave > state.wave || (wave == state.wave && !state.running);
                if news {
                    state.wave = wave;
                    state.running = true;
                }
                news
            });
            if news {
                self.send_start(wave, Value::from(rank))?;
            }
            return Ok(news);
        }
        Ok(false)
    }

    fn send_start(&self, wave: u64, exclude: Value) -> Result<(), String> {
        self.reporter.report("start_dp_wave_sent", json!({"wave": wave, "exclude": msg::to_json(&exclude)}));
        let payload = msg::encode(&Value::Array(vec![Value::from(wave), exclude]));
        self.publish_back.send_multipart([&b"\x02"[..], &payload], 0).map_err(|error| error.to_string())
    }

    fn counts(&self) -> Value {
        let three = self.version.counts_carry_kv_use();
        let counts = self.lock(|state| state.counts.clone());
        counts
            .iter()
            .zip(&self.kv_use)
            .map(|([waiting, running], kv_use)| {
                let mut entry = vec![Value::from(*waiting), Value::from(*running)];
                if three {
                    entry.push(Value::from(*kv_use));
                }
                Value::Array(entry)
            })
            .collect()
    }

    fn publish_counts(&mut self) -> Result<(), String> {
        let counts = match self.last_step_counts.take() {
            Some(counts) => counts,
            None => {
                self.stats_changed = false;
                self.counts()
            }
        };
        let (wave, running) = self.lock(|state| (state.wave, state.running));
        self.publish(counts, wave, running)?;
        self.last_publish = Some(Instant::now());
        Ok(())
    }

    fn publish(&self, counts: Value, wave: u64, running: bool) -> Result<(), String> {
        let message = Value::Array(vec![counts, Value::from(wave), Value::from(running)]);
        self.front.send(msg::encode(&message), 0).map_err(|error| error.to_string())
    }
}
