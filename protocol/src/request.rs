//! What a frontend sends to an engine (channel I): ADD, ABORT and UTILITY.
//!
//! An engine decodes these in one thread without any protection: a malformed message ends that
//! thread for all clients while the process lives on (`process_input_sockets`, `vllm/v1/engine/core.py`).
//! [`check_frontend_message`] refuses what would do that, and finds the one field the sidecar
//! changes, `client_index`. Nothing is decoded that is not needed.

mod add;
mod fields;
#[cfg(any(test, feature = "test-support"))]
mod new_request;
mod params;
mod tensor;

use std::ops::Range;

use bytes::Bytes;
use thiserror::Error;

use crate::frames::{Frames, RequestType};
use crate::ids::{CallId, ClientIndex, Wave};
use crate::layout::Layout;
use crate::positional::{self, Kind, ScanError, Scanner};
use crate::write;

#[cfg(any(test, feature = "test-support"))]
pub use new_request::NewRequest;

/// Frames a message may have: type, payload, and one per tensor of 256 bytes or more, of which a video or many
/// pictures have thousands.
pub const MAX_FRAMES: usize = 64 * 1024;

/// Ids one ABORT may carry.
pub const MAX_ABORTS: usize = 1 << 20;

/// A message of a frontend that an engine survives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrontendMessage<'a> {
    /// A new request.
    Add(Add<'a>),
    /// Ids of requests to abort.
    Abort(Vec<&'a str>),
    /// A call of a method of the engine core.
    Utility(Utility<'a>),
}

/// A checked ADD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Add<'a> {
    /// vLLM's internal request id, unique per frontend.
    pub request_id: &'a str,
    /// The sender's own index (its API server).
    pub client_index: ClientIndex,
    /// The wave the sender believes to be current.
    pub current_wave: Wave,
    /// The rank the user asked for, if any.
    pub data_parallel_rank: Option<i64>,
    index_at: IndexAt,
}

/// A checked UTILITY.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Utility<'a> {
    /// The sender's own index (its API server).
    pub client_index: ClientIndex,
    /// Correlates the answer.
    pub call_id: CallId,
    /// vLLM's method name.
    pub method: &'a str,
    /// Positional arguments, a msgpack array as it came.
    pub args: &'a [u8],
    index_at: IndexAt,
}

impl Utility<'_> {
    /// The arguments, decoded.
    pub fn decode_args(&self) -> Vec<rmpv::Value> {
        match positional::value(self.args) {
            Ok(rmpv::Value::Array(args)) => args,
            _ => Vec::new(),
        }
    }
}

/// Where `client_index` stands in a payload.
#[derive(Clone, Debug, PartialEq, Eq)]
enum IndexAt {
    /// These bytes.
    Bytes(Range<usize>),
    /// Nowhere: the array is shorter. It has so many elements after a header of so many bytes, and
    /// the field belongs at that position.
    Beyond { header: usize, elements: usize, position: usize },
}

/// Why a message is refused, and whom that concerns.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{kind}")]
pub struct Refusal {
    pub kind: Box<RefusalKind>,
    /// Of an ADD, if it could be read: to be answered with an error finish.
    pub request_id: Option<String>,
    /// Of a UTILITY, if it could be read: to be answered with a failure.
    pub call_id: Option<CallId>,
}

impl From<RefusalKind> for Refusal {
    fn from(kind: RefusalKind) -> Self {
        Self { kind: Box::new(kind), request_id: None, call_id: None }
    }
}

