//! The handshake task: owns the handshake machine and the sockets where engines say HELLO.

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::net::{Ipv4Addr, SocketAddr};
use std::task::Poll;
use std::time::Duration;

use dp_sidecar_protocol::machine::handshake::{Action, Config, Event, Handshake, PeerId, Via};
use dp_sidecar_protocol::{EngineIndex, Incarnation};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::Clock;
use super::handles::{
    Envelope, Expect, Forget, HandleError, HandshakeAsk, HandshakeEvent, HandshakeHandle, Listen, NodeEvent,
    queue,
};
use crate::log_limit::LogLimit;
use crate::tasks;
use crate::transport::{GuardEvent, GuardLimits, GuardedRouter, GuardedSender, TransportError};

/// Refusals of strangers that are reported within [`REPEAT_INTERVAL`].
const REFUSALS: usize = 32;
/// The same refusal is not repeated for so long.
const REPEAT_INTERVAL: Duration = Duration::from_secs(10);

/// Settings of the handshake task.
#[derive(Clone, Debug)]
pub struct HandshakeConfig {
    /// Ranks and deadlines.
    pub machine: Config,
    /// Where engines that somebody else starts say HELLO: `--data-parallel-address` and
    /// `--data-parallel-rpc-port`. None if the keeper starts all engines.
    pub shared: Option<SocketAddr>,
    /// What a connection may do.
    pub limits: GuardLimits,
}

/// The handshake address cannot be used.
#[derive(Debug, Error)]
pub enum HandshakeBindError {
    /// The port is taken.
    #[error(
        "port {port} of {host} is in use by another process: free it, or choose another with --data-parallel-rpc-port",
        port = address.port(), host = address.ip()
    )]
    InUse { address: SocketAddr },
    #[error(
        "cannot listen for engines on {address} (--data-parallel-address, --data-parallel-rpc-port): {source}"
    )]
    Other { address: SocketAddr, source: TransportError },
}

/// Binds the shared address and starts the task. What engines do is reported to `events`, for
/// the reader to log; the same refusal of a stranger once in ten seconds.
///
/// # Errors
/// [`HandshakeBindError`] if the shared address cannot be bound.
pub async fn spawn(
    config: HandshakeConfig,
    tracker: &TaskTracker,
    events: mpsc::Sender<NodeEvent>,
) -> Result<HandshakeHandle, HandshakeBindError> {
    let mut listeners = BTreeMap::new();
    if let Some(address) = config.shared {
        let router =
            GuardedRouter::bind(address, config.limits.clone()).await.map_err(|source| match source {
                TransportError::InUse { .. } => HandshakeBindError::InUse { address },
                source => HandshakeBindError::Other { address, source },
            })?;
        tracing::info!(listen.addr = %router.address(), "engines may say HELLO");
        listeners.insert(Via::Shared, router);
    }
    let (handle, inbox) = queue("handshake");
    let task = Task {
        machine: Handshake::new(config.machine),
        limits: config.limits,
        listeners,
        peers: BTreeMap::new(),
        outbox: VecDeque::new(),
        said: LogLimit::new(REPEAT_INTERVAL, REFUSALS),
        clock: Clock::start(),
    };
    tracker.spawn(tasks::named(tasks::Task::Handshake, task.run(inbox, events)));
    Ok(handle)
}

struct Task {
    machine: Handshake,
    limits: GuardLimits,
    listeners: BTreeMap<Via, GuardedRouter>,
    /// Connections that have sent something.
    peers: BTreeMap<PeerId, (Via, GuardedSender)>,
    /// Waits for the reader of the events: the machine is never kept waiting, because that reader
    /// may itself wait for an answer of this task.
    outbox: VecDeque<HandshakeEvent>,
    /// Refusals of strangers that were reported.
    said: LogLimit<String>,
    clock: Clock,
}

