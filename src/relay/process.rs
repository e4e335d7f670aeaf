//! `sidecar relay`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dp_sidecar_protocol::EngineIndex;
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::{IPC, Purpose, socket};
use crate::driver::edge;
use crate::driver::handles::{NodeState, RankHandle};
use crate::driver::rank::{self, RankConfig};
use crate::files;
use crate::link::LinkStream;
use crate::link::server::{self, ServeEnd, ServerOptions, Services};
use crate::net;
use crate::tasks::{Task, named};
use crate::transport::{self, PrivateDir, TransportError};

/// Accepted connections waiting for the server.
const STREAMS: usize = 4;
/// For a rank task to answer what is in flight and end.
const RANK_END: Duration = Duration::from_secs(5);
/// For the other tasks to end.
const TASKS_END: Duration = Duration::from_secs(2);

/// The relay process cannot run.
#[derive(Debug, Error)]
pub enum RelayError {
    /// The file system refused.
    #[error("relay process: {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    /// The directory of the engines' sockets cannot be used.
    #[error("relay process: {0}")]
    Sockets(#[from] TransportError),
    /// No runtime, or no signal handlers.
    #[error("relay process: {0}")]
    Runtime(io::Error),
}

/// Runs the relay process until SIGTERM, or until it is told to end over its link.
///
/// # Errors
/// Its sockets or its runtime cannot be made.
pub fn run(state_dir: &Path, purpose: &Purpose) -> Result<(), RelayError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("relay").build();
    let runtime = runtime.map_err(RelayError::Runtime)?;
    let result = runtime.block_on(serve(state_dir, purpose));
    runtime.shutdown_timeout(TASKS_END);
    result
}

async fn serve(state_dir: &Path, purpose: &Purpose) -> Result<(), RelayError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(RelayError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RelayError::Runtime)?;
    let path = socket(state_dir);
    let listener = net::bind(&path).and_then(UnixListener::from_std);
    let listener = listener.map_err(|source| RelayError::Io { path, source })?;
    // Sockets of an earlier relay process have no owner: the keeper runs one at a time.
    let ipc = state_dir.join(IPC);
    files::absent_is_fine(std::fs::remove_dir_all(&ipc))
        .map_err(|source| RelayError::Io { path: ipc.clone(), source })?;
    let dir = PrivateDir::create(ipc)?;
    let tracker = TaskTracker::new();
    let (events, reported) = mpsc::channel(server::EVENTS);
    let (ranks_end, rank_tasks) = (CancellationToken::new(), TaskTracker::new());
    let Purpose { ranks, frontend_slots, kind, limits } = purpose.clone();
    let ranks: Vec<RankHandle> = ranks
        .map(|r| {
            let rank_config = RankConfig {
                stop: ranks_end.clone(),
                ..RankConfig::new(EngineIndex(r), frontend_slots, limits, kind, dir.clone())
            };
            rank::spawn(rank_config, &rank_tasks, events.clone())
        })
        .collect();
    let edge = edge::spawn(dir, events, &tracker);
    let stop = CancellationToken::new();
    let (streams_in, streams) = mpsc::channel(STREAMS);
    tracker.spawn(named(Task::RelayListener, accept(listener, streams_in, stop.clone())));
    let services =
        Services { ranks, edge: Some(edge.handle), edge_state: Some(edge.state), ..Services::default() };
    let options = ServerOptions {
        initial: NodeState { about: Some(purpose.to_string()), ..NodeState::default() },
        ..ServerOptions::new("the relay process", tracker.clone(), stop.clone())
    };
    info!(pid = std::process::id(), %purpose, "relay process listens");
    let server = server::serve(options, streams, services, reported);
    let mut server = tokio::spawn(named(Task::RelayServer, server));
    let why = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        end = &mut server => match end {
            Ok(ServeEnd::Shutdown) => "told to end",
            Ok(ServeEnd::Stopped) => "its server was stopped",
            Err(error) => {
                error!(%error, "the server of the relay link failed");
                "its server failed"
            }
        },
    };
    info!(why, "relay process ends");
    // What is in flight is answered while somebody may still listen.
    ranks_end.cancel();
    rank_tasks.close();
    if tokio::time::timeout(RANK_END, rank_tasks.wait()).await.is_err() {
        warn!(tasks = rank_tasks.len(), "rank tasks did not end in time");
    }
    stop.cancel();
    if !server.is_finished()
        && let Ok(Err(error)) = tokio::time::timeout(TASKS_END, server).await
    {
        error!(%error, "the server of the relay link failed");
    }
    tracker.close();
    if tokio::time::timeout(TASKS_END, tracker.wait()).await.is_err() {
        error!(tasks = tracker.len(), "tasks did not end in time");
    }
    transport::linger().await;
    if let Err(error) = std::fs::remove_file(socket(state_dir)) {
        warn!(%error, "relay socket");
    }
    Ok(())
}

async fn accept(listener: UnixListener, streams: mpsc::Sender<LinkStream>, stop: CancellationToken) {
    while let Some(stream) = stop.run_until_cancelled(net::accept_allowed(&listener)).await {
        let peer = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let peer = peer.map_or_else(|| "the sidecar".to_owned(), |pid| format!("the sidecar, pid {pid}"));
        if streams.send(LinkStream::new(stream, peer)).await.is_err() {
            return;
        }
    }
}
