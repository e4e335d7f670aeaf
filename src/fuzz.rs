//! One function for each parser of bytes that others send, for `scripts/fuzz` and for the bounded run in the unit
//! tests. None may panic, take memory for lengths that are only declared, or read what it wrote differently.
//!
//! What a target is given is the corpus in `fuzz/corpus/<target>` and what becomes of it by mutation. Each answers
//! whether the bytes were accepted, so that a corpus that no parser accepts any more is noticed.

use std::future::Future;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use dp_sidecar_protocol::ClientIndex;
use dp_sidecar_protocol::handshake::{EngineMessage, Init};
use dp_sidecar_protocol::layout::{Layout, VllmVersion};
use dp_sidecar_protocol::machine::weight_update::Fit;
use dp_sidecar_protocol::output::{EngineOutput, reports_load};
use dp_sidecar_protocol::positional::{self, Scanner};
use dp_sidecar_protocol::registration::{EngineReadyResponse, detect_layout, with_dp_stats_address};
use dp_sidecar_protocol::request::{FrontendMessage, check_frontend_message};
use dp_sidecar_protocol::stats::SchedulerStats;
use dp_sidecar_protocol::utility::UtilityOutput;
use dp_sidecar_protocol::wave::{FrontendUpstream, Publication, StartDpWave};

use crate::manifest::{Manifest, parse_index};
use crate::peer::auth::{Side, authenticate};
use crate::supervisor::keeper::wire;
use crate::token::Token;
use crate::transport::zmtp;

#[cfg(test)]
mod corpus;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod tests;

/// Reads bytes of a stranger; whether they were accepted.
pub type Target = fn(&[u8]) -> bool;

/// All targets by name.
pub const TARGETS: [(&str, Target); 14] = [
    ("auth", auth),
    ("coordinator", coordinator),
    ("engine", engine),
    ("frontend", frontend),
    ("handshake", handshake),
    ("http", crate::http::fuzz),
    ("index", index),
    ("keeper", keeper),
    ("link", crate::link::fuzz),
    ("manifest", manifest),
    ("peer", crate::peer::fuzz),
    ("scan", scan),
    ("transfer", crate::staging::fuzz_transfer),
    ("zmtp", zmtp),
];

pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|(known, _)| *known == name).map(|(_, target)| *target)
}

/// Runs a future that never waits for anything but bytes that are there already.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    }
    RUNTIME.with(|runtime| runtime.block_on(future))
}

/// Messages of an engine to a frontend's output socket or to the DP coordinator.
fn engine(data: &[u8]) -> bool {
    let frames = [Bytes::copy_from_slice(data)];
    reports_load(data);
    let _ = UtilityOutput::decode(data);
    let Ok(EngineOutput::Outputs(view)) = EngineOutput::parse(&frames) else {
        return false;
    };
    let finished = view.finished_requests();
    // Those that were aborted have no output here; a name has its byte of length at least.
    if let Ok(finished) = &finished {
        assert!(finished.len() <= data.len());
    }
    let stats = view.stats();
    if let Some(Ok(stats)) = &stats {
        let again = SchedulerStats::decode(&stats.encode()).expect("own encoding");
        // A load that is no number is none after it, either.
        assert_eq!(format!("{again:?}"), format!("{stats:?}"));
    }
    let _ = view.utility_output();
    finished.is_ok()
}

/// Cuts `data` into frames: `u16` length (big endian) and bytes; the last one may be shorter than it says.
fn cut(mut data: &[u8]) -> Vec<Bytes> {
    let mut frames = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let (frame, rest) = rest.split_at(usize::from(u16::from_be_bytes(*length)).min(rest.len()));
        frames.push(Bytes::copy_from_slice(frame));
        data = rest;
    }
    frames
}

/// Layouts that a frontend's bytes are read with.
const LAYOUTS: [VllmVersion; 5] = [
    VllmVersion::new(0, 11, 0),
    VllmVersion::new(0, 17, 1),
    VllmVersion::new(0, 22, 1),
    VllmVersion::new(0, 32, 0),
    VllmVersion::new(0, 33, 0),
];

/// Messages of a frontend to an engine. The first byte chooses the version, then come frames as for [`cut`].
fn frontend(data: &[u8]) -> bool {
    let Some((version, rest)) = data.split_first() else {
        return false;
    };
    let layout = Layout::closest(LAYOUTS[usize::from(*version) % LAYOUTS.len()]);
    let frames = cut(rest);
    let Ok(message) = check_frontend_message(&layout, &frames) else {
        return false;
    };
    if let FrontendMessage::Utility(utility) = &message {
        utility.decode_args();
    }
    // What an engine is sent is what was checked.
    let rewritten = message.rewrite_client_index(&frames, ClientIndex(77));
    let again = check_frontend_message(&layout, &rewritten).expect("accepted before");
    assert_eq!(again.rewrite_client_index(&rewritten, ClientIndex(77)), rewritten);
    true
}

/// HELLO and READY of engines, INIT of frontends, and registrations.
fn handshake(data: &[u8]) -> bool {
    let message = EngineMessage::decode(data);
    let init = Init::decode(data);
    if let Ok(init) = &init {
        assert_eq!(Init::decode(&init.encode()).expect("own encoding"), *init);
    }
    let _ = detect_layout(data, None);
    let registration = EngineReadyResponse::decode(data);
    if registration.is_ok() {
        let frame = Bytes::copy_from_slice(data);
        let changed = with_dp_stats_address(&frame, Some("tcp://h:1")).expect("decodes");
        let changed = EngineReadyResponse::decode(&changed).expect("still decodes");
        assert!(changed.dp_stats_address.is_none_or(|address| address == "tcp://h:1"));
    }
    message.is_ok() || init.is_ok() || registration.is_ok()
}

