//! XPUB that listens for engines.
//!
//! Publishing writes straight to the connections, from the task that publishes: a wake of many engines costs one system
//! call each, and no task switch. What the kernel does not take now waits in front of its connection, bounded, and is
//! written by that connection's task.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use dp_sidecar_protocol::Frames;
use parking_lot::Mutex;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::greet::{GreetError, greet};
use super::listen::unlink;
use super::zmtp::{self, Decoder, Item};
use super::{TransportError, unlink_stale_socket};
use crate::net;
use crate::tasks::{Task, named};

/// Upstream messages waiting to be read. When it is full, connections are read no further.
const QUEUE: usize = 256;
/// While more than this waits for a subscriber, further messages are refused. They have some ten bytes each.
const BACKLOG_BYTES: usize = 64 * 1024;
/// Connections at a time; an engine has one, and may have a second while the first one's end is not seen yet.
const CONNECTIONS: usize = 16;
/// Until a connection's greeting and READY command are in.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Bytes of an upstream message, and frames: subscriptions, and what frontends send.
const UPSTREAM_BYTES: usize = 64 * 1024;
const UPSTREAM_FRAMES: usize = 8;
/// Bytes of all subscriptions of a connection, each with [`TOPIC_OVERHEAD`].
const TOPICS_BYTES: usize = 64 * 1024;
const TOPIC_OVERHEAD: usize = 64;
/// Room made for a read.
const READ: usize = 512;

/// XPUB on a unix socket, meant for one engine (one socket per rank and incarnation). Closes when it is dropped.
///
/// Like `XPUB_VERBOSER` it reports every subscription and its end; not that a subscriber left.
#[derive(Debug)]
pub struct XpubListener {
    shared: Arc<Shared>,
    upstream: mpsc::Receiver<Frames>,
    _stop: DropGuard,
}

/// Publishes on an [`XpubListener`].
#[derive(Clone, Debug)]
pub struct XpubPublisher {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// `ipc://` and the path.
    address: String,
    send_timeout: Duration,
    connections: Mutex<Vec<Arc<Connection>>>,
    /// Once it is cancelled, no connection is added any more.
    stop: CancellationToken,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    outgoing: Mutex<Outgoing>,
    /// Something waits in [`Outgoing::backlog`].
    behind: Notify,
}

/// What a connection gets. Written to by publishers and by the connection's task, never across a wait.
#[derive(Debug, Default)]
struct Outgoing {
    topics: Vec<Bytes>,
    topic_bytes: usize,
    /// Encoded messages that the kernel has not taken; it may begin inside of one.
    backlog: BytesMut,
}

impl XpubListener {
    /// Binds to `ipc:///path`; see [`super::RouterListener::bind`]. A subscriber that takes nothing for `send_timeout`
    /// while something waits for it ends the socket: `recv` and `send` then report the disconnection.
    ///
    /// # Errors
    /// As [`super::RouterListener::bind`].
    pub async fn bind(address: &str, send_timeout: Duration) -> Result<Self, TransportError> {
        let path = address.strip_prefix("ipc://").filter(|path| path.starts_with('/'));
        let path = path.ok_or_else(|| TransportError::address(address, "expected ipc:///path"))?;
        unlink_stale_socket(path.as_ref())?;
        let listener = UnixListener::bind(path).map_err(|error| TransportError::bind(address, error))?;
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            address: address.to_owned(),
            send_timeout,
            connections: Mutex::default(),
            stop: stop.clone(),
        });
        let (events, upstream) = mpsc::channel(QUEUE);
        tokio::spawn(named(
            Task::EnginePublisher,
            stop.clone().run_until_cancelled_owned(accept(listener, shared.clone(), events)),
        ));
        Ok(Self { shared, upstream, _stop: stop.drop_guard() })
    }

    #[cfg(any(test, feature = "test-support"))]
    pub fn address(&self) -> &str {
        &self.shared.address
    }

    pub fn publisher(&self) -> XpubPublisher {
        XpubPublisher { shared: self.shared.clone() }
    }

    /// The next subscription (`01...`, `00...`) or upstream message. Cancel-safe.
    ///
    /// # Errors
    /// [`TransportError::Disconnected`] when a subscriber was stuck; the socket is over.
    pub async fn recv(&mut self) -> Result<Frames, TransportError> {
        self.upstream.recv().await.ok_or_else(|| self.shared.stuck())
    }
}

