//! The collective operations of a lockstep group, over the ports that INIT names.
//!
//! vLLM's ranks meet at a store that rank 0 opens on the last port of the list, and their workers
//! at another one on the port before it (protocol reference, section 2.4). The fake does the same
//! with plain TCP: a port that is not free, or that differs between ranks, shows. Operations are
//! blocking, as gloo's are, and two ranks that enter different ones are an error instead of a hang.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use thiserror::Error;

/// A group that cannot go on.
#[derive(Debug, Error)]
pub(crate) enum GroupError {
    /// A port is taken, or nobody is there.
    #[error("group of rank {rank} could not form at {address}: {reason}")]
    Form {
        /// Who.
        rank: u16,
        /// Where.
        address: String,
        /// What happened.
        reason: String,
    },
    /// A peer is gone (gloo: connection closed by peer).
    #[error("rank {peer} left the group: {reason}")]
    PeerLost {
        /// Which peer.
        peer: u16,
        /// What happened.
        reason: String,
    },
    /// Ranks entered different operations; real ones would hang here.
    #[error("ranks entered different collective operations: {0}")]
    Mismatch(String),
    /// The test ended the engine meanwhile.
    #[error("stopped")]
    Stopped,
}

/// Which operation; the peers must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Operation {
    /// End-of-interval synchronisation.
    Sync = 1,
    /// Barrier of `resume_scheduler`.
    Resume = 2,
    /// `barrier()`.
    Barrier = 3,
}

#[derive(Debug)]
enum Place {
    /// Rank 0: streams of ranks 1.., in rank order. The second listener is the workers' port.
    Root {
        peers: Vec<TcpStream>,
        _ports: [TcpListener; 2],
    },
    Leaf(TcpStream),
}

/// This rank's membership.
#[derive(Debug)]
pub(crate) struct Group {
    rank: u16,
    place: Place,
}

const TICK: Duration = Duration::from_millis(50);
const FRAME: usize = 9;

