//! The HTTP side of the leader (`--http`): uploads of checkpoints, updates, and the stream of their events. See
//! `protocol/docs/http.md`. Off by default.

mod answers;
mod gate;
mod routes;
#[cfg(test)]
mod tests;
mod updates;
mod uploads;

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::gate::Place;
use crate::api::AdminCommand;
use crate::net::{self, KeepAlive};
use crate::staging::upload::Uploads;
use crate::strangers::Strangers;
use crate::tasks::{Task, named};
use crate::token::Token;

/// Connections of clients at the same time; more wait.
const CONNECTIONS: usize = 64;
/// Those that have not shown the token, of all and of one address.
const STRANGERS: (usize, usize) = (128, 32);
/// A client that takes nothing of its answer, or whose host is gone, is given up after a minute.
const KEEP_ALIVE: KeepAlive = KeepAlive { idle: 30, interval: 10, probes: 3, unacknowledged: 60_000 };

/// How long what clients do may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Until the head of a request is there, the first one and the next one of the connection.
    head: Duration,
    /// Until the rest of it is there, but for uploads.
    body: Duration,
    /// Until a place is free for a client.
    place: Duration,
}

const LIMITS: Limits =
    Limits { head: Duration::from_secs(10), body: Duration::from_secs(30), place: Duration::from_secs(10) };

/// What requests are made of.
#[derive(Clone, Debug)]
struct Context {
    /// What clients must know; none: only for [`fuzz`].
    token: Option<Token>,
    /// How clients may call this server, besides by address.
    names: Arc<BTreeSet<String>>,
    clients: Arc<Semaphore>,
    limits: Limits,
    uploads: Uploads,
    /// Weak: the end of the admin server must be seen.
    admin: mpsc::WeakSender<AdminCommand>,
}

/// The listener, bound.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    address: SocketAddr,
    limits: Limits,
}

impl HttpServer {
    /// Binds the address.
    ///
    /// # Errors
    /// It cannot be bound.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address, limits: LIMITS })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is cancelled; all its tasks are in `tracker`. Clients call it by address, or by one of these
    /// names.
    pub fn serve(
        self,
        token: Token,
        names: BTreeSet<String>,
        uploads: Uploads,
        admin: mpsc::WeakSender<AdminCommand>,
        tracker: &TaskTracker,
        stop: CancellationToken,
    ) {
        let (clients, limits) = (Arc::new(Semaphore::new(CONNECTIONS)), self.limits);
        let names = Arc::new(names);
        let router = routes::router(Context { token: Some(token), names, clients, limits, uploads, admin });
        let tasks = tracker.clone();
        let strangers = Strangers::new(STRANGERS.0, STRANGERS.1);
        tracker.spawn(named(Task::Http, async move {
            loop {
                let (stream, peer) = tokio::select! {
                    () = stop.cancelled() => return,
                    accepted = net::accept(&self.address, |cx| self.listener.poll_accept(cx)) => accepted,
                };
                let Some(stranger) = strangers.admit(self.address, peer) else { continue };
                if let Err(error) = prepare(&stream) {
                    tracing::debug!(%error, "a connection ended at once");
                    continue;
                }
                let router = router.clone().layer(Extension(Place::of_stranger(stranger)));
                let stop = stop.clone();
                tasks.spawn(named(Task::HttpConnection, async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = connection(stream, router, limits.head) => {}
                    }
                }));
            }
        }));
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    KEEP_ALIVE.apply(stream)
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    router: axum::Router,
    head_limit: Duration,
) {
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_limit)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = served.await {
        tracing::debug!(%error, "a connection ended");
    }
}

/// For `crate::fuzz`: everything that a client sends on one connection, while nothing is open.
#[cfg(any(test, feature = "test-support"))]
pub(crate) fn fuzz(data: &[u8]) -> bool {
    use crate::fuzz::{exchange, run};

    // `Content-Range` alone as well: `size` by the length of the text.
    let text = String::from_utf8_lossy(data);
    let size = data.len() as u64;
    if let Some((from, end)) = uploads::parse_range(&text, size) {
        assert!(from < end && end <= size, "{text:?}: {from} to {end}");
    }
    run(async {
        let (uploads, _) = crate::staging::upload::channel();
        let (admin, _) = mpsc::channel(1);
        let router = routes::router(Context {
            token: None,
            names: Arc::default(),
            clients: Arc::new(Semaphore::new(CONNECTIONS)),
            limits: LIMITS,
            uploads,
            admin: admin.downgrade(),
        });
        drop(admin);
        exchange(data, async |stream| connection(stream, router, LIMITS.head).await).await;
    });
    text.contains("HTTP/1.1")
}