/// What is wrong with a message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RefusalKind {
    /// Fewer than two frames, or more than [`MAX_FRAMES`].
    #[error("message of {0} frames, expected 2 to {MAX_FRAMES}")]
    FrameCount(usize),
    /// The type frame is not one known byte. Says what it starts with.
    #[error("type frame {0}, expected one byte 00, 01 or 03")]
    UnknownType(String),
    /// A type that only the coordinator or the engine itself may use.
    #[error("{0:?} from a frontend, expected ADD, ABORT or UTILITY")]
    ForeignType(RequestType),
    /// The payload is not what the engine's decoder takes.
    #[error("{message} at {at}: {error}")]
    Malformed {
        /// `ADD`, `ABORT` or `UTILITY`.
        message: &'static str,
        /// Field or position.
        at: &'static str,
        /// What the scan found.
        error: ScanError,
    },
    /// More bytes than the sidecar reads. Not the engine, but the node would not survive it.
    #[error("message of {size} bytes, at most {limit} (--max-request-bytes)")]
    TooLarge { size: usize, limit: usize },
    /// A positional array of the wrong length.
    #[error("{message} of {actual} fields, expected {expected}")]
    FieldCount {
        /// `ADD` or `UTILITY`.
        message: &'static str,
        /// How many are there.
        actual: usize,
        /// How many there must be (at least, for ADD).
        expected: usize,
    },
    /// A tensor that refers to a frame that is not there, or is not what it says.
    #[error("ADD: tensor of {field} {reason}")]
    Tensor { field: &'static str, reason: &'static str },
    /// A field has a value that breaks the engine.
    #[error("{message}: {field} is {actual}, expected {expected}")]
    Value {
        /// `ADD`, `ABORT` or `UTILITY`.
        message: &'static str,
        field: &'static str,
        actual: String,
        /// What it must be.
        expected: String,
    },
    /// A call that ends an engine's thread, or the engine.
    #[error("UTILITY {method}: {reason}")]
    Method {
        method: String,
        /// Why not.
        reason: &'static str,
    },
}

/// Checks a message of a frontend, as received by the virtual engine (without routing id).
///
/// # Errors
/// A [`Refusal`] if the engine would not survive the message, with the request or call to answer.
pub fn check_frontend_message<'a>(
    layout: &Layout,
    frames: &'a [Bytes],
) -> Result<FrontendMessage<'a>, Refusal> {
    let [kind, payload, ..] = frames else {
        return Err(RefusalKind::FrameCount(frames.len()).into());
    };
    if frames.len() > MAX_FRAMES {
        return Err(RefusalKind::FrameCount(frames.len()).into());
    }
    match RequestType::from_frame(kind) {
        Some(RequestType::Add) => add::check(layout, payload, frames).map(FrontendMessage::Add),
        Some(RequestType::Abort) => Ok(FrontendMessage::Abort(check_abort(payload)?)),
        Some(RequestType::Utility) => check_utility(payload).map(FrontendMessage::Utility),
        Some(other) => Err(RefusalKind::ForeignType(other).into()),
        None => {
            let start: Vec<String> = kind.iter().take(8).map(|b| format!("{b:02x}")).collect();
            Err(RefusalKind::UnknownType(start.join(" ")).into())
        }
    }
}

/// Refuses a message that was not read: `head` is the beginning of its first two frames.
pub fn too_large(head: &[Bytes], size: usize, limit: usize) -> Refusal {
    let mut refusal = Refusal::from(RefusalKind::TooLarge { size, limit });
    if let [kind, payload, ..] = head {
        let mut scanner = Scanner::new(payload);
        let is_array = scanner.array().is_ok();
        match RequestType::from_frame(kind) {
            Some(RequestType::Add) if is_array => {
                refusal.request_id = scanner.str().ok().map(str::to_owned);
            }
            Some(RequestType::Utility) if is_array && scanner.int().is_ok() => {
                refusal.call_id = scanner.int().ok().map(CallId);
            }
            _ => {}
        }
    }
    refusal
}

impl<'a> FrontendMessage<'a> {
    /// The payload with another `client_index`; all other bytes stay. `payload` must be the second
    /// frame of the message this was read from. ABORT carries no index and is returned as it is.
    pub fn with_client_index(&self, payload: &Bytes, index: ClientIndex) -> Bytes {
        let at = match self {
            Self::Add(add) => &add.index_at,
            Self::Utility(utility) => &utility.index_at,
            Self::Abort(_) => return payload.clone(),
        };
        let mut number = Vec::with_capacity(8);
        match at {
            IndexAt::Bytes(range) => {
                write::uint(&mut number, u64::from(index.0));
                if payload.get(range.clone()) == Some(&number[..]) {
                    return payload.clone();
                }
                positional::splice(payload, range.clone(), &number)
            }
            IndexAt::Beyond { header, elements, position } => {
                // The fields in between all default to None.
                let mut out = Vec::with_capacity(payload.len() + 16);
                write::array(&mut out, position + 1);
                out.extend_from_slice(payload.get(*header..).unwrap_or_default());
                for _ in *elements..*position {
                    write::nil(&mut out);
                }
                write::uint(&mut out, u64::from(index.0));
                out.into()
            }
        }
    }

