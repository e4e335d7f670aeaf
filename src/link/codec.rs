//! Frames of a link: `u32` length (big endian) and one msgpack value. Whatever comes in, it ends in a message or
//! in a [`LinkError`].

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::{Sink, Stream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::wire::{LINK_VERSION, MAX_FRAME};
use crate::driver::handles::{decode, encode};

/// A link is over, and why.
#[derive(Debug, Error)]
#[error("{peer}: {fault}")]
pub struct LinkError {
    /// Whose connection.
    pub peer: String,
    pub fault: Fault,
}

/// Why a link is over.
#[derive(Debug, Error)]
pub enum Fault {
    #[error("the connection was closed")]
    Closed,
    /// The connection broke.
    #[error("{0}")]
    Io(io::Error),
    /// Nothing came for too long: the way between may be cut.
    #[error("nothing heard for {0:?}")]
    Silent(Duration),
    #[error("a frame is longer than {MAX_FRAME} bytes")]
    TooLong,
    /// A frame is no message of the link; with the place where decoding stopped.
    #[error("a frame of {length} bytes is no message of the link: {detail}")]
    Garbage { length: usize, detail: String },
    /// The peer speaks another version.
    #[error("link version {0}, expected {LINK_VERSION}")]
    Version(u32),
    /// A message came that does not belong here.
    #[error("expected {expected}, got {got}")]
    Unexpected { expected: &'static str, got: &'static str },
    /// The process at the other end is not the one that is wanted.
    #[error("it was started for {about}, expected {wanted}")]
    Stranger { about: String, wanted: String },
    /// One side does not take what the other one sends.
    #[error("{0} are not taken")]
    Overflow(&'static str),
}

/// What a link can run over.
pub trait LinkIo: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> LinkIo for T {}

/// A fresh connection for a link: nothing was sent or read on it by the link itself.
pub struct LinkStream {
    framed: Framed<Box<dyn LinkIo>, LengthDelimitedCodec>,
    peer: String,
    /// Goes with the connection.
    _kept: Option<Box<dyn Send>>,
}

impl fmt::Debug for LinkStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkStream").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl LinkStream {
    /// Takes a connection that is authenticated, if it has to be. `peer` names it in errors and logs.
    pub fn new(io: impl LinkIo + 'static, peer: impl Into<String>) -> Self {
        let codec = LengthDelimitedCodec::builder()
            .length_field_type::<u32>()
            .big_endian()
            .max_frame_length(MAX_FRAME)
            .new_codec();
        let io: Box<dyn LinkIo> = Box::new(io);
        Self { framed: Framed::new(io, codec), peer: peer.into(), _kept: None }
    }

    /// With something that is to be dropped when the connection is.
    pub fn keeping(self, kept: impl Send + 'static) -> Self {
        Self { _kept: Some(Box::new(kept)), ..self }
    }

    /// The connection itself.
    #[cfg(test)]
    pub(crate) fn io(&mut self) -> &mut impl LinkIo {
        self.framed.get_mut()
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &str {
        &self.peer
    }
}

/// Encodes a message.
///
/// # Errors
/// It is longer than a frame may be, or cannot be encoded.
pub(super) fn frame(message: &impl Serialize) -> Result<Bytes, String> {
    let frame = encode(message)?;
    if frame.len() > MAX_FRAME {
        return Err(format!("message of {} bytes, a link takes {MAX_FRAME}", frame.len()));
    }
    Ok(frame)
}

/// For `crate::fuzz`: a frame as each side reads it.
#[cfg(any(test, feature = "test-support"))]
pub(crate) fn fuzz(frame: &[u8]) -> bool {
    fn read<T: Serialize + DeserializeOwned>(frame: &[u8]) -> bool {
        let Ok(message) = decode::<T>(frame) else {
            return false;
        };
        // Texts of the values of calls need not be UTF-8, and then grow.
        if let Ok(first) = self::frame(&message) {
            let second =
                self::frame(&decode::<T>(&first).expect("own encoding")).expect("as long as the first");
            assert_eq!(first, second, "read otherwise than written");
        }
        true
    }
    read::<super::wire::ToNode>(frame) | read::<super::wire::FromNode>(frame)
}

/// A connection in use: a queue of frames to be written, and what comes in. Nothing of it blocks; all progress
/// is made in [`Wire::next`].
pub(super) struct Wire {
    stream: LinkStream,
    outgoing: VecDeque<Bytes>,
    unflushed: bool,
}

impl Wire {
    pub(super) fn new(stream: LinkStream) -> Self {
        Self { stream, outgoing: VecDeque::new(), unflushed: false }
    }

    pub(super) fn peer(&self) -> &str {
        &self.stream.peer
    }

    pub(super) fn error(&self, fault: Fault) -> LinkError {
        LinkError { peer: self.stream.peer.clone(), fault }
    }

    /// Queues a frame made by [`frame`].
    pub(super) fn push(&mut self, frame: Bytes) {
        self.outgoing.push_back(frame);
    }

    /// Frames that wait to be written.
    pub(super) fn waiting(&self) -> usize {
        self.outgoing.len()
    }

    /// Writes what is queued and waits for the next message. Cancel safe.
    pub(super) async fn next<T: DeserializeOwned>(&mut self) -> Result<T, LinkError> {
        let frame = poll_fn(|cx| {
            if let Poll::Ready(Err(source)) = self.poll_write(cx) {
                return Poll::Ready(Err(self.broken(source)));
            }
            let incoming = ready!(Pin::new(&mut self.stream.framed).poll_next(cx));
            Poll::Ready(match incoming {
                Some(Ok(frame)) => Ok(frame),
                Some(Err(error)) => Err(self.broken(error)),
                None => Err(self.error(Fault::Closed)),
            })
        })
        .await?;
        decode(&frame).map_err(|detail| self.error(Fault::Garbage { length: frame.len(), detail }))
    }

    /// The next message of `wire`; waits for ever while there is none. Cancel safe.
    pub(super) async fn next_of<T: DeserializeOwned>(wire: Option<&mut Self>) -> Result<T, LinkError> {
        match wire {
            Some(wire) => wire.next().await,
            None => std::future::pending().await,
        }
    }

    /// Writes what is queued, within a time limit.
    pub(super) async fn finish(&mut self, limit: Duration) -> Result<(), LinkError> {
        match tokio::time::timeout(limit, poll_fn(|cx| self.poll_write(cx))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(self.broken(source)),
            Err(_) => Err(self.error(Fault::Silent(limit))),
        }
    }

    /// Ready when everything is written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let framed: &mut (dyn Sink<Bytes, Error = io::Error> + Unpin) = &mut self.stream.framed;
        let mut sink = Pin::new(framed);
        while !self.outgoing.is_empty() {
            ready!(sink.as_mut().poll_ready(cx))?;
            if let Some(frame) = self.outgoing.pop_front() {
                sink.as_mut().start_send(frame)?;
                self.unflushed = true;
            }
        }
        if self.unflushed {
            ready!(sink.poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn broken(&self, source: io::Error) -> LinkError {
        self.error(match source.kind() {
            ErrorKind::InvalidData | ErrorKind::InvalidInput => Fault::TooLong,
            ErrorKind::UnexpectedEof
            | ErrorKind::BrokenPipe
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted => Fault::Closed,
            _ => Fault::Io(source),
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::driver::handles::{Call, NodeAsk, RankAsk};
    use crate::link::wire::{FromNode, ToNode};

    async fn receive(bytes: &[u8]) -> LinkError {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        theirs.write_all(bytes).await.unwrap();
        drop(theirs);
        let mut wire = Wire::new(LinkStream::new(ours, "peer 7"));
        wire.next::<ToNode>().await.unwrap_err()
    }

    #[tokio::test]
    async fn garbage_is_an_error_that_names_the_peer() {
        let http = receive(b"GET / HTTP/1.1\r\n\r\n").await;
        assert!(matches!(http.fault, Fault::TooLong), "{http}");
        let huge = receive(&[0xff; 64]).await;
        assert!(matches!(huge.fault, Fault::TooLong), "{huge}");
        let text = receive(b"\0\0\0\x05hello").await;
        assert!(matches!(text.fault, Fault::Garbage { length: 5, .. }), "{text}");
        assert!(text.to_string().starts_with("peer 7: "), "{text}");
        let cut = receive(b"\0\0\0\x05hel").await;
        assert!(matches!(cut.fault, Fault::Closed | Fault::Io(_)), "{cut}");
        assert!(matches!(receive(b"").await.fault, Fault::Closed));
    }

    #[tokio::test]
    async fn deep_nesting_and_false_lengths_do_not_exhaust_the_process() {
        let mut deep = rmp_serde::to_vec_named(&ToNode::Ping).unwrap();
        deep.clear();
        // {"Ask": {"id": [[[[ ...
        deep.extend(b"\x81\xa3Ask\x81\xa2id");
        deep.extend(std::iter::repeat_n(0x91_u8, 500_000));
        let mut frame = u32::try_from(deep.len()).unwrap().to_be_bytes().to_vec();
        frame.extend(&deep);
        assert!(matches!(receive(&frame).await.fault, Fault::Garbage { .. }));
        // A call whose arguments claim to be four billion.
        let body = b"\x81\xa3Ask\x82\xa2id\x01\xa3ask\x81\xa4Rank\x92\0\x81\xa4Call\x84\xa6method\xa1m\xa4args\xdd\xff\xff\xff\xff";
        let mut frame = u32::try_from(body.len()).unwrap().to_be_bytes().to_vec();
        frame.extend(body);
        assert!(matches!(receive(&frame).await.fault, Fault::Garbage { .. }));
    }

    #[tokio::test]
    async fn values_of_calls_come_through_as_they_are() {
        let value = rmpv::Value::Array(vec![
            rmpv::Value::Nil,
            rmpv::Value::Binary(vec![0, 255]),
            rmpv::Value::Map(vec![(rmpv::Value::from(1), rmpv::Value::F64(0.5))]),
            rmpv::Value::from(u64::MAX),
            rmpv::Value::Ext(3, vec![1, 2]),
        ]);
        let (ours, theirs) = tokio::io::duplex(64);
        let (mut ours, mut theirs) =
            (Wire::new(LinkStream::new(ours, "a")), Wire::new(LinkStream::new(theirs, "b")));
        let answer = FromNode::Answer { id: 3, result: encode(&value) };
        ours.push(frame(&answer).unwrap());
        let finish = ours.finish(Duration::from_secs(5));
        let (sent, got) = tokio::join!(finish, theirs.next::<FromNode>());
        sent.unwrap();
        let FromNode::Answer { id: 3, result: Ok(got) } = got.unwrap() else {
            panic!("another message");
        };
        assert_eq!(decode::<rmpv::Value>(&got).unwrap(), value);
    }

    #[test]
    fn a_message_that_fits_no_frame_is_refused_before_it_is_sent() {
        let call = Call {
            key: uuid::Uuid::nil(),
            method: "m".to_owned(),
            args: vec![rmpv::Value::Binary(vec![0; MAX_FRAME])],
            timeout: Duration::from_secs(1),
        };
        let ask = NodeAsk::Rank(dp_sidecar_protocol::EngineIndex(0), RankAsk::Call(call));
        let error = frame(&ToNode::Ask { id: 1, ask }).unwrap_err();
        assert!(error.contains("a link takes"), "{error}");
    }
}
