//! Handle of a rank task: the data path of one DP rank.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIndex, FrontendId, Incarnation, Slot};
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use super::{CallResult, EngineFacts, HandleError, Reply};

/// Address pairs of one engine incarnation: position = slot, see [`Slot`].
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct SlotAddresses {
    /// `ipc://` address of the input ROUTER of each slot.
    pub inputs: Vec<String>,
    /// `ipc://` address of the output PULL of each slot.
    pub outputs: Vec<String>,
}

/// What a rank needs to open the data path to one API server of a frontend.
#[derive(Debug)]
pub struct OpenRoute {
    /// The attachment that asks.
    pub frontend: FrontendId,
    /// Position of the API server within its frontend (its own client index there).
    pub api_server: u32,
    /// Where to connect the DEALER.
    pub input_address: String,
    /// Where to connect the PUSH.
    pub output_address: String,
    /// First message on the DEALER: the engine's ready response as this frontend must see it.
    pub registration: Bytes,
    /// Give up connecting after this long.
    pub connect_timeout: Duration,
    /// Told once when the route is lost after it was opened (peer gone, peer does not read).
    pub lost: mpsc::Sender<RouteLost>,
}

/// A route ended without being closed.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct RouteLost {
    /// Whose.
    pub frontend: FrontendId,
    /// On which rank.
    pub rank: EngineIndex,
    /// Which API server.
    pub api_server: u32,
    /// Why, for the log.
    pub reason: String,
}

/// Commands of a rank task.
#[derive(Debug)]
pub enum RankCommand {
    /// Bind fresh sockets for a new incarnation; those of the old one are dropped, and what was in
    /// flight there is answered.
    Prepare {
        /// The new incarnation. The one whose sockets are open already: they stay as they are.
        incarnation: Incarnation,
        /// Where it must connect.
        reply: Reply<SlotAddresses>,
    },
    /// The engine's handshake is complete: control calls may be sent.
    EngineReady {
        /// Which incarnation.
        incarnation: Incarnation,
        /// Field positions of its vLLM version, and what frontends are told about it: a link's serving side
        /// keeps it for a restarted sidecar.
        facts: Box<EngineFacts>,
    },
    /// Let the frontends' traffic through (what was held is sent).
    Admit {
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// The engine is gone: answer what is in flight, hold what comes.
    EngineDown {
        /// Which incarnation.
        incarnation: Incarnation,
        /// Why, for logs and failure messages.
        reason: String,
    },
    /// Open or close the gate for new requests of frontends. Closed: ADDs are held up to the bound.
    /// Answered when it is in force.
    Admission {
        /// Open?
        open: bool,
        /// Done.
        reply: Reply<()>,
    },
    /// Call a method of the engine core on the control slot.
    Call {
        /// Names the call. Asked for again under the same key, it is not made again.
        key: Uuid,
        /// vLLM's method name.
        method: String,
        /// Positional arguments.
        args: Vec<rmpv::Value>,
        /// Answer with a deadline error after this long.
        timeout: Duration,
        /// The result.
        reply: Reply<rmpv::Value>,
    },
    /// Open a route to a frontend's API server.
    OpenRoute {
        /// What to open.
        route: OpenRoute,
        /// The slot that was taken.
        reply: Reply<Slot>,
    },
    /// Report the loss of a route that is open already to somebody else from now on: a restarted sidecar has
    /// found it. Fails if there is no such route (any more).
    AdoptRoute {
        /// Whose.
        frontend: FrontendId,
        /// Which of its API servers.
        api_server: u32,
        /// Told once when the route is lost.
        lost: mpsc::Sender<RouteLost>,
        /// The slot it has.
        reply: Reply<Slot>,
    },
    /// Close all routes of a frontend; its requests in flight are aborted on the engine.
    CloseRoutes {
        /// Whose.
        frontend: FrontendId,
        /// Done (requests aborted; slots are freed later, when the engine has confirmed).
        reply: Reply<()>,
    },
    /// What to do with a held control call, see [`HeldCall`].
    Release {
        /// Ticket of the held call.
        ticket: u64,
        /// What to do.
        verdict: Verdict,
        /// Told when the engine has answered the forwarded call (its result also went to the
        /// frontend); at once for the other verdicts.
        reply: Reply<rmpv::Value>,
    },
    /// Stop: answer what is in flight, close everything, end.
    Shutdown {
        /// Done.
        reply: Reply<()>,
    },
}

/// A control call of a frontend (pause, resume, sleep, weight methods ...), held at one rank until
/// the control task has decided.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct HeldCall {
    /// At which rank.
    pub rank: EngineIndex,
    /// Names this call at that rank.
    pub ticket: u64,
    /// Who calls.
    pub frontend: FrontendId,
    /// Which of its API servers.
    pub api_server: u32,
    /// vLLM's method name.
    pub method: String,
    /// Positional arguments.
    pub args: Vec<rmpv::Value>,
}

