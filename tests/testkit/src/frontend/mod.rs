//! A fake vLLM frontend: the handshake server and DP coordinator of `vllm serve MODEL
//! --data-parallel-size N --data-parallel-size-local 0`, and its API servers.
//!
//! A test drives it step by step; only the DP coordinator has a thread of its own, as it has a
//! process of its own in vLLM. It is as strict as vLLM's Python code: what raises there is a
//! [`FrontendError`] here.

mod client;
mod coordinator;
mod handshake;
pub mod http;

use std::fmt;
use std::time::Duration;

use thiserror::Error;
use zmq::{Context, Socket, SocketType};

pub use client::{ApiServer, Completion, NewRequest};
pub use coordinator::{Coordinator, CoordinatorState};
pub use handshake::EngineSeen;

use crate::{Reporter, VllmVersion, free_port, sockets};

/// What ends a real frontend.
#[derive(Debug, Error)]
pub enum FrontendError {
    /// A message on the handshake socket from nobody it expects.
    #[error("message from engine with unexpected data parallel rank: identity {0}")]
    UnknownIdentity(String),
    /// HELLO or READY at the wrong time, or with flags that do not fit.
    #[error("rank {rank}: unexpected {what}")]
    Unexpected {
        /// Which engine.
        rank: u16,
        /// What came.
        what: String,
    },
    /// The engine's parallel flags differ from the frontend's.
    #[error("configuration mismatch for rank {rank}: worker hash {actual:?}, expected {expected}")]
    HashMismatch {
        /// Which engine.
        rank: u16,
        /// What READY said.
        actual: Option<String>,
        /// What this frontend computes.
        expected: String,
    },
    /// Bytes that vLLM cannot decode.
    #[error("{stage}: {reason}")]
    Malformed {
        /// Where they came in.
        stage: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// `KeyError` in `_process_utility_output`.
    #[error("API server {server}: answer to unknown call id {call}")]
    UnknownCall {
        /// Which API server.
        server: usize,
        /// The id.
        call: String,
    },
    /// `ENGINE_CORE_DEAD` came in.
    #[error("API server {server}: ENGINE_CORE_DEAD")]
    EngineDead {
        /// Which API server.
        server: usize,
    },
    /// Not in time.
    #[error("no {what} in {limit:?}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
    },
    /// A utility call failed.
    #[error("utility call {method} of rank {rank}: {reason}")]
    Call {
        /// What was called.
        method: String,
        /// Where.
        rank: u16,
        /// The engine's failure message.
        reason: String,
    },
    /// libzmq.
    #[error("zmq: {0}")]
    Zmq(#[from] zmq::Error),
}

/// Properties of a fake frontend.
#[derive(Clone, Debug)]
pub struct FrontendOptions {
    /// `--data-parallel-size`.
    pub size: u16,
    /// Handshake address to bind; port 0 is fine in a test.
    pub address: String,
    /// `--api-server-count`.
    pub api_servers: usize,
    /// A mixture-of-experts model.
    pub moe: bool,
    /// Which vLLM it plays.
    pub version: VllmVersion,
    /// What `ParallelConfig.compute_hash()` gives here.
    pub parallel_config_hash: String,
    /// What INIT names instead of the input sockets: a fault that vLLM does not have.
    pub named_inputs: Option<Vec<String>>,
}

impl Default for FrontendOptions {
    fn default() -> Self {
        Self {
            size: 2,
            address: "tcp://127.0.0.1:*".to_owned(),
            api_servers: 1,
            moe: false,
            version: VllmVersion::default(),
            parallel_config_hash: "fake-parallel-config".to_owned(),
            named_inputs: None,
        }
    }
}

impl FrontendOptions {
    /// Where its other sockets listen: the handshake's host, any port, as vLLM does for remote engines.
    pub(crate) fn any_port(&self) -> String {
        let (host, _) = self.address.rsplit_once(':').unwrap_or((&self.address, ""));
        format!("{host}:*")
    }
}

/// A fake frontend. Dropping it closes its sockets without a word, as SIGKILL does.
pub struct FakeFrontend {
    options: FrontendOptions,
    handshake: Option<Socket>,
    address: String,
    /// `_data_parallel_master_port_list`.
    group_ports: [u16; 4],
    states: Vec<handshake::State>,
    seen: Vec<EngineSeen>,
    /// Its DP coordinator (there is one for every DP size above 1).
    pub coordinator: Option<Coordinator>,
    /// Its API servers.
    pub servers: Vec<ApiServer>,
    reporter: Reporter,
}

impl fmt::Debug for FakeFrontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeFrontend").field("address", &self.address).finish_non_exhaustive()
    }
}

impl FakeFrontend {
    /// Binds everything, as a frontend of 0.17.1 and later does before any engine comes.
    pub fn bind(options: FrontendOptions, reporter: Reporter) -> Result<Self, FrontendError> {
        let context = Context::new();
        let (handshake, address) = sockets::bind(&context, SocketType::ROUTER, &options.address)?;
        let coordinator =
            if options.size > 1 { Some(Coordinator::start(&options, reporter.clone())?) } else { None };
        let stats = coordinator.as_ref().map(|coordinator| coordinator.addresses().front.clone());
        let servers = (0..options.api_servers.max(1))
            .map(|index| ApiServer::bind(&context, index, &options, stats.as_deref(), &reporter))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            states: vec![handshake::State::New; usize::from(options.size)],
            options,
            handshake: Some(handshake),
            address,
            // As in vLLM nobody holds them until the engines bind them.
            group_ports: [(); 4].map(|()| free_port()),
            seen: Vec::new(),
            coordinator,
            servers,
            reporter,
        })
    }

    /// Handshake address, `tcp://host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Handshake address, `host:port`.
    pub fn host_port(&self) -> &str {
        self.address.trim_start_matches("tcp://")
    }

    /// Its properties.
    pub fn options(&self) -> &FrontendOptions {
        &self.options
    }

    /// What it reported.
    pub fn reporter(&self) -> &Reporter {
        &self.reporter
    }

    /// Waits until all engines have said READY and registered at every API server. After a timeout
    /// it may be called again and goes on where it was.
    pub fn startup(&mut self, limit: Duration) -> Result<Vec<EngineSeen>, FrontendError> {
        let end = std::time::Instant::now() + limit;
        handshake::serve(self, end, limit)?;
        for server in &mut self.servers {
            server.await_registrations(end, limit)?;
        }
        // `launch_core_engines` closes the handshake socket when all are up.
        self.handshake = None;
        self.reporter.report("started", serde_json::json!({"engines": self.seen.len()}));
        Ok(self.seen.clone())
    }

    /// The first API server.
    pub fn server(&mut self) -> &mut ApiServer {
        &mut self.servers[0]
    }
}
