//! The sockets of one attempt to attach: each in a task that reports to the machine.

use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::frames::{COORDINATOR_READY, RequestType};
use dp_sidecar_protocol::machine::attachment::{Attempt, Event};
use dp_sidecar_protocol::wave::StartDpWave;
use dp_sidecar_protocol::{EngineIndex, Frames};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::peer;
use crate::transport::{Connected, TransportError};

/// For a message to be taken by a frontend that reads.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// Tries a connection. What comes back is who accepted it, and why the process behind it cannot fit, if it runs on
/// this host and can be looked at.
///
/// # Errors
/// What the connect said.
pub(super) async fn probe(
    address: &str,
    model: Option<&str>,
    size: u16,
    limit: Duration,
) -> Result<(IpAddr, Option<String>), String> {
    let stream = timeout(limit, TcpStream::connect(address))
        .await
        .map_err(|_| format!("no answer within {limit:?}"))?
        .map_err(|error| error.to_string())?;
    let peer = stream.peer_addr().map_err(|error| error.to_string())?;
    let here = stream.local_addr().is_ok_and(|local| local.ip() == peer.ip());
    drop(stream);
    if !here {
        return Ok((peer.ip(), None));
    }
    let (address, model) = (address.to_owned(), model.map(str::to_owned));
    let look = tokio::task::spawn_blocking(move || {
        let process = peer::listening_process(peer.port())?;
        peer::mismatch(&address, &process, model.as_deref(), size)
    });
    // What cannot be looked at is unknown, not wrong.
    Ok((peer.ip(), look.await.unwrap_or_default()))
}

/// Whose sockets these are, and who hears of them.
pub(super) struct Line {
    pub(super) attempt: Attempt,
    pub(super) rank: EngineIndex,
    /// For one connection.
    pub(super) limit: Duration,
    pub(super) events: mpsc::Sender<Event>,
}

impl Line {
    /// The handshake socket: sends what comes on `outgoing`, until that is closed or the connection is.
    pub(super) async fn handshake(self, address: String, outgoing: mpsc::Receiver<Frames>) {
        let (attempt, rank) = (self.attempt, self.rank);
        if let Err(error) = self.shake_hands(&address, outgoing).await {
            self.report(Event::HandshakeLost { attempt, rank, reason: error.to_string() }).await;
        }
    }

    async fn shake_hands(
        &self,
        address: &str,
        mut outgoing: mpsc::Receiver<Frames>,
    ) -> Result<(), TransportError> {
        let (attempt, rank) = (self.attempt, self.rank);
        let dealer = Connected::dealer(address, &rank.identity().0, self.limit).await?;
        let (mut sender, mut receiver) = dealer.split();
        self.report(Event::HandshakeConnected { attempt, rank }).await;
        loop {
            tokio::select! {
                frames = outgoing.recv() => match frames {
                    Some(frames) => send(address, sender.send(frames)).await?,
                    None => return Ok(()),
                },
                received = receiver.recv() => {
                    let payload = received?.into_iter().next().unwrap_or_default();
                    self.report(Event::Init { attempt, rank, payload }).await;
                }
            }
        }
    }

    /// The subscriber to the frontend's DP coordinator at `input`, and the push socket to it at `output`: pushes what
    /// comes on `outgoing`, until the connection is closed.
    pub(super) async fn coordinator(self, input: String, output: String, outgoing: mpsc::Receiver<Bytes>) {
        let (attempt, rank) = (self.attempt, self.rank);
        if let Err(error) = self.coordinate(&input, &output, outgoing).await {
            self.report(Event::CoordinatorLost { attempt, rank, reason: error.to_string() }).await;
        }
    }

    async fn coordinate(
        &self,
        input: &str,
        output: &str,
        mut outgoing: mpsc::Receiver<Bytes>,
    ) -> Result<(), TransportError> {
        let (mut push, mut gone) = Connected::push(output, self.limit).await?.split();
        let mut xsub = Connected::xsub(input, self.limit).await?;
        xsub.subscribe().await?;
        loop {
            tokio::select! {
                frame = outgoing.recv() => match frame {
                    Some(frame) => send(output, push.send(vec![frame])).await?,
                    None => return Ok(()),
                },
                received = xsub.recv() => self.received(input, &received?).await,
                // A PULL sends nothing; this ends with the connection.
                lost = gone.recv() => {
                    lost?;
                }
            }
        }
    }

    async fn received(&self, address: &str, frames: &Frames) {
        let (attempt, rank) = (self.attempt, self.rank);
        let event = match frames.as_slice() {
            [ready] if ready == COORDINATOR_READY => Event::CoordinatorReady { attempt, rank },
            [kind, payload, ..] if RequestType::from_frame(kind) == Some(RequestType::StartDpWave) => {
                match StartDpWave::decode(payload) {
                    Ok(start) => Event::StartWave { attempt, rank, wave: start.wave },
                    Err(error) => {
                        tracing::warn!(address, %error, "message of a frontend's DP coordinator ignored");
                        return;
                    }
                }
            }
            other => {
                let frames = other.len();
                tracing::warn!(address, frames, "unknown message of a frontend's DP coordinator ignored");
                return;
            }
        };
        self.report(event).await;
    }

    async fn report(&self, event: Event) {
        // The machine's task outlives this one.
        let _ = self.events.send(event).await;
    }
}

/// A send under [`SEND_LIMIT`].
async fn send(
    address: &str,
    sending: impl Future<Output = Result<(), TransportError>>,
) -> Result<(), TransportError> {
    timeout(SEND_LIMIT, sending).await.unwrap_or_else(|_| {
        Err(TransportError::Timeout { address: address.to_owned(), stage: "send", limit: SEND_LIMIT })
    })
}
