//! An authenticated connection between two nodes.

use std::fmt;
use std::io;

use tokio::net::TcpStream;

use crate::net::KeepAlive;

const KEEP_ALIVE: KeepAlive = KeepAlive { idle: 10, interval: 5, probes: 3, unacknowledged: 20_000 };

/// Small messages leave at once, and a peer that vanished is noticed.
pub(super) fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    KEEP_ALIVE.apply(stream)
}

/// A connection for the link, and what has to be dropped with it.
#[derive(Debug)]
pub struct PeerStream {
    pub stream: TcpStream,
    pub dropped: OnDrop,
}

/// Does something when it is dropped.
pub struct OnDrop(Option<Box<dyn FnOnce() + Send>>);

impl OnDrop {
    pub(super) fn new(action: impl FnOnce() + Send + 'static) -> Self {
        Self(Some(Box::new(action)))
    }
}

impl Drop for OnDrop {
    fn drop(&mut self) {
        if let Some(action) = self.0.take() {
            action();
        }
    }
}

impl fmt::Debug for OnDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnDrop").finish_non_exhaustive()
    }
}
