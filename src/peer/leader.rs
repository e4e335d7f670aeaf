//! The leader's listener: lets nodes in, compares them, tells when all ranks have joined, and hands their
//! connections on, also those of nodes that come again later.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::auth::{self, Side};
use super::hello::{LeaderAnswer, NodeHello};
use super::registry::{Claim, Refusal, Registry, missing_text};
use super::stream::set_options;
use super::{frame, hello};
use crate::config::Nodes;
use crate::exit_code;
use crate::link::LinkStream;
use crate::link::client::Link;
use crate::log_limit::LogLimit;
use crate::net;
use crate::strangers::{Stranger, Strangers};
use crate::tasks::{Task, named};
use crate::token::Token;

/// Connections that have not proven who they are, at the same time: of all, and of one address. More are closed at once.
const STRANGERS: (usize, usize) = (128, 16);
/// How often a node that waits for others hears from the leader.
pub(super) const WORD_PERIOD: Duration = Duration::from_secs(2);
/// Limit for a node to take a frame.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// A refused address is logged again after this long.
const REPEAT: Duration = Duration::from_secs(60);
/// Pauses between questions for the own address: the first one, and the longest.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// Addresses whose refusals are remembered.
const REFUSALS: usize = 256;
/// After nodes were found to differ, others that are just starting are told why for so long.
const LATECOMERS: Duration = Duration::from_secs(3);

/// The leader cannot listen.
#[derive(Debug, Error)]
pub enum BindError {
    /// The resolver does not know the host of `--leader`, and has not learned it meanwhile.
    #[error("--leader {leader}: its address is not known within {limit:?}: {reason}")]
    Unknown { leader: String, reason: String, limit: Duration },
    /// The port is taken.
    #[error("--leader {leader}: port {port} of {ip} is in use", port = address.port(), ip = address.ip())]
    InUse { leader: String, address: SocketAddr },
    #[error(
        "--leader {leader}: this sidecar has rank 0, so it listens there, but {address} cannot be bound: {error}; \
         an address of this node is expected (or give --peer-address)"
    )]
    Other { leader: String, address: SocketAddr, error: io::Error },
}

/// The deployment did not come together.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GatherError {
    /// Nodes are configured differently; one text for each that differs.
    #[error("{}", .0.join("\n"))]
    Mismatch(Vec<String>),
    /// Ranks are missing, after the leader has waited at its address until the limit.
    #[error("no node with {missing} connected to the leader at {address} within {limit:?}")]
    Missing { missing: String, address: SocketAddr, limit: Duration },
}

/// A node of the deployment, as the leader sees it.
#[derive(Debug)]
pub struct RemoteNode {
    /// What it said about itself.
    pub hello: NodeHello,
    /// Its connections: the first is there at once, each later one replaces the one before.
    pub connections: mpsc::Receiver<Link>,
}

/// How far the gathering is.
#[derive(Clone, Debug)]
enum Stage {
    Gathering,
    Settled,
    /// Exit code and reason for all nodes.
    Over(u8, String),
}

#[derive(Debug)]
struct State {
    registry: Registry,
    /// Where a node's connections go, and come out until that end is taken.
    connections: BTreeMap<u16, (mpsc::Sender<Link>, Option<mpsc::Receiver<Link>>)>,
    mismatches: Vec<String>,
    refused: LogLimit<IpAddr>,
    own_address: Option<IpAddr>,
}

#[derive(Debug)]
struct Shared {
    token: Token,
    epoch: u64,
    local: SocketAddr,
    state: Mutex<State>,
    stage: watch::Sender<Stage>,
    /// The registry has changed.
    changed: watch::Sender<()>,
    connections: AtomicU64,
}

/// The listening leader. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Leader {
    shared: Arc<Shared>,
}

/// Resolves `host:port` to one address, IPv4 if there is one.
pub(super) async fn resolve(leader: &str) -> Result<SocketAddr, String> {
    const RESOLVE: Duration = Duration::from_secs(10);
    let found: Vec<SocketAddr> = match timeout(RESOLVE, lookup_host(leader)).await {
        Ok(found) => found.map_err(|error| error.to_string())?.collect(),
        Err(_) => return Err(format!("not resolved within {RESOLVE:?}")),
    };
    let v4 = found.iter().find(|address| address.is_ipv4());
    v4.or_else(|| found.first()).copied().ok_or_else(|| "it resolves to no address".to_owned())
}