impl Drop for XpubListener {
    fn drop(&mut self) {
        unlink(&self.shared.address);
        self.shared.close();
    }
}

impl XpubPublisher {
    /// Sends a message to all subscribers of its topic. Never blocks: what the kernel does not take at once is kept.
    ///
    /// # Errors
    /// [`TransportError::Disconnected`] when a subscriber does not read, and too much waits for it already (the others
    /// have the message), or the socket is over.
    pub fn send(&self, message: &Encoded) -> Result<(), TransportError> {
        if self.shared.stop.is_cancelled() {
            return Err(self.shared.stuck());
        }
        let mut taken = true;
        for connection in self.shared.connections.lock().iter() {
            taken &= connection.send(message);
        }
        if taken { Ok(()) } else { Err(self.shared.stuck()) }
    }
}

/// A message as it goes over the wire: encoded once for all subscribers.
#[derive(Clone, Debug)]
pub struct Encoded {
    topic: Bytes,
    wire: Bytes,
}

impl From<Frames> for Encoded {
    fn from(frames: Frames) -> Self {
        Self { wire: zmtp::encode(&frames), topic: frames.into_iter().next().unwrap_or_default() }
    }
}

impl Shared {
    fn stuck(&self) -> TransportError {
        TransportError::disconnected(&self.address, "the subscriber does not read")
    }

    fn close(&self) {
        let mut connections = self.connections.lock();
        self.stop.cancel();
        connections.clear();
    }

    /// False if the socket is closed.
    fn add(&self, connection: Arc<Connection>) -> bool {
        let mut connections = self.connections.lock();
        let open = !self.stop.is_cancelled();
        if open {
            connections.push(connection);
        }
        open
    }

    fn remove(&self, connection: &Arc<Connection>) {
        self.connections.lock().retain(|other| !Arc::ptr_eq(other, connection));
    }
}

impl Connection {
    /// False if the message could not be kept for a subscriber that does not read.
    fn send(&self, message: &Encoded) -> bool {
        let mut outgoing = self.outgoing.lock();
        if !outgoing.topics.iter().any(|topic| message.topic.starts_with(topic)) {
            return true;
        }
        if !outgoing.backlog.is_empty() {
            let room = outgoing.backlog.len() < BACKLOG_BYTES;
            if room {
                outgoing.backlog.extend_from_slice(&message.wire);
            }
            return room;
        }
        // An error shows again to the connection's task, which reads.
        let written = self.stream.try_write(&message.wire).unwrap_or(0);
        if written < message.wire.len() {
            outgoing.backlog.extend_from_slice(&message.wire[written..]);
            self.behind.notify_one();
        }
        true
    }

