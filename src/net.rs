//! What sockets of several modules have in common: those in the state directory, on which processes of one user find
//! each other (admin, relay, keeper), and TCP connections whose peer may vanish.

use std::fmt::Debug;
use std::fs::{self, Permissions};
use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use nix::unistd::Uid;
use tokio::net::{TcpStream, UnixStream};

use crate::files;

/// Listens at `path`, in place of a stale socket: that nobody listens there is known by a lock. Does not block in
/// `accept`.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    files::absent_is_fine(fs::remove_file(path))?;
    // The directory is 0700, so there is no moment at which others can connect.
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Whether this user, or root, is at the other end.
pub(crate) fn is_allowed(stream: &impl AsFd) -> bool {
    getsockopt(stream, sockopt::PeerCredentials).is_ok_and(|peer| {
        let uid = Uid::from_raw(peer.uid());
        uid == Uid::effective() || uid.is_root()
    })
}

/// The next connection and where it comes from: what `poll_accept` of a listener at `address` gives. Cancel safe.
pub(crate) async fn accept<S, A>(
    address: &impl Debug,
    mut poll_accept: impl FnMut(&mut Context<'_>) -> Poll<io::Result<(S, A)>>,
) -> (S, A) {
    loop {
        match poll_fn(&mut poll_accept).await {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::warn!(%error, ?address, "cannot accept a connection");
                // Out of descriptors, as a rule: some will be free later.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// The next connection of an allowed user; all others are logged and closed. Cancel safe.
pub(crate) async fn accept_allowed(listener: &tokio::net::UnixListener) -> UnixStream {
    let address = listener.local_addr();
    loop {
        let (stream, _) = accept(&address, |cx| listener.poll_accept(cx)).await;
        if is_allowed(&stream) {
            return stream;
        }
        tracing::warn!(?address, "refused a connection of another user");
    }
}

/// When the kernel gives up a peer that says nothing or takes nothing: its host may have lost its power.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeepAlive {
    /// Seconds of silence before the kernel asks whether the peer is there.
    pub(crate) idle: u32,
    /// Seconds between two questions.
    pub(crate) interval: u32,
    /// Unanswered questions until the connection is dead.
    pub(crate) probes: u32,
    /// Milliseconds that data may stay unacknowledged.
    pub(crate) unacknowledged: u32,
}

impl KeepAlive {
    /// Applies it to a connection.
    pub(crate) fn apply(self, stream: &TcpStream) -> io::Result<()> {
        setsockopt(stream, sockopt::KeepAlive, &true)?;
        setsockopt(stream, sockopt::TcpKeepIdle, &self.idle)?;
        setsockopt(stream, sockopt::TcpKeepInterval, &self.interval)?;
        setsockopt(stream, sockopt::TcpKeepCount, &self.probes)?;
        Ok(setsockopt(stream, sockopt::TcpUserTimeout, &self.unacknowledged)?)
    }
}
