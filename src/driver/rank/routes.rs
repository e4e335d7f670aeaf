//! Routes: the connections to one API server of a frontend.

use dp_sidecar_protocol::{EngineIdentity, FrontendId};
use futures::stream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{BATCH, Input, Source, until};
use crate::driver::handles::OpenRoute;
use crate::transport::{Connected, PeerReceiver, PeerSender, TransportError};

/// An open route. Dropping it closes the connections.
pub(super) struct Route {
    pub(super) epoch: u64,
    pub(super) frontend: FrontendId,
    pub(super) api_server: u32,
    /// To the API server's output socket.
    pub(super) outputs: PeerSender,
    /// The kernel takes nothing more; a source waits until it does.
    pub(super) blocked: bool,
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
    ) -> (Self, [Source; 2]) {
        let (dealer, push) = connections;
        let (inputs, requests) = dealer.split();
        let (outputs, end) = push.split();
        let closed = CancellationToken::new();
        let requests = until(&closed, request_source(requests, epoch, slot));
        let end = until(&closed, end_source(end, epoch, slot));
        let route = Self {
            epoch,
            frontend: request.frontend,
            api_server: request.api_server,
            outputs,
            blocked: false,
            _inputs: inputs,
            _end: closed.drop_guard(),
        };
        (route, [requests, end])
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
    match tokio::time::timeout(limit, exchange).await {
        Ok(result) => result,
        Err(_) => Err(TransportError::Timeout {
            address: request.input_address.clone(),
            stage: "opening a route",
            limit,
        }),
    }
}

fn request_source(
    receiver: PeerReceiver,
    epoch: u64,
    slot: u32,
) -> impl futures::Stream<Item = Input> + Send {
    stream::unfold(Some(receiver), move |receiver| async move {
        let mut receiver = receiver?;
        let gone = |error: TransportError| {
            let reason = error.to_string();
            let gone = Input::RouteGone { epoch, slot, reason };
            Some((gone, None))
        };
        let mut batch = match receiver.recv().await {
            Ok(frames) => vec![frames],
            Err(error) => return gone(error),
        };
        while batch.len() < BATCH {
            match receiver.try_recv() {
                Ok(Some(frames)) => batch.push(frames),
                // An error shows again at the next turn, when the batch has been handled.
                Ok(None) | Err(_) => break,
            }
        }
        let input = Input::Frontend { epoch, slot, batch };
        Some((input, Some(receiver)))
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
