//! An authenticated connection between two nodes.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::net::KeepAlive;

const KEEP_ALIVE: KeepAlive = KeepAlive { idle: 10, interval: 5, probes: 3, unacknowledged: 20_000 };

/// Small messages leave at once, and a peer that vanished is noticed.
pub(super) fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    KEEP_ALIVE.apply(stream)
}

/// The stream of a link. Tells whoever gave it out when it is dropped.
pub struct PeerStream {
    stream: TcpStream,
    /// Where it leads to.
    pub peer: SocketAddr,
    dropped: Option<Box<dyn FnOnce() + Send + Sync>>,
}

impl fmt::Debug for PeerStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerStream").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl PeerStream {
    pub(super) fn new(stream: TcpStream, peer: SocketAddr) -> Self {
        Self { stream, peer, dropped: None }
    }

    /// `dropped` is called when the stream goes.
    pub fn when_dropped(mut self, dropped: impl FnOnce() + Send + Sync + 'static) -> Self {
        self.dropped = Some(Box::new(dropped));
        self
    }
}

impl Drop for PeerStream {
    fn drop(&mut self) {
        if let Some(dropped) = self.dropped.take() {
            dropped();
        }
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
