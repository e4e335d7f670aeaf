//! The handshake socket: a ROUTER for a handful of short messages, on a TCP port that anybody on the
//! node can reach.
//!
//! The `zeromq` crate is kept away from that port: there a declared frame length of 2^62 aborts the
//! process, endless MORE frames fill the memory, a half greeting stays for ever, and a second
//! connection with an engine's identity takes the first one's place. Here every connection is checked
//! (greeting, READY, sizes, counts, time limits) and has a number of its own; what is wrong closes
//! that connection and nothing else.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use dp_sidecar_protocol::Frames;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::TransportError;
use super::greet::{GreetError, greet};
use super::zmtp::{self, Decoder, Item};
use crate::log_limit::LogLimit;
use crate::net;
use crate::strangers::{Stranger, Strangers};
use crate::tasks::{Task, named};

/// Messages waiting for one connection.
const OUTGOING: usize = 4;
/// Events waiting for the driver.
const EVENTS: usize = 64;
/// Peer addresses remembered for rate-limiting the log.
const REMEMBERED: usize = 64;
/// Of a connection to any listener.
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(0);

/// What a connection may do.
#[derive(Clone, Debug)]
pub struct GuardLimits {
    /// Connections at a time whose first message has no answer yet; further ones are closed at once.
    pub connections: usize,
    /// As many of one address.
    pub of_address: usize,
    /// Until greeting and READY command are in.
    pub handshake: Duration,
    /// From then until the first message is in: engines say HELLO at once.
    pub hello: Duration,
    /// From then until it is answered: so long vLLM waits for INIT, and half a minute.
    pub answer: Duration,
    /// Until the rest of a message is in, and for writing one.
    pub message: Duration,
    /// Bytes of a message.
    pub message_bytes: usize,
    /// Frames of a message.
    pub frames: usize,
    /// Messages of a connection. An engine sends two.
    pub messages: usize,
    /// A peer address is named in the log at most once in this time.
    pub log_interval: Duration,
}

impl Default for GuardLimits {
    fn default() -> Self {
        Self {
            connections: 1024,
            of_address: 256,
            handshake: Duration::from_secs(5),
            hello: Duration::from_secs(10),
            answer: Duration::from_secs(330),
            message: Duration::from_secs(5),
            message_bytes: 64 * 1024,
            frames: 8,
            messages: 16,
            log_interval: Duration::from_secs(60),
        }
    }
}

/// What comes out of a [`GuardedRouter`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuardEvent {
    /// Of the connection with this number, and the identity in its peer's READY command; empty if it gave none.
    Message { peer: u64, identity: Bytes, frames: Frames },
    /// The connection with this number, which got through its greeting, is closed.
    Closed { peer: u64 },
}

/// The listening socket. Dropping it closes the port and all connections.
#[derive(Debug)]
pub struct GuardedRouter {
    address: SocketAddr,
    events: mpsc::Receiver<GuardEvent>,
    sender: GuardedSender,
    tasks: TaskTracker,
    _stop: DropGuard,
}

/// Sends to the connections of a [`GuardedRouter`].
#[derive(Clone, Debug)]
pub struct GuardedSender {
    connections: Arc<Mutex<BTreeMap<u64, mpsc::Sender<Frames>>>>,
}

impl GuardedSender {
    /// Queues a message for a connection; false if it is closed, or does not read.
    pub fn send(&self, peer: u64, frames: Frames) -> bool {
        let connections = self.connections.lock();
        connections.get(&peer).is_some_and(|connection| connection.try_send(frames).is_ok())
    }
}

impl GuardedRouter {
    /// Listens. No two connections of this process get the same number.
    ///
    /// # Errors
    /// [`TransportError::InUse`] if the port is taken, [`TransportError::Bind`] otherwise.
    pub async fn bind(address: SocketAddr, limits: GuardLimits) -> Result<Self, TransportError> {
        let failed = |error: io::Error| {
            if error.kind() == io::ErrorKind::AddrInUse {
                TransportError::InUse { address: address.to_string() }
            } else {
                TransportError::bind(address, error)
            }
        };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (out, events) = mpsc::channel(EVENTS);
        let sender = GuardedSender { connections: Arc::default() };
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let guard = Arc::new(Guard {
            address,
            strangers: Strangers::new(limits.connections, limits.of_address),
            log: Mutex::new(LogLimit::new(limits.log_interval, REMEMBERED)),
            limits,
            connections: sender.connections.clone(),
            out,
        });
        let accept = accept(guard, listener, tasks.clone(), stop.clone());
        tasks.spawn(named(Task::HandshakeListener, stop.clone().run_until_cancelled_owned(accept)));
        Ok(Self { address, events, sender, tasks, _stop: stop.drop_guard() })
    }

    /// The address, with the port that was taken.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// For answers.
    pub fn sender(&self) -> GuardedSender {
        self.sender.clone()
    }

    /// The next event. `None` never comes while this exists.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<GuardEvent>> {
        self.events.poll_recv(cx)
    }

    /// Closes the port and all connections, and waits until they are.
    pub async fn close(self) {
        let Self { tasks, _stop, events, .. } = self;
        drop(events);
        drop(_stop);
        tasks.close();
        tasks.wait().await;
    }
}

struct Guard {
    address: SocketAddr,
    limits: GuardLimits,
    strangers: Arc<Strangers>,
    connections: Arc<Mutex<BTreeMap<u64, mpsc::Sender<Frames>>>>,
    out: mpsc::Sender<GuardEvent>,
    log: Mutex<LogLimit<IpAddr>>,
}

