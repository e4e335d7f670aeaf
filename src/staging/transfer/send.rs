//! The sending side of a transfer: announces digests as they become known, and sends the chunks that the next node
//! wants as they become valid.

use super::wire::{FromReceiver, FromSender, Incoming, Line, TICK, VERSION, chunks, pack_entries};
use crate::staging::error::StageError;
use crate::staging::fill::{Fill, Work};

/// Sends until the next node has everything. Fails the fill when it cannot.
pub(in crate::staging) fn run(mut line: Line, fill: &Fill, update: &str) {
    let wants = introduce(&mut line, fill, update).and_then(|()| line.another());
    let wants = match wants {
        Ok(wants) => wants,
        Err(error) => return fill.fail(error),
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if let Err(error) = read_wants(wants, fill) {
                fill.fail(error);
            }
        });
        if let Err(error) = send(&mut line, fill) {
            fill.fail(error);
        }
        let failed = fill.failure().map(|failure| failure.on(&line.from));
        let why = failed.or_else(|| fill.cancelled().then(|| "called off".to_owned()));
        line.end(why.map(FromSender::Failed).as_ref());
    });
}

/// Says what is coming and waits until it is accepted.
fn introduce(line: &mut Line, fill: &Fill, update: &str) -> Result<(), StageError> {
    let layout = fill.layout();
    let plan = FromSender::Plan {
        version: VERSION,
        id: update.to_owned(),
        node: line.from.clone(),
        chunk: layout.chunk_size(),
        files: layout.files().to_vec(),
    };
    line.control(&plan, &|| fill.ended())?;
    loop {
        match line.next(&|| fill.ended())? {
            Incoming::Control(FromReceiver::Accept { node }) => {
                line.to = format!("{node} ({})", line.to);
                return Ok(());
            }
            Incoming::Control(FromReceiver::Ping) => {}
            Incoming::Control(FromReceiver::Failed(reason)) => return Err(line.fault(reason)),
            other => return Err(line.fault(format!("{other:?} instead of an answer to the plan"))),
        }
    }
}

fn send(line: &mut Line, fill: &Fill) -> Result<(), StageError> {
    let ended = || fill.ended();
    while !fill.is_down_done() {
        match fill.next_work(TICK) {
            Work::Announce(known) => line.control(&FromSender::Known(pack_entries(&known)), &ended)?,
            Work::AllKnown(root) => line.control(&FromSender::AllKnown(root), &ended)?,
            Work::Send(chunk) => {
                // Only valid chunks are to be sent; a chunk that is not would be a bug of ours.
                let bytes = fill.mapping().bytes(chunk);
                let bytes = bytes.ok_or_else(|| line.fault(format!("chunk {chunk} is not valid")))?;
                line.data(chunk, bytes, &ended)?;
            }
            Work::Idle if line.is_quiet() => line.control(&FromSender::Ping, &ended)?,
            Work::Idle => {}
            Work::Ended => return Ok(()),
        }
    }
    Ok(())
}

fn read_wants(mut line: Line, fill: &Fill) -> Result<(), StageError> {
    loop {
        match line.next(&|| fill.ended())? {
            Incoming::Control(FromReceiver::Want(wanted)) => {
                for chunk in chunks(&wanted).map_err(|reason| line.fault(reason))? {
                    if !fill.want(chunk) {
                        return Err(line.fault(format!("chunk {chunk}, which does not exist, is wanted")));
                    }
                }
            }
            Incoming::Control(FromReceiver::Done) => {
                fill.down_done();
                return Ok(());
            }
            Incoming::Control(FromReceiver::Ping) => {}
            Incoming::Control(FromReceiver::Failed(reason)) => return Err(line.fault(reason)),
            Incoming::Control(FromReceiver::Accept { .. }) => {
                return Err(line.fault("the plan is accepted twice"));
            }
            Incoming::Data { .. } => return Err(line.fault("a chunk from the receiver")),
        }
    }
}
