//! A fake engine core: `EngineCoreProc` and, for mixture-of-experts models, `DPEngineCoreProc` of
//! vLLM 0.19.1 to 0.33.0 (`v1/engine/core.py`), one thread per engine.

mod core;
mod group;
mod handshake;
mod lora;
mod memory;
mod options;
mod parameters;
mod scheduler;
mod utility;
pub mod weights;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;
use thiserror::Error;
use zmq::{Context, Socket, SocketType};

use crate::Reporter;
pub use options::{EngineOptions, Faults, Stage};
pub use utility::SHIM_PROTOCOL;

/// Why a fake engine ended.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EngineEnd {
    /// Told to.
    #[error("stopped")]
    Stopped,
    /// The handshake went wrong.
    #[error("handshake failed: {0}")]
    Handshake(String),
    /// A message that kills vLLM's input thread: the real engine would be deaf from here on.
    #[error("input thread died: {0}")]
    InputThread(String),
    /// A message that kills vLLM's output thread: the real engine would be mute from here on.
    #[error("output thread died: {0}")]
    OutputThread(String),
    /// A Python exception in the busy loop; ENGINE_CORE_DEAD was sent.
    #[error("engine core died: {0}")]
    Core(String),
    /// A fault was ordered.
    #[error("ordered fault: {0}")]
    Fault(String),
}

impl EngineEnd {
    /// Exit status of the `fake-engine` process.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Stopped => 0,
            Self::Handshake(_) => 70,
            Self::InputThread(_) => 71,
            Self::OutputThread(_) => 72,
            Self::Core(_) => 73,
            Self::Fault(_) => 74,
        }
    }
}

impl From<zmq::Error> for EngineEnd {
    fn from(error: zmq::Error) -> Self {
        Self::Core(format!("zmq: {error}"))
    }
}

/// What a test tells a running engine.
#[derive(Debug)]
pub(crate) enum Command {
    /// End without a word, now.
    Kill,
    /// As after SIGTERM: answer with aborts, end.
    Terminate,
    /// From now on these faults.
    Faults(Box<Faults>),
}

/// What an engine thread looks at besides its peers.
pub(crate) struct Orders {
    pub(crate) wake: Socket,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) stop: Arc<AtomicBool>,
}

/// A running fake engine. Dropping it kills it and waits for its thread.
pub struct FakeEngine {
    rank: u16,
    reporter: Reporter,
    wake: Mutex<Socket>,
    commands: mpsc::Sender<Command>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<EngineEnd>>,
}

impl fmt::Debug for FakeEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeEngine").field("rank", &self.rank).finish_non_exhaustive()
    }
}

impl FakeEngine {
    /// Starts an engine with a ZMQ context of its own.
    pub fn spawn(options: EngineOptions, reporter: Reporter) -> Result<Self, zmq::Error> {
        Self::spawn_in(&Context::new(), options, reporter)
    }

    /// Starts an engine in a shared context; libzmq allows 1023 sockets in one.
    pub fn spawn_in(
        context: &Context,
        options: EngineOptions,
        reporter: Reporter,
    ) -> Result<Self, zmq::Error> {
        static SERIAL: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let address = format!("inproc://fake-engine-{serial}");
        let inner = context.socket(SocketType::PAIR)?;
        inner.bind(&address)?;
        let wake = context.socket(SocketType::PAIR)?;
        wake.set_linger(0)?;
        wake.connect(&address)?;
        let (commands, receiver) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let orders = Orders { wake: inner, commands: receiver, stop: Arc::clone(&stop) };
        let rank = options.rank;
        let (context, log) = (context.clone(), reporter.clone());
        let thread = std::thread::Builder::new()
            .name(format!("fake-engine-{rank}"))
            .stack_size(512 * 1024)
            .spawn(move || {
                let end = run(&context, options, &log, orders);
                log.report("end", json!({"rank": rank, "reason": end.to_string(), "code": end.exit_code()}));
                end
            })
            .map_err(|_| zmq::Error::EMTHREAD)?;
        Ok(Self { rank, reporter, wake: Mutex::new(wake), commands, stop, thread: Some(thread) })
    }

    /// Its rank.
    pub fn rank(&self) -> u16 {
        self.rank
    }

    /// What it reported.
    pub fn reporter(&self) -> &Reporter {
        &self.reporter
    }

    /// Ends it without a word, as SIGKILL would, and waits.
    pub fn kill(&mut self) -> EngineEnd {
        self.stop.store(true, Ordering::Relaxed);
        self.order(Command::Kill);
        self.join()
    }

    /// Tells it to end in an orderly way (SIGTERM).
    pub fn terminate(&self) {
        self.order(Command::Terminate);
    }

    /// Replaces its faults.
    pub fn set_faults(&self, faults: Faults) {
        self.order(Command::Faults(Box::new(faults)));
    }

    /// Has it ended?
    pub fn ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for its end, at most `limit`.
    pub fn wait(&mut self, limit: Duration) -> Option<EngineEnd> {
        let end = Instant::now() + limit;
        while !self.ended() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let _ = zmq::poll(&mut [], 2);
        }
        Some(self.join())
    }

    fn order(&self, command: Command) {
        // An engine that has ended takes no orders.
        let _ = self.commands.send(command);
        let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = wake.send(&b""[..], zmq::DONTWAIT);
    }

    fn join(&mut self) -> EngineEnd {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(end)) => end,
            Some(Err(_)) => EngineEnd::Core("the fake itself panicked".to_owned()),
            None => EngineEnd::Stopped,
        }
    }
}

impl Drop for FakeEngine {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.kill();
        }
    }
}

/// Runs an engine to its end on the calling thread.
fn run(context: &Context, options: EngineOptions, reporter: &Reporter, orders: Orders) -> EngineEnd {
    match handshake::start(context, options, reporter, orders) {
        Ok(mut engine) => engine.run(),
        Err(end) => end,
    }
}