async fn accept(guard: Arc<Guard>, listener: TcpListener, tasks: TaskTracker, stop: CancellationToken) {
    loop {
        let (stream, from) = net::accept(&guard.address, |cx| listener.poll_accept(cx)).await;
        let Some(stranger) = guard.strangers.admit(guard.address, from) else {
            continue;
        };
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        let guard = guard.clone();
        let serve = async move {
            if let Err(reason) = serve(&guard, stream, number, stranger).await {
                guard.complain(from, &reason);
            }
        };
        tasks.spawn(named(Task::HandshakeConnection, stop.clone().run_until_cancelled_owned(serve)));
    }
}

/// One connection, from greeting to end. The error is for the log.
async fn serve(guard: &Guard, mut stream: TcpStream, peer: u64, stranger: Stranger) -> Result<(), String> {
    let limits = &guard.limits;
    let mut buffer = BytesMut::new();
    let mut decoder = Decoder::with_limits(limits.message_bytes, limits.frames);
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let ready = zmtp::ready("ROUTER", None);
    let check = |command: &[u8]| zmtp::check_ready(command, "DEALER");
    let greeted = greet(&mut stream, &mut buffer, &mut decoder, &ready, check);
    let ready = match timeout(limits.handshake, greeted).await {
        Ok(Ok(ready)) => ready,
        // Somebody looked whether the port is open.
        Ok(Err(GreetError::Silent(_))) => return Ok(()),
        Ok(Err(error)) => return Err(error.to_string()),
        Err(_) => {
            return Err(format!(
                "expected a ZMTP greeting and a READY command within {:?}, it did not come",
                limits.handshake
            ));
        }
    };
    let identity = Bytes::copy_from_slice(zmtp::property(&ready, "Identity").unwrap_or_default());
    let (outgoing, answers) = mpsc::channel(OUTGOING);
    guard.connections.lock().insert(peer, outgoing);
    let result = exchange(guard, stream, peer, &identity, buffer, decoder, answers, stranger).await;
    guard.connections.lock().remove(&peer);
    // The driver is alive as long as this task is.
    let _ = guard.out.send(GuardEvent::Closed { peer }).await;
    result
}

#[expect(clippy::too_many_arguments, reason = "what a connection consists of, handed over once")]
async fn exchange(
    guard: &Guard,
    stream: TcpStream,
    peer: u64,
    identity: &Bytes,
    mut buffer: BytesMut,
    mut decoder: Decoder,
    mut answers: mpsc::Receiver<Frames>,
    stranger: Stranger,
) -> Result<(), String> {
    let limits = &guard.limits;
    let (mut reader, mut writer) = stream.into_split();
    let (mut messages, mut spoke) = (0, false);
    // Until it is answered it is one of those of whom there may be few.
    let mut stranger = Some((stranger, Instant::now() + limits.hello));
    // Set while a part of a message is in.
    let mut due: Option<Instant> = None;
    loop {
        if messages > limits.messages {
            return Err(format!("expected at most {} messages on a handshake connection", limits.messages));
        }
        match decoder.decode(&mut buffer) {
            Ok(Some(Item::Message(frames))) => {
                due = None;
                messages += 1;
                if !std::mem::replace(&mut spoke, true)
                    && let Some((_, until)) = &mut stranger
                {
                    *until = Instant::now() + limits.answer;
                }
                let event = GuardEvent::Message { peer, identity: identity.clone(), frames };
                if guard.out.send(event).await.is_err() {
                    return Ok(());
                }
                continue;
            }
            Ok(Some(Item::Command(_))) => {
                due = None;
                messages += 1;
                continue;
            }
            Ok(None) => {}
            Err(error) => return Err(format!("expected a handshake message, got {error}")),
        }
        if due.is_none() && (!buffer.is_empty() || decoder.is_inside()) {
            due = Some(Instant::now() + limits.message);
        }
        tokio::select! {
            read = reader.read_buf(&mut buffer) => match read {
                Ok(0) | Err(_) if due.is_none() => return Ok(()),
                Ok(0) => return Err("the connection closed inside a message".to_owned()),
                Ok(_) => {}
                Err(error) => return Err(format!("the connection broke inside a message: {error}")),
            },
            Some(frames) = answers.recv() => {
                match timeout(limits.message, writer.write_all(&zmtp::encode(&frames))).await {
                    Ok(Ok(())) => stranger = None,
                    Ok(Err(error)) => return Err(format!("sending to it: {error}")),
                    Err(_) => return Err(format!("it does not read for {:?}", limits.message)),
                }
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                return Err(format!(
                    "expected the rest of a message within {:?}, it did not come",
                    limits.message
                ));
            }
            () = sleep_until(stranger.as_ref().map_or_else(Instant::now, |(_, until)| *until)), if stranger.is_some() => {
                return Err(if spoke {
                    format!("there was no answer for its first message within {:?}", limits.answer)
                } else {
                    format!("expected HELLO within {:?} of its greeting, it did not come", limits.hello)
                });
            }
        }
    }
}

impl Guard {
    /// Logs a rejected connection, once per peer address and interval.
    fn complain(&self, from: SocketAddr, reason: &str) {
        let admitted = self.log.lock().admit(from.ip());
        let Some(suppressed) = admitted else { return };
        tracing::warn!(
            listen.addr = %self.address,
            client.addr = %from,
            suppressed,
            "handshake connection closed: {reason}"
        );
    }
}