    /// The whole message with another `client_index`.
    pub fn rewrite_client_index(&self, frames: &[Bytes], index: ClientIndex) -> Frames {
        let mut out = frames.to_vec();
        if let Some(payload) = out.get_mut(1) {
            *payload = self.with_client_index(payload, index);
        }
        out
    }
}

fn check_abort(payload: &Bytes) -> Result<Vec<&str>, RefusalKind> {
    let fail = |at| move |error| RefusalKind::Malformed { message: "ABORT", at, error };
    let mut scanner = Scanner::new(payload);
    let count = scanner.array().map_err(fail("request ids"))?;
    if count > MAX_ABORTS {
        return Err(RefusalKind::FieldCount { message: "ABORT", actual: count, expected: MAX_ABORTS });
    }
    let ids = (0..count).map(|_| scanner.str()).collect::<Result<_, _>>().map_err(fail("request id"))?;
    scanner.finish().map_err(fail("end"))?;
    Ok(ids)
}

fn check_utility(payload: &Bytes) -> Result<Utility<'_>, Refusal> {
    let fail = |at| move |error| RefusalKind::Malformed { message: "UTILITY", at, error };
    let mut scanner = Scanner::new(payload);
    let fields = scanner.array().map_err(fail("top level"))?;
    if fields != 4 {
        return Err(RefusalKind::FieldCount { message: "UTILITY", actual: fields, expected: 4 }.into());
    }
    let start = scanner.position();
    let client_index = scanner.int().map_err(fail("client_index"))?;
    let index_at = IndexAt::Bytes(start..scanner.position());
    let call_id = scanner.int().map_err(fail("call_id"))?;
    if call_id < 0 {
        return Err(value("UTILITY", "call_id", call_id, "0 or more").into());
    }
    let refuse = |kind: RefusalKind| Refusal { call_id: Some(CallId(call_id)), ..kind.into() };
    let client_index = client(client_index, "UTILITY").map_err(refuse)?;
    let method = scanner.str().map_err(fail("method")).map_err(refuse)?;
    let args_start = scanner.position();
    let args_kind = scanner.kind().map_err(fail("args")).map_err(refuse)?;
    if args_kind != Kind::Array {
        return Err(refuse(value("UTILITY", "args", args_kind, "array")));
    }
    scanner.skip_checked().map_err(fail("args")).map_err(refuse)?;
    scanner.finish().map_err(fail("end")).map_err(refuse)?;
    let args = &payload[args_start..];
    check_method(method, args).map_err(refuse)?;
    Ok(Utility { client_index, call_id: CallId(call_id), method, args, index_at })
}

fn check_method(method: &str, args: &[u8]) -> Result<(), RefusalKind> {
    let refuse = |reason| Err(RefusalKind::Method { method: method.chars().take(80).collect(), reason });
    // Since 0.27.1 run in the input thread, through an attribute that only fault tolerance sets.
    if method == "handle_fault_tolerance" {
        return refuse("ends the input thread of an engine without fault tolerance");
    }
    if method == "collective_rpc" {
        let mut scanner = Scanner::new(args);
        // A worker unpickles a method given as bytes.
        if !scanner.array().is_ok_and(|count| count > 0) || scanner.kind() != Ok(Kind::Str) {
            return refuse("the worker method must be a name");
        }
    }
    Ok(())
}

fn client(index: i128, message: &'static str) -> Result<ClientIndex, RefusalKind> {
    let fits = u32::try_from(index).map(ClientIndex);
    fits.map_err(|_| value(message, "client_index", index, "0 or more, 32 bits"))
}

fn value(
    message: &'static str,
    field: &'static str,
    actual: impl ToString,
    expected: impl Into<String>,
) -> RefusalKind {
    RefusalKind::Value { message, field, actual: actual.to_string(), expected: expected.into() }
}

pub fn encode_abort<'a>(request_ids: impl ExactSizeIterator<Item = &'a str>) -> Frames {
    let mut out = Vec::with_capacity(16 + request_ids.len() * 40);
    write::strs(&mut out, request_ids);
    vec![RequestType::Abort.to_frame(), out.into()]
}
