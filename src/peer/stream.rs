//! Options of a connection between two nodes.

use std::io;

use tokio::net::TcpStream;

use crate::net::KeepAlive;

const KEEP_ALIVE: KeepAlive = KeepAlive { idle: 10, interval: 5, probes: 3, unacknowledged: 20_000 };

/// Small messages leave at once, and a peer that vanished is noticed.
pub(super) fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    KEEP_ALIVE.apply(stream)
}
