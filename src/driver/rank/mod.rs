//! The rank task: owns one [`VirtualEngine`](dp_sidecar_protocol::machine::virtual_engine), the
//! sockets of the engine behind it, and the routes to the frontends in front of it.
//!
//! One task does all of a rank's data path, so that a message crosses no queue of ours: it reads
//! every socket, feeds the machine, and writes without waiting. A frontend that does not read fills
//! its own queue only, and loses its route when that is full. The rank task itself never waits for a
//! peer: what may block (connecting, telling another task) happens beside its loop.

mod calls;
mod engine;
mod routes;
mod task;

use std::time::Duration;

use dp_sidecar_protocol::machine::virtual_engine::{self, Limits};
use dp_sidecar_protocol::{EngineIndex, Frames};
use futures::stream::{BoxStream, Stream, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use routes::say_dead;

use super::handles::{GroupKind, NodeEvent, RankHandle, RankSnapshot, queue};
use crate::tasks::{Task, named};
use crate::transport::{PrivateDir, Received};

/// By how much the numbers in a rank's snapshot may lag behind.
pub const SNAPSHOT_LAG: Duration = task::SNAPSHOT_INTERVAL;

/// What a rank task needs to know.
#[derive(Clone, Debug)]
pub struct RankConfig {
    /// Limits of the virtual engine, with its rank and number of slots.
    pub machine: virtual_engine::Config,
    /// A lockstep group must be woken for each request.
    pub kind: GroupKind,
    /// Where the engine's sockets are made.
    pub dir: PrivateDir,
    /// Ends the task: what is in flight is answered, and everything closed.
    pub stop: CancellationToken,
}

impl RankConfig {
    /// The defaults for a rank.
    pub fn new(
        rank: EngineIndex,
        frontend_slots: u32,
        limits: Limits,
        kind: GroupKind,
        dir: PrivateDir,
    ) -> Self {
        Self {
            machine: virtual_engine::Config::new(rank, frontend_slots, limits),
            kind,
            dir,
            stop: CancellationToken::new(),
        }
    }
}

/// Starts the task of a rank, which reports to `events`. It never waits for their reader.
pub fn spawn(config: RankConfig, tracker: &TaskTracker, events: mpsc::Sender<NodeEvent>) -> RankHandle {
    let rank = config.machine.rank;
    let (commands, inbox) = queue("rank");
    let (publish, snapshot) = watch::channel(RankSnapshot { rank, ..RankSnapshot::default() });
    tracker.spawn(named(Task::Rank, task::RankTask::new(config, events, publish).run(inbox)));
    RankHandle { rank, commands, snapshot }
}

/// At most so many messages are taken from one socket before the others get their turn.
const BATCH: usize = 64;

/// Something that came in on a socket.
enum Input {
    /// Outputs of the engine.
    Engine { generation: u64, slot: u32, batch: Vec<Frames> },
    /// The first message of the engine on an input socket.
    Registered { generation: u64, slot: u32, frames: Frames },
    /// A connection of the engine is over.
    EngineGone { generation: u64, reason: String },
    /// Messages of a frontend's API server.
    Frontend { epoch: u64, slot: u32, batch: Vec<Received> },
    /// A connection to an API server is over.
    RouteGone { epoch: u64, slot: u32, reason: String },
    /// An API server takes bytes again.
    Writable { epoch: u64, slot: u32 },
}

/// A source of inputs. The end of its engine or route drops its socket.
type Source = BoxStream<'static, Input>;

/// A source that ends when the engine or route that it belongs to is closed.
fn until(closed: &CancellationToken, inputs: impl Stream<Item = Input> + Send + 'static) -> Source {
    inputs.take_until(closed.clone().cancelled_owned()).boxed()
}

/// How long the last answers have to get out when the sidecar stops.
const LAST_FLUSH: Duration = Duration::from_millis(500);
