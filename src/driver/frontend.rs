//! The supervised frontend (`--serve`): one `vllm serve` without engines, started through the keeper,
//! attached like any other frontend, and started again when it dies.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use dp_sidecar_protocol::machine::restart::Restart;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::handles::{AttachmentHandle, Origin};
use super::{Clock, init};
use crate::config::Config;
use crate::supervisor::client::KeeperClient;
use crate::supervisor::command::{FRONTEND, log_line};
use crate::supervisor::keeper::wire::{ExitStatus, KeeperEvent};

/// For the keeper to tell of an exit.
const EXIT_REPORT: Duration = Duration::from_secs(10);

/// Runs the supervised frontend until `stop`; then it is stopped, and awaited. `recorded` is the address of that of a
/// killed predecessor: if it still runs, it is the one.
///
/// # Errors
/// It died too often, or at its first start.
pub async fn run(
    config: Arc<Config>,
    recorded: Option<String>,
    keeper: KeeperClient,
    attachments: AttachmentHandle,
    mut events: mpsc::Receiver<KeeperEvent>,
    stop: CancellationToken,
) -> Result<(), String> {
    let clock = Clock::start();
    let mut policy = Restart::new(init::restart_policy(&config));
    let mut found = running(&config, &keeper, &attachments, &mut events, recorded).await?;
    let mut incarnation = match &found {
        Some(found) => found.incarnation - 1,
        None => keeper.inherited().last_incarnation(FRONTEND),
    };
    // One address for all its lives: it is what the attachment waits for.
    let address = found.as_ref().map_or_else(free_address, |found| Ok(found.address))?;
    let first = incarnation + 1;
    let wanted = attachments.add(address.to_string(), Origin::Supervised).await;
    wanted.map_err(|error| error.to_string())?;
    loop {
        incarnation += 1;
        let again = found.take().is_some();
        policy.started();
        let spawned = if again { Ok(()) } else { spawn(&config, &keeper, incarnation, address).await };
        let reason = match spawned {
            Ok(()) => match until_exit(&config, &keeper, &mut events, incarnation, &stop).await {
                Ended::Stopped => return Ok(()),
                Ended::KeeperReplaced => {
                    warn!("the frontend was stopped with its keeper; starting it again");
                    continue;
                }
                Ended::Exited(reason) => reason,
            },
            Err(reason) => reason,
        };
        if stop.is_cancelled() {
            return Ok(());
        }
        let attached = attachments
            .snapshot
            .borrow()
            .iter()
            .any(|f| f.address == address.to_string() && f.attachments > 0);
        if !attached && incarnation == first && !again {
            return Err(format!("frontend failed to start: {reason}"));
        }
        if attached {
            policy.ready(clock.now());
        }
        let until = policy.failed(clock.now(), &reason);
        let until = clock.at(until.map_err(|why| format!("frontend is not started again: {why}"))?);
        warn!(%reason, delay = ?until - Instant::now(), "frontend ended; starting it again");
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep_until(until) => {}
        }
    }
}

/// A frontend that was started by a predecessor and still runs.
struct Found {
    address: SocketAddr,
    incarnation: u64,
}

/// Looks for it. What cannot be gone on with is ended first.
async fn running(
    config: &Config,
    keeper: &KeeperClient,
    attachments: &AttachmentHandle,
    events: &mut mpsc::Receiver<KeeperEvent>,
    recorded: Option<String>,
) -> Result<Option<Found>, String> {
    let children = keeper.list().await.map_err(|error| error.to_string())?;
    let child = children.into_iter().find(|child| child.name == FRONTEND);
    let address = recorded.as_ref().and_then(|address| address.parse().ok());
    match (child, address) {
        (Some(child), Some(address)) if !child.stopping && child.incarnation > 0 => {
            info!(pid = child.pid, %address, "the previous sidecar's frontend is still running");
            return Ok(Some(Found { address, incarnation: child.incarnation }));
        }
        (Some(child), _) => {
            warn!(pid = child.pid, "stopping a frontend that the previous sidecar did not record");
            let grace = config.kill_grace;
            if let Err(error) = keeper.stop(FRONTEND, grace).await {
                debug!(%error, "stop of the frontend");
            }
            let gone = async {
                while let Some(event) = events.recv().await {
                    if matches!(&event, KeeperEvent::Exited(report) if report.name == FRONTEND) {
                        return;
                    }
                }
            };
            if tokio::time::timeout(grace + EXIT_REPORT, gone).await.is_err() {
                return Err(format!("the previous sidecar's frontend (pid {}) does not end", child.pid));
            }
        }
        (None, _) => {}
    }
    if let Some(address) = recorded
        && let Err(error) = attachments.remove(address).await
    {
        debug!(%error, "the frontend of the previous sidecar");
    }
    Ok(None)
}

async fn spawn(
    config: &Config,
    keeper: &KeeperClient,
    incarnation: u64,
    address: SocketAddr,
) -> Result<(), String> {
    let spec = config.frontend_spawn(incarnation, address).ok_or("no MODEL was given")?;
    info!(command = %log_line(&spec.argv), "starting frontend");
    keeper.spawn(spec).await.map(|_| ()).map_err(|error| error.to_string())
}

enum Ended {
    Stopped,
    KeeperReplaced,
    Exited(String),
}

async fn until_exit(
    config: &Config,
    keeper: &KeeperClient,
    events: &mut mpsc::Receiver<KeeperEvent>,
    incarnation: u64,
    stop: &CancellationToken,
) -> Ended {
    let mut asked = false;
    loop {
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Some(KeeperEvent::Exited(report)) if report.incarnation == incarnation => {
                    if asked {
                        return Ended::Stopped;
                    }
                    // With an unknown status its keeper is dead, and the successor says so.
                    if report.status != ExitStatus::Unknown {
                        return Ended::Exited(init::describe_exit(&report));
                    }
                }
                Some(KeeperEvent::Replaced { .. }) => return Ended::KeeperReplaced,
                Some(KeeperEvent::Failed { error }) => return Ended::Exited(error),
                Some(other) => debug!(?other, "keeper"),
                None => return Ended::Stopped,
            },
            () = stop.cancelled(), if !asked => {
                asked = true;
                let grace = config.shutdown_timeout + config.kill_grace;
                if let Err(error) = keeper.stop(FRONTEND, grace).await {
                    error!(%error, "the frontend could not be stopped");
                    return Ended::Stopped;
                }
            }
        }
    }
}

/// A loopback port for the frontend's handshake socket. vLLM binds it itself, so it cannot be kept
/// open until then; it is taken from outside the range that the kernel hands out to clients.
fn free_address() -> Result<SocketAddr, String> {
    let ports = init::free_ports()?;
    let port = ports
        .into_iter()
        .find(|&port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok())
        .ok_or("no free port for the frontend's handshake")?;
    Ok((Ipv4Addr::LOCALHOST, port).into())
}
