//! Frames before the link begins: `u32` length (big endian), then one msgpack value with named fields.

use std::io;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::msgpack;

/// Longest hello of a node, in bytes.
const LONGEST: u32 = 256 * 1024;

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn late(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// Writes a frame within `limit`.
pub(super) async fn write(
    stream: &mut (impl AsyncWrite + Unpin),
    value: &impl Serialize,
    limit: Duration,
) -> io::Result<()> {
    let body = rmp_serde::to_vec_named(value).map_err(|error| invalid(error.to_string()))?;
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    if length > LONGEST {
        return Err(invalid(format!("frame of {length} bytes, at most {LONGEST} expected")));
    }
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend_from_slice(&body);
    timeout(limit, stream.write_all(&frame)).await.map_err(|_| late(format!("not read within {limit:?}")))?
}

/// Reads a frame within `limit`. Not to be called again when it was given up.
pub(super) async fn read<S, T>(stream: &mut S, limit: Duration) -> io::Result<T>
where
    S: AsyncRead + Unpin,
    T: DeserializeOwned,
{
    let frame = async {
        let length = stream.read_u32().await?;
        if length > LONGEST {
            return Err(invalid(format!("frame of {length} bytes, at most {LONGEST} expected")));
        }
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body).await?;
        msgpack::decode(&body).map_err(|error| invalid(error.to_string()))
    };
    timeout(limit, frame).await.map_err(|_| late(format!("nothing for {limit:?}")))?
}

/// For `crate::fuzz`: the first frame of a follower, and the words of a leader.
#[cfg(any(test, feature = "test-support"))]
pub(crate) fn fuzz(data: &[u8]) -> bool {
    use super::hello::{LeaderAnswer, NodeHello};
    use crate::fuzz::{exchange, run};

    const SOON: Duration = Duration::from_secs(60);
    async fn one<T>(data: &[u8]) -> bool
    where
        T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
    {
        let Ok(value) = exchange(data, async |mut stream| read::<_, T>(&mut stream, SOON).await).await else {
            return false;
        };
        let mut frame = Vec::new();
        write(&mut frame, &value, SOON).await.expect("it came in a frame");
        let again = exchange(&frame, async |mut stream| read::<_, T>(&mut stream, SOON).await).await;
        assert_eq!(again.expect("own encoding"), value);
        true
    }
    run(async { one::<NodeHello>(data).await | one::<LeaderAnswer>(data).await })
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::super::hello::{LeaderAnswer, NodeHello};
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn a_frame_comes_out_as_it_went_in() {
        let (mut one, mut other) = duplex(1 << 16);
        let sent = NodeHello { start_rank: 3, host: "h".into(), ..NodeHello::default() };
        write(&mut one, &sent, SOON).await.unwrap();
        assert_eq!(read::<_, NodeHello>(&mut other, SOON).await.unwrap(), sent);
        let answer = LeaderAnswer::Waiting { missing: vec![(2, 1)] };
        write(&mut other, &answer, SOON).await.unwrap();
        assert_eq!(read::<_, LeaderAnswer>(&mut one, SOON).await.unwrap(), answer);
    }

    #[tokio::test]
    async fn a_frame_that_is_too_long_or_no_msgpack_is_refused_without_reading_on() {
        for bytes in [&[0x7f, 0xff, 0xff, 0xff][..], &[0, 0, 0, 1, 0xc1]] {
            let (mut one, mut other) = duplex(64);
            one.write_all(bytes).await.unwrap();
            let error = read::<_, NodeHello>(&mut other, SOON).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        }
    }
}
