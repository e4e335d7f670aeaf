//! The receiving side of a transfer: takes what this node has in its own memory, asks for the rest, and checks every
//! chunk that comes.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use parking_lot::Mutex;

use super::wire::{Ended, FromReceiver, FromSender, Incoming, Line, VERSION, entries, pack_chunks};
use crate::staging::digest::{Digest, root};
use crate::staging::error::StageError;
use crate::staging::fill::{Fill, Origin};
use crate::staging::layout::Layout;
use crate::staging::reuse::Reuse;

/// Chunks waiting to be looked for in this node's memory.
const LOOKUPS: usize = 4096;

/// What the node before wants to send.
#[derive(Debug)]
pub(in crate::staging) struct Plan {
    /// Of the update.
    pub(in crate::staging) id: String,
    /// Where its files lie.
    pub(in crate::staging) layout: Layout,
}

/// Reads the first frame.
pub(in crate::staging) fn plan(line: &mut Line, ended: Ended<'_>) -> Result<Plan, StageError> {
    match line.next(ended)? {
        Incoming::Control(FromSender::Plan { version, id, node, chunk, files }) => {
            if version != VERSION {
                return Err(
                    line.fault(format!("version {version} of the transfer protocol, expected {VERSION}"))
                );
            }
            line.from = node;
            let layout = Layout::new(chunk, files).map_err(|reason| line.fault(reason))?;
            Ok(Plan { id, layout })
        }
        Incoming::Control(FromSender::Failed(reason)) => Err(line.fault(reason)),
        _ => Err(line.fault("something else than a plan came first")),
    }
}

/// What goes to the sender, from several threads.
#[derive(Debug)]
pub(in crate::staging) struct Replies(Mutex<Line>);

impl Replies {
    /// Over this handle of the connection.
    pub(in crate::staging) fn new(line: Line) -> Self {
        Self(Mutex::new(line))
    }

    pub(in crate::staging) fn send(&self, what: &FromReceiver, fill: &Fill) -> Result<(), StageError> {
        self.0.lock().control(what, &|| fill.ended())
    }

    /// Says that it failed, if it can still be said.
    pub(in crate::staging) fn fail(&self, reason: String) {
        self.0.lock().end(Some(&FromReceiver::Failed(reason)));
    }

    /// Says that this side lives, if it has not said anything for a while.
    pub(in crate::staging) fn ping(&self, ended: Ended<'_>) -> Result<(), StageError> {
        let mut line = self.0.lock();
        if line.is_quiet() { line.control(&FromReceiver::Ping, ended) } else { Ok(()) }
    }

    fn want(&self, chunks: &[u32], fill: &Fill) -> Result<(), StageError> {
        if chunks.is_empty() {
            return Ok(());
        }
        self.send(&FromReceiver::Want(pack_chunks(chunks)), fill)
    }
}

/// Receives until the fill is complete and the sender has closed, or something fails.
pub(in crate::staging) fn run(line: Line, replies: &Replies, fill: &Fill, reuse: &Reuse) {
    let (lookups, asked) = sync_channel(LOOKUPS);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Err(error) = look_up(&asked, replies, fill, reuse) {
                fill.fail(error);
            }
            // Nobody may wait for a full queue.
            while asked.recv().is_ok() {}
        });
        let mut side = ReceiverSide { line, replies, fill, reuse, lookups, again: BTreeSet::new() };
        if let Err(error) = side.run() {
            fill.fail(error);
        }
    });
}

struct ReceiverSide<'a> {
    line: Line,
    replies: &'a Replies,
    fill: &'a Fill,
    reuse: &'a Reuse,
    lookups: SyncSender<(u32, Digest)>,
    /// Chunks that came damaged once.
    again: BTreeSet<u32>,
}

impl ReceiverSide<'_> {
    fn run(&mut self) -> Result<(), StageError> {
        loop {
            self.replies.ping(&|| self.fill.ended())?;
            let incoming = match self.line.next(&|| self.fill.ended()) {
                // It has closed after our `Done`.
                Err(_) if self.fill.complete() => return Ok(()),
                incoming => incoming?,
            };
            match incoming {
                Incoming::Control(FromSender::Known(known)) => {
                    let known = entries(&known).map_err(|reason| self.line.fault(reason))?;
                    self.known(&known)?;
                }
                Incoming::Control(FromSender::AllKnown(expected)) => self.all_known(expected)?,
                Incoming::Control(FromSender::Ping) => {}
                Incoming::Control(FromSender::Failed(reason)) => return Err(self.line.fault(reason)),
                Incoming::Control(FromSender::Plan { .. }) => return Err(self.line.fault("a second plan")),
                Incoming::Data { chunk, length } => self.data(chunk, length)?,
            }
        }
    }

    fn known(&self, known: &[(u32, Digest)]) -> Result<(), StageError> {
        let layout = self.fill.layout();
        let mut wanted = Vec::new();
        for (chunk, digest) in known {
            if !self.fill.know(*chunk, *digest) {
                let reason = format!("chunk {chunk} does not exist, or has two digests");
                return Err(self.line.fault(reason));
            }
            if self.reuse.may_have(layout, *chunk, *digest) {
                // The other end lives as long as this side.
                let _ = self.lookups.send((*chunk, *digest));
            } else {
                wanted.push(*chunk);
            }
        }
        self.replies.want(&wanted, self.fill)
    }

    fn all_known(&self, expected: String) -> Result<(), StageError> {
        let digests = self.fill.all_digests();
        let digests = digests.ok_or_else(|| self.line.fault("digests of some chunks are missing"))?;
        let actual = root(self.fill.layout(), &digests);
        if actual == expected { Ok(()) } else { Err(StageError::Root { expected, actual }) }
    }

    fn data(&mut self, chunk: u32, length: u32) -> Result<(), StageError> {
        let layout = self.fill.layout();
        if chunk >= layout.chunks() || length != layout.length(chunk) {
            return Err(self.line.fault(format!("chunk {chunk} with {length} bytes came")));
        }
        let described = layout.describe(chunk);
        let expected = self.fill.digest(chunk);
        let expected =
            expected.ok_or_else(|| self.line.fault(format!("{described} came before its digest")))?;
        let claim = self.fill.mapping().claim(chunk);
        let mut claim =
            claim.ok_or_else(|| self.line.fault(format!("{described} came, which was not asked for")))?;
        self.line.read(&mut claim, &|| self.fill.ended())?;
        self.fill.count_received(u64::from(length));
        let actual = Digest::of(&claim);
        if actual == expected {
            self.fill.finish(claim, actual, Origin::Received);
            return Ok(());
        }
        drop(claim);
        tracing::warn!(
            from = self.line.from, to = self.line.to, chunk = described, %expected, %actual,
            "a chunk came damaged"
        );
        if !self.again.insert(chunk) {
            let reason = format!("{described} has digest {actual}, expected {expected}, twice");
            return Err(self.line.fault(reason));
        }
        self.replies.want(&[chunk], self.fill)
    }
}

/// Takes chunks from this node's memory; asks for those that are not there after all.
fn look_up(
    asked: &Receiver<(u32, Digest)>,
    replies: &Replies,
    fill: &Fill,
    reuse: &Reuse,
) -> Result<(), StageError> {
    while let Ok((chunk, digest)) = asked.recv() {
        if fill.ended() {
            return Ok(());
        }
        if !reuse.take(fill, chunk, digest) {
            replies.want(&[chunk], fill)?;
        }
    }
    Ok(())
}