/// The address that this node has as the leader. A name service may learn of a host or pod only after it has started:
/// it is asked again for `limit`.
async fn own_address(
    leader: &str,
    limit: Duration,
    resolve: impl AsyncFn(&str) -> Result<SocketAddr, String>,
) -> Result<SocketAddr, BindError> {
    let until = Instant::now() + limit;
    let mut pause = ASK_AGAIN.0;
    let mut told = String::new();
    loop {
        let reason = match resolve(leader).await {
            Ok(address) => return Ok(address),
            Err(reason) => reason,
        };
        if Instant::now() + pause >= until {
            return Err(BindError::Unknown { leader: leader.to_owned(), reason, limit });
        }
        if reason != told {
            info!(leader, reason, "the address of this node is not known yet");
            told = reason;
        }
        sleep(pause).await;
        pause = (pause * 2).min(ASK_AGAIN.1);
    }
}

impl Leader {
    /// Listens and begins to let nodes in. Its own address may take `limit` to become known.
    ///
    /// # Errors
    /// [`BindError`].
    pub async fn start(
        nodes: &Nodes,
        own: NodeHello,
        size: u16,
        limit: Duration,
        tracker: &TaskTracker,
        stop: CancellationToken,
    ) -> Result<Self, BindError> {
        let leader = nodes.leader.clone();
        let mut address = own_address(&leader, limit, resolve).await?;
        if let Some(ip) = nodes.address {
            address.set_ip(ip);
        }
        let listener = TcpListener::bind(address).await;
        let listener = listener.and_then(|listener| Ok((listener.local_addr()?, listener)));
        let (local, listener) = listener.map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse { leader, address },
            _ => BindError::Other { leader, address, error },
        })?;
        let own_address = nodes.address.or_else(|| Some(local.ip()).filter(|ip| !ip.is_unspecified()));
        let shared = Arc::new(Shared {
            token: nodes.token.clone(),
            epoch: own.epoch,
            local,
            state: Mutex::new(State {
                registry: Registry::new(own, size),
                connections: BTreeMap::new(),
                mismatches: Vec::new(),
                refused: LogLimit::new(REPEAT, REFUSALS),
                own_address,
            }),
            stage: watch::Sender::new(Stage::Gathering),
            changed: watch::Sender::new(()),
            connections: AtomicU64::new(1),
        });
        info!(listen.addr = %local, missing = %missing_text(&shared.state.lock().registry.missing()), "waiting for nodes");
        tracker.spawn(named(Task::PeerListener, accept(listener, shared.clone(), stop)));
        Ok(Self { shared })
    }

    /// Address of this node that other nodes reach: known when it was given, or when the first node has come.
    pub fn own_address(&self) -> Option<IpAddr> {
        self.shared.state.lock().own_address
    }

    /// Waits until all ranks have joined, and gives all other nodes, by first rank. To be called once, and
    /// followed by [`Leader::welcome`].
    ///
    /// # Errors
    /// [`GatherError`]; the nodes have been told.
    pub async fn gather(&self, limit: Duration) -> Result<Vec<RemoteNode>, GatherError> {
        let deadline = Instant::now() + limit;
        let mut changed = self.shared.changed.subscribe();
        let mut told = String::new();
        loop {
            let (missing, settled, mismatch) = {
                let state = self.shared.state.lock();
                (
                    missing_text(&state.registry.missing()),
                    state.registry.settled(),
                    !state.mismatches.is_empty(),
                )
            };
            if mismatch {
                // Others that start at the same time get the reason, and their own differences are told, too.
                sleep(LATECOMERS).await;
                let reports = self.shared.state.lock().mismatches.clone();
                return Err(GatherError::Mismatch(reports));
            }
            if settled {
                info!("all ranks have joined");
                return Ok(self.nodes());
            }
            if missing != told {
                info!(%missing, "waiting for nodes");
                told.clone_from(&missing);
            }
            tokio::select! {
                _ = changed.changed() => {}
                () = sleep_until(deadline) => {
                    let error = GatherError::Missing { missing, address: self.shared.local, limit };
                    self.over(exit_code::TIMEOUT, error.to_string());
                    return Err(error);
                }
            }
        }
    }

    /// Begins the links: this node is ready. Before it, [`Leader::end`] can still tell the others why nothing comes
    /// of it.
    pub fn welcome(&self) {
        self.shared.stage.send_replace(Stage::Settled);
    }

    fn nodes(&self) -> Vec<RemoteNode> {
        let state = &mut *self.shared.state.lock();
        let node = |claim: &Claim| {
            let hello = claim.hello.clone();
            let (_, connections) = state.connections.get_mut(&hello.start_rank)?;
            Some(RemoteNode { hello, connections: connections.take()? })
        };
        state.registry.claims().filter_map(node).collect()
    }

    /// Ends the gathering: nodes that wait, or come later, are told to end with this code.
    pub fn over(&self, code: u8, reason: String) {
        self.shared.stage.send_replace(Stage::Over(code, reason));
    }

    /// Like [`Leader::over`], and waits until the nodes that are connected were told, at most a few seconds.
    pub async fn end(&self, code: u8, reason: &str) {
        // Those that were welcome hear it over their links.
        if matches!(*self.shared.stage.borrow(), Stage::Settled) {
            return;
        }
        self.over(code, reason.to_owned());
        let mut changed = self.shared.changed.subscribe();
        let told = changed.wait_for(|_| !self.shared.state.lock().registry.claims().any(|claim| claim.alive));
        if timeout(WRITE_LIMIT, told).await.is_err() {
            warn!("not all nodes could be told that the deployment is over");
        }
    }

    /// Ranks that no node has, for people.
    pub fn missing(&self) -> String {
        missing_text(&self.shared.state.lock().registry.missing())
    }

    /// All nodes but this one, by first rank.
    pub fn claims(&self) -> Vec<Claim> {
        self.shared.state.lock().registry.claims().cloned().collect()
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let strangers = Strangers::new(STRANGERS.0, STRANGERS.1);
    let tasks = TaskTracker::new();
    loop {
        let (stream, peer) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = net::accept(&shared.local, |cx| listener.poll_accept(cx)) => accepted,
        };
        if let Some(stranger) = strangers.admit(shared.local, peer) {
            let (shared, stop) = (shared.clone(), stop.clone());
            tasks.spawn(named(Task::PeerConnection, async move {
                stop.run_until_cancelled(shared.serve(stream, peer, stranger)).await;
            }));
        }
    }
    tasks.close();
    tasks.wait().await;
}

