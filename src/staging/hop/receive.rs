//! The receiving side of a hop: takes what this node has in its own memory, asks for the rest, and checks every
//! chunk that comes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use parking_lot::Mutex;

use super::super::digest::Digest;
use super::super::error::StageError;
use super::super::fill::{Fill, Origin};
use super::super::layout::{FileSize, Layout};
use super::super::reuse::Reuse;
use super::Ends;
use super::send::fail;
use super::wire::{Down, HOP_VERSION, Incoming, Line, LineError, PING, Up, entries, pack_chunks};

/// Chunks waiting to be looked for in this node's memory.
const LOOKUPS: usize = 4096;

/// What the node before wants to send.
#[derive(Debug)]
pub(in super::super) struct Plan {
    /// Of the update.
    pub(in super::super) id: String,
    /// The sender's name.
    pub(in super::super) node: String,
    /// Where its files lie.
    pub(in super::super) layout: Layout,
}

/// Reads the first frame.
pub(in super::super) fn plan(line: &mut Line, ended: &dyn Fn() -> bool) -> Result<Plan, LineError> {
    let mut tick = || if ended() { Err(LineError::Ended) } else { Ok(()) };
    match line.next(&mut tick)? {
        Incoming::Control(Down::Plan { version, id, node, chunk, files }) => {
            if version != HOP_VERSION {
                return Err(LineError::Garbage(format!(
                    "version {version} of the transfer protocol, expected {HOP_VERSION}"
                )));
            }
            let files: Vec<FileSize> = files;
            let layout = Layout::new(chunk, files).map_err(LineError::Garbage)?;
            Ok(Plan { id, node, layout })
        }
        Incoming::Control(Down::Failed(reason)) => Err(LineError::Garbage(reason)),
        _ => Err(LineError::Garbage("something else than a plan came first".to_owned())),
    }
}

/// Tells the sender that its plan is refused.
pub(in super::super) fn refuse(line: &mut Line, reason: &str) {
    let _ = line.control(&Up::Failed(reason.to_owned()), &|| false);
    line.close();
}

/// The way back to the sender, for several threads.
#[derive(Debug)]
pub(in super::super) struct Back {
    line: Mutex<(Line, Instant)>,
}

impl Back {
    /// Over this handle of the connection.
    pub(in super::super) fn new(line: Line) -> Self {
        Self { line: Mutex::new((line, Instant::now())) }
    }

    /// Says something.
    pub(in super::super) fn say(&self, what: &Up, fill: &Fill) -> Result<(), LineError> {
        let mut line = self.line.lock();
        line.1 = Instant::now();
        line.0.control(what, &|| fill.ended())
    }

    /// Says that it failed, if it can still be said.
    pub(in super::super) fn fail(&self, reason: &str) {
        let mut line = self.line.lock();
        let _ = line.0.control(&Up::Failed(reason.to_owned()), &|| false);
        line.0.close();
    }

    /// Says that this side lives, if it has not said anything for a while.
    pub(in super::super) fn ping(&self, ended: &dyn Fn() -> bool) -> Result<(), LineError> {
        let mut line = self.line.lock();
        if line.1.elapsed() < PING {
            return Ok(());
        }
        line.1 = Instant::now();
        line.0.control(&Up::Ping, ended)
    }
}

/// Receives until the fill is complete and the sender has closed, or something fails.
pub(in super::super) fn run(line: Line, back: &Back, fill: &Fill, reuse: &Reuse, ends: &Ends) {
    let (lookups, asked) = sync_channel(LOOKUPS);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Err(error) = look_up(&asked, back, fill, reuse) {
                fail(fill, ends, error);
            }
            // Nobody may wait for a full queue.
            while asked.recv().is_ok() {}
        });
        let mut receiver = ReceiverSide { line, back, fill, reuse, ends, lookups, again: BTreeSet::new() };
        match receiver.run() {
            Ok(()) => {}
            Err(ReceiveError::Line(error)) => fail(fill, ends, error),
            Err(ReceiveError::Stage(error)) => fill.fail(error),
        }
    });
}

enum ReceiveError {
    Line(LineError),
    Stage(StageError),
}

impl From<LineError> for ReceiveError {
    fn from(error: LineError) -> Self {
        Self::Line(error)
    }
}

struct ReceiverSide<'a> {
    line: Line,
    back: &'a Back,
    fill: &'a Fill,
    reuse: &'a Reuse,
    ends: &'a Ends,
    lookups: SyncSender<(u32, Digest)>,
    /// Chunks that came damaged once.
    again: BTreeSet<u32>,
}

