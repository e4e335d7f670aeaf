//! Making the connection of a transfer: accept or connect, authenticate, all under deadlines.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout, timeout_at};

use crate::peer::auth::{AuthError, Side, authenticate};
use crate::token::Token;

/// Connecting to, or authenticating, one peer takes no longer.
const AUTH_LIMIT: Duration = Duration::from_secs(5);
/// Peers that are being authenticated at once; more wait in the backlog.
const CANDIDATES: usize = 16;

/// Waits for the first peer that proves itself. Others are logged and dropped.
///
/// # Errors
/// Nobody came by `until`, or the socket fails.
pub(in crate::staging) async fn accept(
    listener: &TcpListener,
    token: Option<&Token>,
    until: Instant,
) -> io::Result<(std::net::TcpStream, SocketAddr)> {
    let mut candidates = FuturesUnordered::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if candidates.len() < CANDIDATES => {
                let (stream, peer) = accepted?;
                let proof = prove(stream, Side::Receiver, token);
                candidates.push(async move { (peer, timeout(AUTH_LIMIT, proof).await) });
            }
            Some((peer, proof)) = candidates.next() => match proof {
                Ok(Ok(stream)) => return Ok((stream.into_std()?, peer)),
                Ok(Err(error)) => tracing::warn!(%peer, %error, "a connection for weights is refused"),
                Err(_) => tracing::warn!(%peer, limit = ?AUTH_LIMIT, "a connection for weights is refused: not authenticated in time"),
            },
            () = tokio::time::sleep_until(until) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the node before did not connect in time"));
            }
        }
    }
}

/// Connects to the next node and proves who we are.
///
/// # Errors
/// It cannot be reached by then, or refuses.
pub(in crate::staging) async fn connect(
    address: SocketAddr,
    token: Option<&Token>,
) -> io::Result<std::net::TcpStream> {
    let until = Instant::now() + AUTH_LIMIT;
    let late = |what: &str| io::Error::new(io::ErrorKind::TimedOut, format!("{what} within {AUTH_LIMIT:?}"));
    let stream = timeout_at(until, TcpStream::connect(address)).await.map_err(|_| late("not reached"))??;
    let proven = prove(stream, Side::Sender, token);
    timeout_at(until, proven).await.map_err(|_| late("not authenticated"))??.into_std()
}

/// Proves to the other node that both know the secret, before anything else is said.
async fn prove(mut stream: TcpStream, side: Side, token: Option<&Token>) -> io::Result<TcpStream> {
    if let Some(token) = token {
        authenticate(&mut stream, side, token).await.map_err(|error| match error {
            AuthError::Io(error) => error,
            error => io::Error::new(io::ErrorKind::PermissionDenied, error.to_string()),
        })?;
    }
    Ok(stream)
}