impl Group {
    /// Meets the other ranks. `ports` as in INIT: the last two are used.
    pub(crate) fn form(
        rank: u16,
        size: u16,
        ip: &str,
        ports: &[u16],
        limit: Duration,
        stopped: &dyn Fn() -> bool,
    ) -> Result<Self, GroupError> {
        let [.., workers, engines] = *ports else {
            return Err(GroupError::Form {
                rank,
                address: ip.to_owned(),
                reason: format!("{} ports in INIT, 2 needed", ports.len()),
            });
        };
        let address = format!("{ip}:{engines}");
        let failed = |reason: String| GroupError::Form { rank, address: address.clone(), reason };
        let end = Instant::now() + limit;
        let place = if rank == 0 {
            let bind =
                |port: u16| TcpListener::bind((ip, port)).map_err(|error| failed(format!("{port}: {error}")));
            let ports = [bind(engines)?, bind(workers)?];
            let text = |error: std::io::Error| failed(error.to_string());
            ports[0].set_nonblocking(true).map_err(text)?;
            let mut peers: Vec<Option<TcpStream>> = (1..size).map(|_| None).collect();
            while peers.iter().any(Option::is_none) {
                let mut stream = match ports[0].accept() {
                    Ok((stream, _)) => stream,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        if stopped() {
                            return Err(GroupError::Stopped);
                        }
                        if Instant::now() > end {
                            return Err(failed(format!("not all ranks came in {limit:?}")));
                        }
                        pause(Duration::from_millis(2));
                        continue;
                    }
                    Err(error) => return Err(text(error)),
                };
                stream.set_nonblocking(false).map_err(text)?;
                let _ = stream.set_nodelay(true);
                stream.set_read_timeout(Some(TICK)).map_err(text)?;
                let mut who = [0; 2];
                receive(&mut stream, &mut who, stopped)
                    .map_err(|error| error.of(u16::MAX, "while it introduced itself"))?;
                let peer = u16::from_le_bytes(who);
                let seat = usize::from(peer).checked_sub(1);
                match seat.and_then(|seat| peers.get_mut(seat)) {
                    Some(seat @ None) => *seat = Some(stream),
                    _ => return Err(failed(format!("rank {peer} came twice or does not exist"))),
                }
            }
            Place::Root { peers: peers.into_iter().flatten().collect(), _ports: ports }
        } else {
            loop {
                match TcpStream::connect((ip, engines)) {
                    Ok(mut stream) => {
                        let text = |error: std::io::Error| failed(error.to_string());
                        let _ = stream.set_nodelay(true);
                        stream.set_read_timeout(Some(TICK)).map_err(text)?;
                        stream.write_all(&rank.to_le_bytes()).map_err(text)?;
                        break Place::Leaf(stream);
                    }
                    Err(error) => {
                        if stopped() {
                            return Err(GroupError::Stopped);
                        }
                        if Instant::now() > end {
                            return Err(failed(error.to_string()));
                        }
                        pause(Duration::from_millis(5));
                    }
                }
            }
        };
        Ok(Self { rank, place })
    }

    /// Sums `values` over all ranks. Blocks until all have entered.
    pub(crate) fn sum(
        &mut self,
        operation: Operation,
        values: [u32; 2],
        stopped: &dyn Fn() -> bool,
    ) -> Result<[u32; 2], GroupError> {
        let frame = encode(operation as u8, values);
        match &mut self.place {
            Place::Leaf(stream) => {
                let lost = |reason: String| GroupError::PeerLost { peer: 0, reason };
                stream.write_all(&frame).map_err(|error| lost(error.to_string()))?;
                let mut answer = [0; FRAME];
                receive(stream, &mut answer, stopped)
                    .map_err(|error| error.of(0, "in a collective operation"))?;
                let (status, values) = decode(answer);
                if status == 0 {
                    Ok(values)
                } else {
                    Err(GroupError::Mismatch(format!(
                        "rank {} was in {operation:?}, another one was not",
                        self.rank
                    )))
                }
            }
            Place::Root { peers, .. } => {
                let mut total = values;
                let mut stranger = None;
                for (peer, stream) in (1_u16..).zip(peers.iter_mut()) {
                    let mut part = [0; FRAME];
                    receive(stream, &mut part, stopped)
                        .map_err(|error| error.of(peer, "in a collective operation"))?;
                    let (tag, values) = decode(part);
                    if tag != operation as u8 {
                        stranger = Some((peer, tag));
                    }
                    total = [total[0] + values[0], total[1] + values[1]];
                }
                let answer = encode(u8::from(stranger.is_some()), total);
                for (peer, stream) in (1_u16..).zip(peers.iter_mut()) {
                    stream
                        .write_all(&answer)
                        .map_err(|error| GroupError::PeerLost { peer, reason: error.to_string() })?;
                }
                match stranger {
                    None => Ok(total),
                    Some((peer, tag)) => Err(GroupError::Mismatch(format!(
                        "rank 0 was in {operation:?}, rank {peer} in operation {tag}"
                    ))),
                }
            }
        }
    }
}

/// Why bytes did not come.
enum Broken {
    Stopped,
    Lost(String),
}

impl Broken {
    fn of(self, peer: u16, stage: &str) -> GroupError {
        match self {
            Self::Stopped => GroupError::Stopped,
            Self::Lost(reason) => GroupError::PeerLost { peer, reason: format!("{reason} {stage}") },
        }
    }
}

fn receive(stream: &mut TcpStream, into: &mut [u8], stopped: &dyn Fn() -> bool) -> Result<(), Broken> {
    let mut done = 0;
    while done < into.len() {
        match stream.read(&mut into[done..]) {
            Ok(0) => return Err(Broken::Lost("connection closed by peer".to_owned())),
            Ok(count) => done += count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if stopped() {
                    return Err(Broken::Stopped);
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(Broken::Lost(error.to_string())),
        }
    }
    Ok(())
}

fn encode(tag: u8, values: [u32; 2]) -> [u8; FRAME] {
    let mut frame = [tag; FRAME];
    frame[1..5].copy_from_slice(&values[0].to_le_bytes());
    frame[5..9].copy_from_slice(&values[1].to_le_bytes());
    frame
}

fn decode(frame: [u8; FRAME]) -> (u8, [u32; 2]) {
    let [tag, a0, a1, a2, a3, b0, b1, b2, b3] = frame;
    (tag, [u32::from_le_bytes([a0, a1, a2, a3]), u32::from_le_bytes([b0, b1, b2, b3])])
}

/// A wait between two attempts to meet.
#[allow(
    clippy::disallowed_methods,
    reason = "a thread of its own, and nothing to wait on until the peer listens"
)]
fn pause(time: Duration) {
    std::thread::sleep(time);
}