impl ReceiverSide<'_> {
    fn run(&mut self) -> Result<(), ReceiveError> {
        loop {
            let (back, fill) = (self.back, self.fill);
            let mut tick = || {
                if fill.ended() {
                    return Err(LineError::Ended);
                }
                back.ping(&|| fill.ended())
            };
            let incoming = match self.line.next(&mut tick) {
                // It has closed after our `Done`.
                Err(LineError::Lost(_)) if fill.complete() => return Ok(()),
                incoming => incoming?,
            };
            back.ping(&|| fill.ended())?;
            match incoming {
                Incoming::Control(Down::Known(known)) => self.known(&entries(&known)?)?,
                Incoming::Control(Down::AllKnown(expected)) => self.all_known(expected)?,
                Incoming::Control(Down::Ping) => {}
                Incoming::Control(Down::Failed(reason)) => return Err(LineError::Garbage(reason).into()),
                Incoming::Control(Down::Plan { .. }) => {
                    return Err(LineError::Garbage("a second plan".to_owned()).into());
                }
                Incoming::Data { chunk, length } => self.data(chunk, length)?,
            }
        }
    }

    fn known(&mut self, known: &[(u32, Digest)]) -> Result<(), LineError> {
        let layout = self.fill.layout();
        let mut wanted = Vec::new();
        for (chunk, digest) in known {
            if !self.fill.know(*chunk, *digest) {
                return Err(LineError::Garbage(format!("chunk {chunk} does not exist, or has two digests")));
            }
            if self.reuse.may_have(layout, *chunk, *digest) {
                // The other end lives as long as this side.
                let _ = self.lookups.send((*chunk, *digest));
            } else {
                wanted.push(*chunk);
            }
        }
        want(self.back, self.fill, &wanted)
    }

    fn all_known(&self, expected: String) -> Result<(), ReceiveError> {
        let layout = self.fill.layout();
        let Some(digests) = self.fill.all_digests() else {
            return Err(LineError::Garbage("digests of some chunks are missing".to_owned()).into());
        };
        let actual = super::super::digest::root(layout, &digests);
        if actual != expected {
            let node = self.ends.to.to_string();
            return Err(ReceiveError::Stage(StageError::Root { node, expected, actual }));
        }
        Ok(())
    }

    fn data(&mut self, chunk: u32, length: u32) -> Result<(), ReceiveError> {
        let layout = Arc::clone(self.fill.layout());
        let garbage = |reason: String| ReceiveError::Line(LineError::Garbage(reason));
        if chunk >= layout.chunks() || length != layout.length(chunk) {
            return Err(garbage(format!("chunk {chunk} with {length} bytes came")));
        }
        let Some(expected) = self.fill.digest(chunk) else {
            return Err(garbage(format!("{} came before its digest", layout.describe(chunk))));
        };
        let Some(mut claim) = self.fill.mapping().claim(chunk) else {
            return Err(garbage(format!("{} came, which was not asked for", layout.describe(chunk))));
        };
        let (back, fill) = (self.back, self.fill);
        let mut tick = || {
            if fill.ended() {
                return Err(LineError::Ended);
            }
            back.ping(&|| fill.ended())
        };
        self.line.read(&mut claim, &mut tick)?;
        self.fill.count_received(u64::from(length));
        let actual = Digest::of(&claim);
        if actual == expected {
            self.fill.finish(claim, actual, Origin::Received);
            return Ok(());
        }
        drop(claim);
        let described = layout.describe(chunk);
        tracing::warn!(
            from = %self.ends.from, to = %self.ends.to, chunk = described, %expected, %actual,
            "a chunk came damaged"
        );
        if !self.again.insert(chunk) {
            return Err(ReceiveError::Stage(StageError::BadChunk {
                from: self.ends.from.to_string(),
                to: self.ends.to.to_string(),
                chunk: described,
                expected,
                actual,
            }));
        }
        Ok(want(self.back, self.fill, &[chunk])?)
    }
}

/// Takes chunks from this node's memory; asks for those that are not there after all.
fn look_up(
    asked: &Receiver<(u32, Digest)>,
    back: &Back,
    fill: &Fill,
    reuse: &Reuse,
) -> Result<(), LineError> {
    while let Ok((chunk, digest)) = asked.recv() {
        if fill.ended() {
            return Ok(());
        }
        if !reuse.take(fill, chunk, digest) {
            want(back, fill, &[chunk])?;
        }
    }
    Ok(())
}

fn want(back: &Back, fill: &Fill, chunks: &[u32]) -> Result<(), LineError> {
    if chunks.is_empty() {
        return Ok(());
    }
    back.say(&Up::Want(pack_chunks(chunks)), fill)
}
