//! Parts of the sidecar as processes of their own, for `scripts/bench`.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use dp_sidecar_protocol::{EngineIndex, Incarnation};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use crate::driver::coordinator::{CoordinatorConfig, EVENTS, spawn};
use crate::driver::edge;
use crate::driver::handles::{CoordinatorCommand, GroupKind, ask};
use crate::transport::{self, PrivateDir, XpubListener};

/// Binding and stopping take no longer.
const LIMIT: Duration = Duration::from_secs(10);

/// Runs the coordinator task for `engines` lockstep engines and directly connected frontends, until
/// SIGTERM or SIGINT. Writes one JSON line with its addresses: `front`, and per engine
/// `[coordinator_input, coordinator_output]`.
///
/// # Errors
/// A socket cannot be bound, or a task failed.
pub fn coordinator(listen_dir: PathBuf, engines: u16) -> Result<(), String> {
    // One thread: vLLM's has one, too, and the task is one task.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(run_coordinator(listen_dir, engines))
}

async fn run_coordinator(listen_dir: PathBuf, engines: u16) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| text(&e))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| text(&e))?;
    let dir = PrivateDir::create(listen_dir).map_err(|e| text(&e))?;
    let front = dir.ipc_address("front").map_err(|e| text(&e))?;
    let tracker = TaskTracker::new();
    let mut config = CoordinatorConfig::new(GroupKind::Lockstep, engines);
    config.machine.publish = true;
    let socket = XpubListener::bind(&front, LIMIT).await;
    config.front = Some(socket.map_err(|e| text(&e))?);
    let ranks: Vec<EngineIndex> = (0..engines).map(EngineIndex).collect();
    let (reports, events) = mpsc::channel(EVENTS);
    let edge = edge::spawn(dir, reports, &tracker);
    let handle = spawn(config, vec![(ranks.clone(), edge.handle)], events, &tracker);
    let mut addresses = Vec::new();
    for rank in ranks {
        let prepared = handle.prepare(rank, Incarnation(1), LIMIT).await;
        addresses.push(prepared.map_err(|e| text(&e))?);
    }
    let line = serde_json::json!({"front": front, "engines": addresses});
    {
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{line}").map_err(|e| text(&e))?;
        stdout.flush().map_err(|e| text(&e))?;
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let what = "shutdown".to_owned();
    let asked =
        ask(&handle.commands, "coordinator", what, LIMIT, |reply| CoordinatorCommand::Shutdown { reply });
    asked.await.map_err(|e| text(&e))?;
    tracker.close();
    if tokio::time::timeout(LIMIT, tracker.wait()).await.is_err() {
        return Err(format!("tasks did not end within {LIMIT:?}"));
    }
    transport::linger().await;
    Ok(())
}
