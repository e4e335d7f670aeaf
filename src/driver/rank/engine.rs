//! Sockets of one engine incarnation.

use bytes::Bytes;
use dp_sidecar_protocol::{EngineIdentity, EngineIndex, Frames, Incarnation};
use futures::future::FutureExt;
use futures::stream::{self, StreamExt};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{BATCH, Input, Source, until};
use crate::driver::handles::SlotAddresses;
use crate::transport::{
    PrivateDir, PullEvent, PullListener, RouterEvent, RouterListener, RouterSender, TransportError,
};

/// The input side of one slot.
struct SlotSocket {
    sender: RouterSender,
    /// The engine has connected. Before that a ROUTER has nowhere to send.
    registered: bool,
    /// What is to be sent when it has.
    backlog: Vec<Frames>,
}

/// All sockets of one incarnation. Dropping them closes the engine's connections.
pub(super) struct EngineSockets {
    pub(super) incarnation: Incarnation,
    pub(super) generation: u64,
    /// Where the engine connects.
    pub(super) addresses: SlotAddresses,
    identity: EngineIdentity,
    slots: Vec<SlotSocket>,
    _end: DropGuard,
}

impl EngineSockets {
    /// Binds a fresh set; with the sources to read.
    pub(super) async fn bind(
        dir: &PrivateDir,
        rank: EngineIndex,
        incarnation: Incarnation,
        generation: u64,
        slot_count: u32,
    ) -> Result<(Self, Vec<Source>), TransportError> {
        let closed = CancellationToken::new();
        let mut sockets = Self {
            incarnation,
            generation,
            addresses: SlotAddresses { inputs: Vec::new(), outputs: Vec::new() },
            identity: rank.identity(),
            slots: Vec::new(),
            _end: closed.clone().drop_guard(),
        };
        let mut sources = Vec::new();
        let address = dir.fresh_addresses(rank);
        for slot in 0..slot_count {
            let input = RouterListener::bind(&address(&format!("i{slot}"))?).await?;
            let output = PullListener::bind(&address(&format!("o{slot}"))?).await?;
            sockets.addresses.inputs.push(input.address().to_owned());
            sockets.addresses.outputs.push(output.address().to_owned());
            sockets.slots.push(SlotSocket { sender: input.sender(), registered: false, backlog: Vec::new() });
            let identity = Bytes::copy_from_slice(&sockets.identity.0);
            sources.push(until(&closed, input_source(input, identity, generation, slot)));
            sources.push(until(&closed, output_source(output, generation, slot)));
        }
        Ok((sockets, sources))
    }

    /// Sends on a slot, or keeps the message until the engine has connected there.
    pub(super) async fn send(&mut self, slot: u32, frames: Frames) -> Result<(), TransportError> {
        let Some(socket) = self.slots.get_mut(slot as usize) else {
            return Ok(());
        };
        if socket.registered {
            // Never cancelled: the rank task awaits it in its loop. The machine bounds what is in
            // flight, so the queue behind it does not fill.
            socket.sender.send(&self.identity.0, frames).await
        } else {
            socket.backlog.push(frames);
            Ok(())
        }
    }

    /// The engine has connected on a slot. True the first time.
    pub(super) async fn registered(&mut self, slot: u32) -> Result<bool, TransportError> {
        let Some(socket) = self.slots.get_mut(slot as usize) else {
            return Ok(false);
        };
        if socket.registered {
            return Ok(false);
        }
        socket.registered = true;
        for frames in std::mem::take(&mut socket.backlog) {
            socket.sender.send(&self.identity.0, frames).await?;
        }
        Ok(true)
    }
}

fn input_source(
    socket: RouterListener,
    own: Bytes,
    generation: u64,
    slot: u32,
) -> impl futures::Stream<Item = Input> + Send {
    stream::unfold((socket, own), move |(mut socket, own)| async move {
        loop {
            let input = match socket.recv().await {
                RouterEvent::Message { identity, frames } if identity == own => {
                    Input::Registered { generation, slot, frames }
                }
                RouterEvent::Disconnected { identity } if identity == own => Input::EngineGone {
                    generation,
                    reason: format!("it closed its input connection of slot {slot}"),
                },
                RouterEvent::Message { identity, .. } | RouterEvent::Disconnected { identity } => {
                    tracing::warn!(?identity, slot, "another identity on an engine's socket");
                    continue;
                }
            };
            return Some((input, (socket, own)));
        }
    })
}

fn output_source(
    socket: PullListener,
    generation: u64,
    slot: u32,
) -> impl futures::Stream<Item = Input> + Send {
    let gone = move || Input::EngineGone {
        generation,
        reason: format!("it closed its output connection of slot {slot}"),
    };
    stream::unfold((socket, false), move |(mut socket, ended)| async move {
        if ended {
            return Some((gone(), (socket, false)));
        }
        let mut batch = match socket.recv().await {
            PullEvent::Message(frames) => vec![frames],
            PullEvent::Disconnected => return Some((gone(), (socket, false))),
        };
        let mut ended = false;
        while batch.len() < BATCH && !ended {
            match socket.recv().now_or_never() {
                Some(PullEvent::Message(frames)) => batch.push(frames),
                Some(PullEvent::Disconnected) => ended = true,
                None => break,
            }
        }
        let input = Input::Engine { generation, slot, batch };
        Some((input, (socket, ended)))
    })
    .fuse()
}
