//! The opening of a connection of our own sockets: greeting and READY in both directions.

use std::io;

use bytes::{Bytes, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::zmtp::{self, Decoder, GREETING_LENGTH, Item};

/// A connection that does not begin.
#[derive(Debug, Error)]
pub(super) enum GreetError {
    /// The peer is gone without a byte: it may have looked whether somebody listens.
    #[error("during the ZMTP handshake: {0}")]
    Silent(io::Error),
    #[error("during the ZMTP handshake: {0}")]
    Io(#[from] io::Error),
    /// What the peer said is not what is expected of it.
    #[error("{0}")]
    Protocol(String),
}

/// Introduces us with `ready`, and returns the peer's READY if `check` accepts it. What has come behind it is left in
/// `buffer`.
pub(super) async fn greet(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    buffer: &mut BytesMut,
    decoder: &mut Decoder,
    ready: &[u8],
    check: impl FnOnce(&[u8]) -> Result<(), String>,
) -> Result<Bytes, GreetError> {
    let closed = |text: String| io::Error::new(io::ErrorKind::UnexpectedEof, text);
    stream.write_all(&zmtp::greeting()).await?;
    while buffer.len() < GREETING_LENGTH {
        match stream.read_buf(buffer).await {
            Err(error) if buffer.is_empty() => return Err(GreetError::Silent(error)),
            Ok(0) => {
                let (count, start) = (buffer.len(), printable(buffer));
                let error = closed(format!(
                    "expected a greeting of {GREETING_LENGTH} bytes, the connection closed after {count}: {start}"
                ));
                return Err(if count == 0 { GreetError::Silent(error) } else { error.into() });
            }
            read => read?,
        };
        if buffer[0] != 0xff || buffer.get(9).is_some_and(|byte| *byte != 0x7f) {
            let start = printable(buffer);
            return Err(GreetError::Protocol(format!("expected a ZMTP greeting, got {start}")));
        }
    }
    let greeting = buffer.split_to(GREETING_LENGTH);
    zmtp::check_greeting(&greeting).map_err(GreetError::Protocol)?;
    stream.write_all(ready).await?;
    let got = |what: &dyn std::fmt::Display| GreetError::Protocol(format!("expected READY, got {what}"));
    loop {
        match decoder.decode(buffer) {
            Ok(Some(Item::Command(command))) => {
                check(&command).map_err(GreetError::Protocol)?;
                return Ok(command);
            }
            Ok(Some(Item::Message(_))) => return Err(got(&"a message")),
            Ok(None) if stream.read_buf(buffer).await? == 0 => {
                return Err(closed("expected READY, the connection closed".to_owned()).into());
            }
            Ok(None) => {}
            Err(error) => return Err(got(&error)),
        }
    }
}

/// The first bytes, readable.
fn printable(bytes: &[u8]) -> String {
    let (start, more) = if bytes.len() > 24 { (&bytes[..24], "..") } else { (bytes, "") };
    format!("\"{}\"{more}", start.escape_ascii())
}
