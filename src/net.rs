//! What sockets of several modules have in common: those in the state directory, on which processes of one user find
//! each other (admin, relay, keeper), and TCP connections whose peer may vanish.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
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

/// The next connection of an allowed user; all others are logged and closed. Cancel safe.
pub(crate) async fn accept(listener: &tokio::net::UnixListener) -> UnixStream {
    let socket = || listener.local_addr().ok().and_then(|address| address.as_pathname().map(Path::to_owned));
    loop {
        match listener.accept().await {
            Ok((stream, _)) if is_allowed(&stream) => return stream,
            Ok(_) => tracing::warn!(socket = ?socket(), "refused a connection of another user"),
            Err(error) => {
                tracing::warn!(%error, socket = ?socket(), "cannot accept a connection");
                // Out of descriptors, as a rule: some will be free later.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
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