/// Decision on a [`HeldCall`].
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum Verdict {
    /// Send it to the engine; the answer goes to the frontend.
    Forward,
    /// Answer it with this value, without asking the engine.
    Answer(rmpv::Value),
    /// Answer it with this failure message.
    Refuse(String),
}

/// What a rank task reports.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum RankEvent {
    /// The first registration frame of an incarnation came in on the control slot.
    Registered {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// The frame as it came: empty up to vLLM 0.19.1, else a msgpack map.
        frame: Bytes,
    },
    /// The engine is dead: it said ENGINE_CORE_DEAD, or its connection closed.
    Lost {
        /// Which rank.
        rank: EngineIndex,
        /// Which incarnation.
        incarnation: Incarnation,
        /// What was seen.
        reason: String,
    },
}

/// Plain data about a rank for status and metrics.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct RankSnapshot {
    /// The rank.
    pub rank: EngineIndex,
    /// Current incarnation.
    pub incarnation: Incarnation,
    /// Frontends' traffic is let through.
    pub admitted: bool,
    /// The gate for new requests is open.
    pub admission_open: bool,
    /// Requests in flight on the engine, by frontend.
    pub in_flight: BTreeMap<u64, u64>,
    /// Requests held in front of the engine.
    pub held: u64,
    /// Slots: occupied, being drained, all.
    pub slots: (u32, u32, u32),
    /// Messages of frontends refused since start.
    pub refused: u64,
    /// Weight version stamped on the last step output (vLLM 0.32.0 and later).
    pub weight_version: Option<String>,
}

/// Handle of a rank task.
#[derive(Clone, Debug)]
pub struct RankHandle {
    /// The rank.
    pub rank: EngineIndex,
    /// Commands.
    pub commands: mpsc::Sender<RankCommand>,
    /// Latest state.
    pub snapshot: watch::Receiver<RankSnapshot>,
}

impl RankHandle {
    /// Sends a command and waits for its answer, at most `limit`.
    pub async fn ask<T>(
        &self,
        what: &str,
        limit: Duration,
        command: impl FnOnce(Reply<T>) -> RankCommand,
    ) -> Result<T, HandleError> {
        ask(&self.commands, "rank", format!("{what} of rank {}", self.rank), limit, command).await
    }

    /// Sends a command that has no answer.
    pub async fn tell(&self, command: RankCommand) -> Result<(), HandleError> {
        self.commands.send(command).await.map_err(|_| HandleError::Gone { task: "rank" })
    }

    /// Calls a method of the engine core on the control slot.
    pub async fn call(&self, method: &str, args: Vec<rmpv::Value>, timeout: Duration) -> CallResult {
        let method = method.to_owned();
        let what = method.clone();
        self.ask(&what, timeout + Duration::from_secs(1), |reply| RankCommand::Call {
            key: Uuid::new_v4(),
            method,
            args,
            timeout,
            reply,
        })
        .await
    }
}

/// Sends a command with a reply channel and waits for the answer under a deadline.
pub async fn ask<C, T>(
    commands: &mpsc::Sender<C>,
    task: &'static str,
    what: String,
    limit: Duration,
    command: impl FnOnce(Reply<T>) -> C,
) -> Result<T, HandleError> {
    let (reply, answer) = oneshot::channel();
    let exchange = async {
        commands.send(command(reply)).await.map_err(|_| HandleError::Gone { task })?;
        answer.await.map_err(|_| HandleError::Gone { task })?
    };
    match tokio::time::timeout(limit, exchange).await {
        Ok(result) => result,
        Err(_) => Err(HandleError::Deadline { what, limit }),
    }
}