/// What frontends say to their DP coordinator, and what that publishes to them and to engines.
fn coordinator(data: &[u8]) -> bool {
    let wave = StartDpWave::decode(data);
    if let Ok(wave) = &wave {
        let frames = wave.encode();
        assert_eq!(StartDpWave::decode(&frames[1]).expect("own encoding"), *wave);
    }
    let upstream = FrontendUpstream::decode(data);
    if let Ok(upstream) = &upstream {
        assert_eq!(FrontendUpstream::decode(&upstream.encode()).expect("own encoding"), *upstream);
    }
    let publication = Publication::decode(data);
    wave.is_ok() || upstream.is_ok() || publication.is_ok()
}

/// The walk over msgpack that everything of vLLM is read with.
fn scan(data: &[u8]) -> bool {
    let mut scanner = Scanner::new(data);
    let skipped = scanner.skip().and_then(|()| scanner.finish());
    let value = positional::value(data);
    assert_eq!(skipped.is_ok(), value.is_ok(), "{skipped:?} but {value:?}");
    let mut checked = Scanner::new(data);
    if checked.skip_checked().is_ok() {
        let mut plain = Scanner::new(data);
        plain.skip().expect("the stricter walk passed");
        assert_eq!(plain.position(), checked.position());
    }
    let _ = positional::element(data, 3);
    value.is_ok()
}

/// The stream of a ZMTP peer: greeting, READY, messages, in one piece and byte by byte.
fn zmtp(data: &[u8]) -> bool {
    let _ = zmtp::check_greeting(data);
    let _ = zmtp::check_ready(data, "ROUTER");
    let _ = zmtp::property(data, "Identity");
    let read = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let mut decoder = zmtp::Decoder::with_limits(1 << 20, 1 << 10);
        let (mut buffer, mut items) = (BytesMut::new(), Vec::new());
        for piece in pieces {
            buffer.extend_from_slice(piece);
            loop {
                match decoder.decode(&mut buffer) {
                    Ok(Some(item)) => items.push(item),
                    Ok(None) => break,
                    Err(error) => return (items, Some(error.to_string())),
                }
            }
        }
        (items, None)
    };
    let whole = read(&mut std::iter::once(data));
    // Where a limit is passed is said with what is left of it, which is the same either way.
    assert_eq!(whole, read(&mut data.chunks(1)));
    !whole.0.is_empty()
}

/// The first bytes of connections between nodes, as each of the four sides reads them.
fn auth(data: &[u8]) -> bool {
    thread_local! {
        static TOKEN: Token = Token::new(b"the secret of the deployment").expect("long enough");
    }
    let token = TOKEN.with(Clone::clone);
    for side in [Side::Follower, Side::Leader, Side::Sender, Side::Receiver] {
        let result = run(exchange(data, async |mut stream| authenticate(&mut stream, side, &token).await));
        assert!(result.is_err(), "{side:?} let somebody in who does not know the secret");
    }
    data.starts_with(&crate::peer::auth::MAGIC)
}

/// Gives `serve` a connection on which `data` came and nothing more will.
pub(crate) async fn exchange<T>(data: &[u8], serve: impl AsyncFnOnce(tokio::io::DuplexStream) -> T) -> T {
    use tokio::io::AsyncWriteExt as _;
    let (ours, mut theirs) = tokio::io::duplex(data.len().max(64 * 1024));
    // The buffer takes all of it.
    let _ = theirs.write_all(data).await;
    let _ = theirs.shutdown().await;
    serve(ours).await
}

/// Messages between a sidecar and its keeper.
fn keeper(data: &[u8]) -> bool {
    fn read<T>(data: &[u8]) -> bool
    where
        T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
    {
        match wire::decode::<T>(&mut data.to_vec()) {
            Ok(Some(message)) => {
                let mut frame = wire::encode(&message).expect("it came in a frame");
                assert_eq!(wire::decode::<T>(&mut frame).expect("own encoding"), Some(message));
                true
            }
            _ => false,
        }
    }
    read::<wire::ToKeeper>(data) | read::<wire::FromKeeper>(data)
}

/// The start of a file of a checkpoint: the length and the text of its header.
fn manifest(data: &[u8]) -> bool {
    let path = Path::new("/checkpoint");
    let read = |length: u64| Manifest::from_headers(path, [("model.safetensors", length, data)]);
    // The data need not be there for the header to be read: any length may be claimed.
    let claimed = match read(data.len() as u64) {
        Err(crate::manifest::ManifestError::Length { expected, .. }) => expected,
        _ => data.len() as u64,
    };
    let Ok(manifest) = read(claimed) else {
        return false;
    };
    manifest.check_against(&manifest, &Fit::default()).expect("the same");
    // Tensors lie in the file and do not overlap.
    let mut end = 8;
    for tensor in &manifest.tensors {
        assert!(tensor.start >= end && tensor.start + tensor.len <= claimed, "{tensor:?}");
        end = tensor.start + tensor.len;
    }
    true
}

/// `model.safetensors.index.json`.
fn index(data: &[u8]) -> bool {
    match parse_index(Path::new("/checkpoint/model.safetensors.index.json"), data) {
        Ok(map) => {
            assert!(!map.is_empty() && map.values().all(|file| !file.contains('/')));
            true
        }
        Err(_) => false,
    }
}