    /// Writes what waits, as far as the kernel takes it; whether it took something, and whether all is written.
    fn flush(&self) -> io::Result<(bool, bool)> {
        let mut outgoing = self.outgoing.lock();
        let mut progress = false;
        while !outgoing.backlog.is_empty() {
            match self.stream.try_write(&outgoing.backlog) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    outgoing.backlog.advance(written);
                    progress = true;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok((progress, false)),
                Err(error) => return Err(error),
            }
        }
        outgoing.backlog = BytesMut::new();
        Ok((progress, true))
    }

    /// Notes what an upstream message says about topics.
    fn note(&self, message: &Frames) -> Result<(), String> {
        let [only] = message.as_slice() else { return Ok(()) };
        let mut outgoing = self.outgoing.lock();
        match only.first() {
            Some(1) => {
                let topic = only.slice(1..);
                if !outgoing.topics.contains(&topic) {
                    outgoing.topic_bytes += topic.len() + TOPIC_OVERHEAD;
                    if outgoing.topic_bytes > TOPICS_BYTES {
                        return Err(format!("subscriptions of more than {TOPICS_BYTES} bytes"));
                    }
                    // Not as a part of what was read with it.
                    outgoing.topics.push(Bytes::copy_from_slice(&topic));
                }
            }
            Some(0) => {
                if let Some(at) = outgoing.topics.iter().position(|topic| *topic == only[1..]) {
                    let topic = outgoing.topics.swap_remove(at);
                    outgoing.topic_bytes -= topic.len() + TOPIC_OVERHEAD;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Why a connection is over.
enum End {
    /// The peer closed it, or the socket is dropped.
    Closed,
    Broken(String),
    Stuck,
}

async fn accept(listener: UnixListener, shared: Arc<Shared>, events: mpsc::Sender<Frames>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let tasks = TaskTracker::new();
    loop {
        let (stream, _) = net::accept(&shared.address, |cx| listener.poll_accept(cx)).await;
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(
                address = shared.address,
                "more than {CONNECTIONS} subscribers, this one is closed"
            );
            continue;
        };
        let (shared, events) = (shared.clone(), events.clone());
        let stop = shared.stop.clone();
        let serve = async move {
            match serve(&shared, stream, events).await {
                End::Closed => {}
                End::Broken(reason) => {
                    tracing::debug!(address = shared.address, "subscriber's connection closed: {reason}");
                }
                End::Stuck => {
                    let send_timeout = shared.send_timeout;
                    tracing::warn!(address = shared.address, ?send_timeout, "a subscriber does not read");
                    shared.close();
                }
            }
            drop(slot);
        };
        tasks.spawn(named(Task::EnginePublisher, stop.run_until_cancelled_owned(serve)));
    }
}

async fn serve(shared: &Shared, mut stream: UnixStream, events: mpsc::Sender<Frames>) -> End {
    let mut buffer = BytesMut::new();
    let mut decoder = Decoder::with_limits(UPSTREAM_BYTES, UPSTREAM_FRAMES);
    let ready = zmtp::ready("XPUB", None);
    let check =
        |command: &[u8]| zmtp::check_ready(command, "SUB").or_else(|_| zmtp::check_ready(command, "XSUB"));
    let greeted = greet(&mut stream, &mut buffer, &mut decoder, &ready, check);
    match timeout(HANDSHAKE, greeted).await {
        Ok(Ok(_)) => {}
        Ok(Err(GreetError::Silent(_))) => return End::Closed,
        Ok(Err(error)) => return End::Broken(error.to_string()),
        Err(_) => return End::Broken(format!("no ZMTP greeting and READY within {HANDSHAKE:?}")),
    }
    let connection = Arc::new(Connection { stream, outgoing: Mutex::default(), behind: Notify::new() });
    if !shared.add(connection.clone()) {
        return End::Closed;
    }
    let end = tokio::select! {
        end = read(&connection, buffer, decoder, &events) => end,
        end = write(&connection, shared.send_timeout) => end,
    };
    shared.remove(&connection);
    end
}

async fn read(
    connection: &Connection,
    mut buffer: BytesMut,
    mut decoder: Decoder,
    events: &mpsc::Sender<Frames>,
) -> End {
    loop {
        match decoder.decode(&mut buffer) {
            Ok(Some(Item::Message(frames))) => {
                if let Err(reason) = connection.note(&frames) {
                    return End::Broken(reason);
                }
                if events.send(frames).await.is_err() {
                    return End::Closed;
                }
            }
            Ok(Some(Item::Command(_))) => {}
            Ok(None) => {
                if let Err(end) = fill(&connection.stream, &mut buffer).await {
                    return end;
                }
            }
            Err(error) => return End::Broken(error.to_string()),
        }
    }
}

/// Writes what publishers left, whenever they left something.
async fn write(connection: &Connection, send_timeout: Duration) -> End {
    loop {
        connection.behind.notified().await;
        let mut due = Instant::now() + send_timeout;
        loop {
            match timeout_at(due, connection.stream.writable()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return End::Broken(error.to_string()),
                Err(_) => return End::Stuck,
            }
            match connection.flush() {
                Ok((_, true)) => break,
                Ok((true, false)) => due = Instant::now() + send_timeout,
                Ok((false, false)) => {}
                Err(error) => return End::Broken(error.to_string()),
            }
        }
    }
}

async fn fill(stream: &UnixStream, buffer: &mut BytesMut) -> Result<(), End> {
    let broken = |error: io::Error| End::Broken(error.to_string());
    loop {
        stream.readable().await.map_err(broken)?;
        buffer.reserve(READ);
        match stream.try_read_buf(buffer) {
            Ok(0) => return Err(End::Closed),
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(broken(error)),
        }
    }
}
