//! The sending side of a hop: tells digests as they become known, and sends the chunks that the next node wants
//! as they become valid.

use std::time::Instant;

use super::super::error::StageError;
use super::super::fill::{Fill, Work};
use super::Ends;
use super::wire::{Down, HOP_VERSION, Incoming, Line, LineError, PING, TICK, Up, chunks, pack_entries};

/// Says what is coming and waits until it is accepted; gives the other node's name.
pub(in super::super) fn introduce(
    line: &mut Line,
    fill: &Fill,
    id: &str,
    node: &str,
) -> Result<String, LineError> {
    let layout = fill.layout();
    let plan = Down::Plan {
        version: HOP_VERSION,
        id: id.to_owned(),
        node: node.to_owned(),
        chunk: layout.chunk_size(),
        files: layout.files().to_vec(),
    };
    line.control(&plan, &|| fill.ended())?;
    loop {
        match line.next(&mut || go_on(fill))? {
            Incoming::Control(Up::Accept { node }) => return Ok(node),
            Incoming::Control(Up::Ping) => {}
            Incoming::Control(Up::Failed(reason)) => return Err(LineError::Garbage(reason)),
            other => return Err(LineError::Garbage(format!("{other:?} instead of an answer to the plan"))),
        }
    }
}

/// Sends until the next node has everything. Fails the fill when it cannot. `wants` is the same connection,
/// for the thread that reads what is wanted.
pub(in super::super) fn run(mut line: Line, wants: Line, fill: &Fill, ends: &Ends) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if let Err(error) = read_wants(wants, fill) {
                fail(fill, ends, error);
            }
        });
        if let Err(error) = send(&mut line, fill) {
            fail(fill, ends, error);
        }
        if let Some(failure) = fill.failure() {
            let _ = line.control(&Down::Failed(failure.to_string()), &|| false);
        } else if fill.cancelled() {
            let _ = line.control(&Down::Failed("called off".to_owned()), &|| false);
        }
        line.close();
    });
}

fn send(line: &mut Line, fill: &Fill) -> Result<(), LineError> {
    let ended = || fill.ended();
    let mut said = Instant::now();
    while !fill.is_down_done() {
        match fill.next_work(TICK) {
            Work::Announce(known) => line.control(&Down::Known(pack_entries(&known)), &ended)?,
            Work::AllKnown(root) => line.control(&Down::AllKnown(root), &ended)?,
            Work::Send(chunk) => {
                // Only valid chunks are to be sent; a chunk that is not would be a bug of ours.
                let bytes = fill.mapping().bytes(chunk);
                let bytes = bytes.ok_or_else(|| LineError::Garbage(format!("chunk {chunk} is not valid")))?;
                line.data(chunk, bytes, &ended)?;
            }
            Work::Idle if said.elapsed() < PING => continue,
            Work::Idle => line.control(&Down::Ping, &ended)?,
            Work::Ended => return Ok(()),
        }
        said = Instant::now();
    }
    Ok(())
}

fn read_wants(mut line: Line, fill: &Fill) -> Result<(), LineError> {
    loop {
        match line.next(&mut || go_on(fill))? {
            Incoming::Control(Up::Want(wanted)) => {
                for chunk in chunks(&wanted)? {
                    if !fill.want(chunk) {
                        return Err(LineError::Garbage(format!(
                            "chunk {chunk}, which does not exist, is wanted"
                        )));
                    }
                }
            }
            Incoming::Control(Up::Done) => {
                fill.down_done();
                return Ok(());
            }
            Incoming::Control(Up::Ping) => {}
            Incoming::Control(Up::Failed(reason)) => return Err(LineError::Garbage(reason)),
            Incoming::Control(Up::Accept { .. }) => {
                return Err(LineError::Garbage("the plan is accepted twice".to_owned()));
            }
            Incoming::Data { .. } => return Err(LineError::Garbage("a chunk from the receiver".to_owned())),
        }
    }
}

fn go_on(fill: &Fill) -> Result<(), LineError> {
    if fill.ended() { Err(LineError::Ended) } else { Ok(()) }
}

/// Fails the fill with what went wrong on this hop.
pub(in super::super) fn fail(fill: &Fill, ends: &Ends, error: LineError) {
    if let Some(error) = describe(ends, error) {
        fill.fail(error);
    }
}

/// The error for people; none if the job had ended anyway.
pub(in super::super) fn describe(ends: &Ends, error: LineError) -> Option<StageError> {
    let (from, to) = (ends.from.to_string(), ends.to.to_string());
    match error {
        LineError::Ended => None,
        LineError::Silent { what, limit } => Some(StageError::Silent { from, to, what, limit }),
        LineError::Lost(error) => {
            Some(StageError::Hop { from, to, reason: format!("the connection is lost: {error}") })
        }
        LineError::Garbage(reason) => Some(StageError::Hop { from, to, reason }),
    }
}
