//! The DP coordinator alone: the coordinator task and the edge tasks of its nodes, without engines.
//! `scripts/bench coordinator` puts load on it.
//!
//! `bench-coordinator DIR ENGINES NODES` prints one JSON line with its addresses: `front`, and per engine
//! `[coordinator_input, coordinator_output]`. Ends with SIGTERM.
#![expect(clippy::print_stdout, reason = "standard output is its interface")]

use std::error::Error;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use dp_sidecar::driver::coordinator::{EVENTS, spawn};
use dp_sidecar::driver::edge;
use dp_sidecar::driver::handles::{CoordinatorCommand, CoordinatorHandle, EdgePrepare, GroupKind};
use dp_sidecar::transport::{Encoded, PrivateDir, XpubListener};
use dp_sidecar_protocol::layout::Layout;
use dp_sidecar_protocol::wave::{FrontendUpstream, Publication};
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

const USAGE: &str = "usage: bench-coordinator DIR ENGINES NODES";
const LIMIT: Duration = Duration::from_secs(10);

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().ok_or(USAGE)?;
    let engines = args.next().ok_or(USAGE)?.parse()?;
    let nodes = args.next().ok_or(USAGE)?.parse()?;
    // One thread: vLLM's has one, too, beside the one of libzmq.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(Path::new(&dir), engines, nodes))
}

async fn serve(dir: &Path, engines: u16, nodes: u16) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let tracker = TaskTracker::new();
    let (reports, events) = mpsc::channel(EVENTS);
    let ranks: Vec<EngineIndex> = (0..engines).map(EngineIndex).collect();
    let per_node = usize::from(engines.div_ceil(nodes.max(1)).max(1));
    let (mut edges, mut addresses) = (Vec::new(), Vec::new());
    for (node, ranks) in ranks.chunks(per_node).enumerate() {
        let sockets = PrivateDir::create(dir.join(node.to_string()))?;
        let edge = edge::spawn(sockets, reports.clone(), &tracker);
        for &rank in ranks {
            let prepare = EdgePrepare { rank, incarnation: Incarnation(1) };
            addresses.push(edge.handle.ask_within(LIMIT, prepare).await?);
        }
        edges.push((ranks.to_vec(), edge.handle));
    }
    let coordinator = spawn(GroupKind::Lockstep, engines, edges, events, &tracker);
    let front = PrivateDir::create(dir.join("front"))?.ipc_address("front")?;
    let socket = XpubListener::bind(&front, LIMIT).await?;
    println!("{}", serde_json::json!({ "front": front, "engines": addresses }));
    std::io::stdout().flush()?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        ended = frontend(socket, coordinator) => ended,
    }
}

/// What a frontend without a sidecar would see: it sends FIRST_REQ, which wakes the group as a request to an engine
/// does, and hears of waves and loads.
async fn frontend(mut socket: XpubListener, mut coordinator: CoordinatorHandle) -> Result<(), Failure> {
    let publisher = socket.publisher();
    let layout = Layout::newest();
    loop {
        tokio::select! {
            received = socket.recv() => {
                if let [frame] = received?.as_slice()
                    && let Ok(FrontendUpstream::FirstReq { target, .. }) = FrontendUpstream::decode(frame)
                {
                    let wake = CoordinatorCommand::Wake { rank: target };
                    coordinator.commands.send(wake).await?;
                }
            }
            changed = coordinator.snapshot.changed() => {
                changed?;
                let publication = {
                    let now = coordinator.snapshot.borrow_and_update();
                    let counts = now.loads.values().copied().collect();
                    Publication { counts: Some(counts), wave: now.wave, running: now.running }
                };
                publisher.send(&Encoded::from(vec![publication.encode(&layout)]))?;
            }
        }
    }
}