impl Task {
    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Envelope<HandshakeAsk>>,
        events: mpsc::Sender<NodeEvent>,
    ) {
        loop {
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => return self.close().await,
                },
                (via, event) = next(&mut self.listeners) => self.received(via, event),
                permit = events.reserve(), if !self.outbox.is_empty() => match permit {
                    Ok(permit) => {
                        if let Some(event) = self.outbox.pop_front() {
                            permit.send(NodeEvent::Handshake(event));
                        }
                    }
                    Err(_) => return self.close().await,
                },
                () = self.clock.reach(self.machine.poll_timeout()) => {
                    self.machine.handle_timeout(self.clock.now());
                }
            }
            self.perform();
        }
    }

    async fn command(&mut self, Envelope { ask, reply, .. }: Envelope<HandshakeAsk>) {
        match ask {
            HandshakeAsk::Expect(expect) => reply.send::<Expect>(self.expect(expect).await),
            HandshakeAsk::Forget(Forget { rank, incarnation }) => {
                self.machine.handle_event(self.clock.now(), Event::Forget { rank, incarnation });
                self.close_own(rank, |own| own == incarnation);
                reply.send::<Forget>(Ok(()));
            }
        }
    }

    async fn expect(&mut self, expect: Expect) -> Result<SocketAddr, HandleError> {
        let Expect { rank, incarnation, listen, init } = expect;
        self.close_own(rank, |_| true);
        let address = match listen {
            Listen::Shared => {
                self.listeners.get(&Via::Shared).map(GuardedRouter::address).ok_or_else(|| {
                    HandleError::failed(format!(
                        "rank {rank} should say HELLO at the shared address, but none was given"
                    ))
                })?
            }
            Listen::Own => {
                let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
                let router = GuardedRouter::bind(any, self.limits.clone()).await.map_err(|error| {
                    HandleError::failed(format!(
                        "no handshake port for rank {rank} (incarnation {incarnation}): {error}"
                    ))
                })?;
                let address = router.address();
                self.listeners.insert(Via::Own { rank, incarnation }, router);
                address
            }
        };
        let own = listen == Listen::Own;
        self.machine.handle_event(self.clock.now(), Event::Expect { rank, incarnation, own, init });
        Ok(address)
    }

    fn received(&mut self, via: Via, event: GuardEvent) {
        let event = match event {
            GuardEvent::Message { peer, identity, frames } => {
                let peer = PeerId(peer);
                if let Some(listener) = self.listeners.get(&via) {
                    self.peers.insert(peer, (via, listener.sender()));
                }
                Event::Message { via, peer, identity, frames }
            }
            GuardEvent::Closed { peer } => {
                self.peers.remove(&PeerId(peer));
                Event::Closed { peer: PeerId(peer) }
            }
        };
        self.machine.handle_event(self.clock.now(), event);
    }

    fn perform(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::SendInit { peer, init } => {
                    let sent =
                        self.peers.get(&peer).is_some_and(|(_, sender)| sender.send(peer.0, vec![init]));
                    if !sent {
                        // It is gone; the machine hears of that next.
                        tracing::debug!(peer = peer.0, "INIT could not be sent");
                    }
                }
                Action::Report(HandshakeEvent::Refused { rank: None, error })
                    if self.said.admit(error.clone()).is_none() =>
                {
                    tracing::debug!(error, "refused again");
                }
                Action::Report(report) => {
                    tracing::debug!(?report, "handshake");
                    if let HandshakeEvent::Ready { rank, incarnation, .. } = report {
                        self.close_own(rank, |own| own == incarnation);
                    }
                    self.outbox.push_back(report);
                }
                Action::Waiting { hello, ready } => {
                    if !hello.is_empty() {
                        tracing::info!("waiting for HELLO of ranks {}", list(&hello));
                    }
                    if !ready.is_empty() {
                        tracing::info!("waiting for READY of ranks {}", list(&ready));
                    }
                }
            }
        }
    }

    /// Closes the rank's own listeners that were made for such an incarnation.
    fn close_own(&mut self, rank: EngineIndex, closes: impl Fn(Incarnation) -> bool) {
        let stays = |via: &Via| match via {
            Via::Own { rank: owner, incarnation } => *owner != rank || !closes(*incarnation),
            Via::Shared => true,
        };
        self.listeners.retain(|via, _| stays(via));
        self.peers.retain(|_, (via, _)| stays(via));
    }

    async fn close(&mut self) {
        for (_, listener) in std::mem::take(&mut self.listeners) {
            listener.close().await;
        }
    }
}

/// The next event of any listener.
async fn next(listeners: &mut BTreeMap<Via, GuardedRouter>) -> (Via, GuardEvent) {
    poll_fn(|cx| {
        for (via, listener) in listeners.iter_mut() {
            if let Poll::Ready(Some(event)) = listener.poll_recv(cx) {
                return Poll::Ready((*via, event));
            }
        }
        Poll::Pending
    })
    .await
}

fn list(ranks: &[EngineIndex]) -> String {
    let names: Vec<String> = ranks.iter().take(16).map(ToString::to_string).collect();
    let more = if ranks.len() > 16 { ", .." } else { "" };
    format!("{}{more}", names.join(", "))
}