impl Shared {
    /// Logs a refusal, once per address and minute.
    fn refused(&self, peer: SocketAddr, reason: &str) {
        let admitted = self.state.lock().refused.admit(peer.ip());
        match admitted {
            Some(again) => warn!(%peer, reason, again, "peer refused"),
            None => debug!(%peer, reason, "peer refused again"),
        }
    }

    /// One connection, to its end; what it carries is done by who it is handed on to.
    async fn serve(&self, mut stream: TcpStream, peer: SocketAddr, stranger: Stranger) {
        let identified = async {
            set_options(&stream)?;
            auth::authenticate(&mut stream, Side::Leader, &self.token).await
        };
        if let Err(error) = identified.await {
            return self.refused(peer, &error.to_string());
        }
        let hello: NodeHello = match frame::read(&mut stream, auth::LIMIT).await {
            Ok(hello) => hello,
            Err(error) => return self.refused(peer, &format!("hello of a node: {error}")),
        };
        drop(stranger);
        let connection = self.connections.fetch_add(1, Ordering::Relaxed);
        let start_rank = hello.start_rank;
        let name = hello.name();
        if let Err(refusal) = self.claim(hello, peer, connection) {
            let (reason, retry) = match refusal {
                Refusal::Taken(reason) => (reason, true),
                Refusal::Mismatch(reason) => (reason, false),
            };
            self.refused(peer, &reason);
            let answer = LeaderAnswer::Refused { reason, retry };
            if let Err(error) = frame::write(&mut stream, &answer, WRITE_LIMIT).await {
                debug!(%peer, %error, "refusal not delivered");
            }
            return linger(stream).await;
        }
        info!(%peer, node = %name, "node joined");
        let stream = match self.until_settled(stream, peer).await {
            Ok(stream) => stream,
            Err(reason) => {
                info!(%peer, node = %name, %reason, "node left");
                return self.left(start_rank, connection);
            }
        };
        let (dropped, lost) = oneshot::channel::<()>();
        let link = Link::Stream(LinkStream::new(stream, &*name).keeping(dropped));
        let sender = self.state.lock().connections.get(&start_rank).map(|(sender, _)| sender.clone());
        let sent = async move { sender?.send(link).await.ok() };
        if sent.await.is_none() {
            debug!(node = %name, "no task accepts connections any more");
        }
        // An error, always: it is only ever dropped.
        let _ = lost.await;
        self.left(start_rank, connection);
    }

