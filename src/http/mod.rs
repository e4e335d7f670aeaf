//! The HTTP side of the leader (`--http`): uploads of checkpoints, updates, and the stream of their events. See
//! `protocol/docs/http.md`. Off by default.

mod answers;
mod routes;
#[cfg(test)]
mod tests;
mod updates;
mod uploads;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::AdminCommand;
use crate::net;
use crate::staging::upload::Uploads;
use crate::tasks::{Task, named};
use crate::token::Token;

/// Connections at the same time; more wait.
const CONNECTIONS: usize = 64;
/// A request's head must be there within this time.
const HEAD_LIMIT: Duration = Duration::from_secs(10);

/// What requests are made of.
#[derive(Clone, Debug)]
struct Context {
    /// Whoever knows it may ask; none: everybody who reaches the address.
    /// What clients must know; none: only for [`fuzz`].
    token: Option<Token>,
    uploads: Uploads,
    /// Weak: the end of the admin server must be seen.
    admin: mpsc::WeakSender<AdminCommand>,
}

/// The listener, bound.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    address: SocketAddr,
}

impl HttpServer {
    /// Binds the address.
    ///
    /// # Errors
    /// It cannot be bound.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is cancelled; all its tasks are in `tracker`.
    pub fn serve(
        self,
        token: Token,
        uploads: Uploads,
        admin: mpsc::WeakSender<AdminCommand>,
        tracker: &TaskTracker,
        stop: CancellationToken,
    ) {
        let router = routes::router(Context { token: Some(token), uploads, admin });
        let tasks = tracker.clone();
        let free = Arc::new(Semaphore::new(CONNECTIONS));
        tracker.spawn(named(Task::Http, async move {
            loop {
                let next = async {
                    // Never closed, so this only waits.
                    let permit = Arc::clone(&free).acquire_owned().await.ok();
                    let (stream, _) = net::accept(&self.address, |cx| self.listener.poll_accept(cx)).await;
                    (permit, stream)
                };
                let (permit, stream) = tokio::select! {
                    () = stop.cancelled() => return,
                    next = next => next,
                };
                let (router, stop) = (router.clone(), stop.clone());
                tasks.spawn(named(Task::HttpConnection, async move {
                    tokio::select! {
                        () = stop.cancelled() => {}
                        () = connection(stream, router) => {}
                    }
                    drop(permit);
                }));
            }
        }));
    }
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, router: axum::Router) {
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
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
        let router = routes::router(Context { token: None, uploads, admin: admin.downgrade() });
        drop(admin);
        exchange(data, async |stream| connection(stream, router).await).await;
    });
    text.contains("HTTP/1.1")
}
