//! One connection to the keeper's socket: bytes in, requests out, answers back, never blocking.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use super::read_available;
use super::wire::{self, FromKeeper, ToKeeper};

/// A peer that does not read is cut off when this much waits for it.
const OUTBOX_LIMIT: usize = 4 * 1024 * 1024;
/// Read at most this much in one turn.
const TURN: u64 = 1024 * 1024;

/// A connected peer.
#[derive(Debug)]
pub struct Connection {
    /// Names it in the log.
    pub id: u64,
    stream: UnixStream,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    /// To be dropped.
    pub closed: bool,
}

impl Connection {
    /// Takes over an accepted stream.
    pub fn new(id: u64, stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { id, stream, inbox: Vec::new(), outbox: Vec::new(), closed: false })
    }

    /// The socket, for poll.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether something waits to be written.
    pub fn wants_write(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Reads what is there and returns the complete requests. A peer that breaks the rules is
    /// closed.
    pub fn read(&mut self) -> Vec<ToKeeper> {
        let open = read_available(&mut self.stream, TURN, &mut self.inbox).unwrap_or_else(|error| {
            tracing::warn!(connection = self.id, %error, "read failed");
            false
        });
        self.closed |= !open;
        let mut requests = Vec::new();
        loop {
            match wire::decode(&mut self.inbox) {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => return requests,
                Err(error) => {
                    tracing::warn!(connection = self.id, %error, "peer closed: bad message");
                    self.closed = true;
                    return requests;
                }
            }
        }
    }

    /// Queues a message and writes what can be written.
    pub fn send(&mut self, message: &FromKeeper) {
        match wire::encode(message) {
            Ok(frame) => self.outbox.extend_from_slice(&frame),
            Err(error) => tracing::error!(connection = self.id, %error, "message dropped"),
        }
        self.flush();
        if self.outbox.len() > OUTBOX_LIMIT {
            tracing::warn!(connection = self.id, "peer closed: it does not read");
            self.closed = true;
        }
    }

    /// Writes what can be written.
    pub fn flush(&mut self) {
        while !self.outbox.is_empty() && !self.closed {
            match self.stream.write(&self.outbox) {
                Ok(0) => self.closed = true,
                Ok(count) => {
                    self.outbox.drain(..count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.closed = true,
            }
        }
    }
}