    fn claim(&self, hello: NodeHello, peer: SocketAddr, connection: u64) -> Result<(), Refusal> {
        let start_rank = hello.start_rank;
        let mut state = self.state.lock();
        let claimed = state.registry.claim(hello, peer, connection);
        match &claimed {
            Ok(()) => {
                state.connections.entry(start_rank).or_insert_with(|| {
                    let (sender, receiver) = mpsc::channel(1);
                    (sender, Some(receiver))
                });
            }
            Err(Refusal::Mismatch(reason)) if !state.registry.settled() => {
                state.mismatches.push(reason.clone());
                let all = state.mismatches.join("\n");
                self.stage.send_replace(Stage::Over(exit_code::MISMATCH, all));
            }
            Err(_) => {}
        }
        drop(state);
        self.changed.send_replace(());
        claimed
    }

    fn left(&self, start_rank: u16, connection: u64) {
        let mut state = self.state.lock();
        if state.registry.left(start_rank, connection) {
            state.connections.remove(&start_rank);
        }
        drop(state);
        self.changed.send_replace(());
    }

    /// Tells a node that it waits for others, until it does not any more.
    async fn until_settled(&self, mut stream: TcpStream, peer: SocketAddr) -> Result<TcpStream, String> {
        let mut stage = self.stage.subscribe();
        let mut changed = self.changed.subscribe();
        loop {
            let now = stage.borrow_and_update().clone();
            let missing = {
                let mut state = self.state.lock();
                if state.own_address.is_none() {
                    state.own_address = stream.local_addr().ok().map(|local| local.ip());
                }
                state.registry.missing()
            };
            let answer = match now {
                Stage::Gathering => LeaderAnswer::Waiting { missing },
                Stage::Settled => LeaderAnswer::Welcome { epoch: self.epoch },
                Stage::Over(code, reason) => LeaderAnswer::Over { code, reason },
            };
            frame::write(&mut stream, &answer, WRITE_LIMIT).await.map_err(|error| error.to_string())?;
            match answer {
                LeaderAnswer::Welcome { .. } => return Ok(stream),
                LeaderAnswer::Over { .. } => {
                    linger(stream).await;
                    return Err("it was told that the deployment is over".to_owned());
                }
                LeaderAnswer::Waiting { .. } | LeaderAnswer::Refused { .. } => {}
            }
            let mut byte = [0];
            tokio::select! {
                _ = stage.changed() => {}
                _ = changed.changed() => {}
                () = sleep(WORD_PERIOD) => {}
                read = stream.read(&mut byte) => {
                    return Err(match read {
                        Ok(0) => "connection closed".to_owned(),
                        Ok(_) => "it sent a message before it was accepted".to_owned(),
                        Err(error) => error.to_string(),
                    });
                }
            }
            debug!(%peer, "still gathering");
        }
    }
}

/// Lets the peer read the last word: a connection with unread bytes would be reset.
async fn linger(mut stream: TcpStream) {
    let mut rest = [0; 256];
    let reading = async { while stream.read(&mut rest).await.is_ok_and(|count| count > 0) {} };
    if timeout(hello::LAST_WORD, reading).await.is_err() {
        debug!("a refused peer did not hang up");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_name_that_is_not_known_yet_is_asked_for_again() {
        let asked = Cell::new(0);
        let known_after = |times: u32| {
            let asked = &asked;
            async move |_: &str| {
                asked.set(asked.get() + 1);
                if asked.get() > times {
                    Ok("10.0.0.1:7000".parse().unwrap())
                } else {
                    Err("no such name".to_owned())
                }
            }
        };
        let limit = Duration::from_secs(60);
        let address = own_address("leader.svc:7000", limit, known_after(5)).await.unwrap();
        assert_eq!((address.to_string().as_str(), asked.get()), ("10.0.0.1:7000", 6));
        let begun = Instant::now();
        let error = own_address("leader.svc:7000", limit, known_after(u32::MAX)).await.unwrap_err();
        assert!(
            error.to_string().contains("leader.svc:7000: its address is not known within 60s: no such name"),
            "{error}"
        );
        assert!(begun.elapsed() <= limit && begun.elapsed() > limit / 2, "{:?}", begun.elapsed());
    }
}
