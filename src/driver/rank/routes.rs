//! Routes: the connections to one API server of a frontend.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use dp_sidecar_protocol::frames::ENGINE_CORE_DEAD;
use dp_sidecar_protocol::{EngineIdentity, Frames, FrontendId};
use futures::stream;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{BATCH, Input, Source, until};
use crate::driver::handles::OpenRoute;
use crate::transport::{Connected, PeerReceiver, PeerSender, TransportError};

/// For telling an API server that its engines are gone. It may be gone itself.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// An open route. Dropping it closes the connections.
pub(super) struct Route {
    pub(super) epoch: u64,
    pub(super) frontend: FrontendId,
    pub(super) api_server: u32,
    pub(super) output_address: String,
    /// To the API server's output socket.
    pub(super) outputs: PeerSender,
    /// The kernel takes nothing more; a source waits until it does.
    pub(super) blocked: bool,
    /// Bytes of the largest answer since nothing waited.
    largest: usize,
    /// Keeps the connection to its input socket open; nothing is sent there after registration.
    _inputs: PeerSender,
    _end: DropGuard,
}

impl Route {
    pub(super) fn new(
        request: &OpenRoute,
        connections: (Connected, Connected),
        epoch: u64,
        slot: u32,
        request_bytes: Arc<AtomicUsize>,
    ) -> (Self, [Source; 2]) {
        let (dealer, push) = connections;
        let (inputs, requests) = dealer.split();
        let (outputs, end) = push.split();
        let closed = CancellationToken::new();
        let requests = until(&closed, request_source(requests, epoch, slot, request_bytes));
        let end = until(&closed, end_source(end, epoch, slot));
        let route = Self {
            epoch,
            frontend: request.frontend,
            api_server: request.api_server,
            output_address: request.output_address.clone(),
            outputs,
            blocked: false,
            largest: 0,
            _inputs: inputs,
            _end: closed.drop_guard(),
        };
        (route, [requests, end])
    }

    /// Queues an answer.
    pub(super) fn push(&mut self, frames: Frames) {
        let before = self.outputs.queued();
        if before == 0 {
            self.largest = 0;
        }
        self.outputs.push(frames);
        self.largest = self.largest.max(self.outputs.queued() - before);
    }

    /// Bytes that wait for the API server to read. The largest answer is left out: one must always find room, however
    /// large.
    pub(super) const fn queued(&self) -> usize {
        self.outputs.queued().saturating_sub(self.largest)
    }
}

/// Connects to an API server and registers there. PUSH first: an API server may call as soon as it
/// is registered, and the answer needs the way back.
pub(super) async fn connect(
    request: &OpenRoute,
    identity: EngineIdentity,
) -> Result<(Connected, Connected), TransportError> {
    let limit = request.connect_timeout;
    let exchange = async {
        let push = Connected::push(&request.output_address, limit).await?;
        let mut dealer = Connected::dealer(&request.input_address, &identity.0, limit).await?;
        dealer.send(vec![request.registration.clone()]).await?;
        Ok((dealer, push))
    };
    match timeout(limit, exchange).await {
        Ok(result) => result,
        Err(_) => Err(TransportError::Timeout {
            address: request.input_address.clone(),
            stage: "opening a route",
            limit,
        }),
    }
}

/// Tells an API server, if it still runs, that its engines are gone, so that it fails at once instead
/// of waiting for answers. A Python frontend cannot be joined again by a new connection: its ROUTER
/// keeps the identity of the old one.
pub async fn say_dead(output: &str) {
    let told = timeout(FAREWELL_LIMIT, async {
        if let Some(host_port) = output.strip_prefix("tcp://") {
            // The transport would wait for somebody to listen.
            TcpStream::connect(host_port).await.ok()?;
        }
        let mut push = Connected::push(output, FAREWELL_LIMIT).await.ok()?;
        push.send(vec![Bytes::from_static(ENGINE_CORE_DEAD)]).await.ok()?;
        // It ends, or does not care.
        let _ = timeout(FAREWELL_LIMIT / 4, push.disconnected()).await;
        Some(())
    })
    .await;
    tracing::debug!(address = output, told = matches!(told, Ok(Some(()))), "ENGINE_CORE_DEAD");
}

fn request_source(
    receiver: PeerReceiver,
    epoch: u64,
    slot: u32,
    request_bytes: Arc<AtomicUsize>,
) -> impl futures::Stream<Item = Input> + Send {
    stream::unfold((Some(receiver), request_bytes), move |(receiver, request_bytes)| async move {
        let mut receiver = receiver?;
        let gone = |error: TransportError| {
            let reason = error.to_string();
            Input::RouteGone { epoch, slot, reason }
        };
        // One that waits for a message when the bound changes reads that message by the one before.
        receiver.cut_beyond(request_bytes.load(Relaxed));
        let mut batch = match receiver.recv_any().await {
            Ok(received) => vec![received],
            Err(error) => return Some((gone(error), (None, request_bytes))),
        };
        while batch.len() < BATCH {
            match receiver.try_recv() {
                Ok(Some(received)) => batch.push(received),
                // An error shows again at the next turn, when the batch has been handled.
                Ok(None) | Err(_) => break,
            }
        }
        let input = Input::Frontend { epoch, slot, batch };
        Some((input, (Some(receiver), request_bytes)))
    })
}

fn end_source(
    mut receiver: PeerReceiver,
    epoch: u64,
    slot: u32,
) -> impl futures::Stream<Item = Input> + Send {
    stream::once(async move {
        loop {
            if let Err(error) = receiver.recv().await {
                let reason = error.to_string();
                return Input::RouteGone { epoch, slot, reason };
            }
        }
    })
}

/// Reports when a route takes bytes again.
pub(super) fn writable_source(route: &Route, slot: u32) -> Source {
    let epoch = route.epoch;
    let writable = route.outputs.writable();
    Box::pin(stream::once(async move {
        writable.await;
        Input::Writable { epoch, slot }
    }))
}
