//! The first bytes of a peer link: both sides name protocol, version and role, and prove that they know the
//! secret without sending it. The follower proves first, so a stranger learns nothing from a leader.
//!
//! ```text
//! follower -> leader   opening: magic (8), version (4, big endian), role (1), nonce (32)
//! leader -> follower   opening, likewise
//! follower -> leader   proof (32): keyed hash over its role, and both openings
//! leader -> follower   1 and its own proof (32), or 0: the proof is wrong
//! ```
//!
//! Nothing that follows is encrypted or sealed: the network between the nodes is trusted as far as vLLM's own
//! traffic on it is.

use std::io;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use uuid::Uuid;

use crate::driver::handles::LINK_VERSION;
use crate::token::Token;

/// What every peer link begins with.
pub const MAGIC: [u8; 8] = *b"DPSCPEER";
/// Limit for the whole exchange.
pub const LIMIT: Duration = Duration::from_secs(5);
const NONCE: usize = 32;
const OPENING: usize = MAGIC.len() + 4 + 1 + NONCE;
const PROOF: usize = blake3::OUT_LEN;

/// Which side of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It connects.
    Follower,
    /// It is connected to.
    Leader,
    /// It connects to the next node of a chain, to send weights.
    Sender,
    /// It takes weights from the node before it.
    Receiver,
}

impl Side {
    fn byte(self) -> u8 {
        match self {
            Self::Follower => b'F',
            Self::Leader => b'L',
            Self::Sender => b'S',
            Self::Receiver => b'R',
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Follower => Self::Leader,
            Self::Leader => Self::Follower,
            Self::Sender => Self::Receiver,
            Self::Receiver => Self::Sender,
        }
    }

    /// Whether this side makes the connection: it speaks, and proves, first.
    fn connects(self) -> bool {
        matches!(self, Self::Follower | Self::Sender)
    }
}

/// The peer is not one of this deployment.
#[derive(Debug, Error)]
pub enum AuthError {
    /// It does not speak this protocol.
    #[error("its first bytes are not those of a peer link")]
    Garbage,
    /// It speaks another version.
    #[error("it speaks version {theirs} of the peer link, this sidecar speaks {LINK_VERSION}")]
    Version { theirs: u32 },
    /// Two leaders, or two followers.
    #[error("it has the same role in the link as this sidecar")]
    Role,
    /// Its proof is wrong.
    #[error("it does not know the secret; is its --auth-token-file another one?")]
    Token,
    /// The leader did not accept our proof.
    #[error("it refused this node's proof of the secret; is its --auth-token-file another one?")]
    Refused,
    /// Too slow.
    #[error("it did not identify itself within {LIMIT:?}")]
    Slow,
    /// The connection broke.
    #[error("connection lost while it identified itself: {0}")]
    Io(#[from] io::Error),
}

fn opening(side: Side) -> Vec<u8> {
    // 244 random bits of the kernel.
    let nonce = [Uuid::new_v4(), Uuid::new_v4()];
    let version = LINK_VERSION.to_be_bytes();
    [&MAGIC[..], &version, &[side.byte()], nonce[0].as_bytes(), nonce[1].as_bytes()].concat()
}

/// Checks what comes behind the magic.
fn check(opening: &[u8; OPENING], expected: Side) -> Result<(), AuthError> {
    let (version, rest) = opening[MAGIC.len()..].split_first_chunk().ok_or(AuthError::Garbage)?;
    let theirs = u32::from_be_bytes(*version);
    if theirs != LINK_VERSION {
        return Err(AuthError::Version { theirs });
    }
    if rest.first() == Some(&expected.byte()) { Ok(()) } else { Err(AuthError::Role) }
}

/// What `side` proves with: bound to its role, and to everything both have said, the connecting side first.
fn proof(token: &Token, side: Side, follower: &[u8], leader: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_keyed(token.key());
    hasher.update(&[side.byte()]).update(follower).update(leader);
    hasher.finalize()
}

/// Exchanges openings and proofs; after it the stream carries frames.
///
/// # Errors
/// [`AuthError`]; the stream is of no use any more.
pub async fn authenticate(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    side: Side,
    token: &Token,
) -> Result<(), AuthError> {
    timeout(LIMIT, exchange(stream, side, token)).await.unwrap_or(Err(AuthError::Slow))
}

async fn exchange(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    side: Side,
    token: &Token,
) -> Result<(), AuthError> {
    let ours = opening(side);
    if side.connects() {
        stream.write_all(&ours).await?;
    }
    let theirs = read_opening(stream).await?;
    let checked = check(&theirs, side.other());
    // A node of another version is told ours; whoever speaks something else is told nothing.
    if !side.connects() && !matches!(checked, Err(AuthError::Garbage)) {
        stream.write_all(&ours).await?;
    }
    checked?;
    let (follower, leader) =
        if side.connects() { (&ours[..], &theirs[..]) } else { (&theirs[..], &ours[..]) };
    let own = proof(token, side, follower, leader);
    let expected = proof(token, side.other(), follower, leader);
    if side.connects() {
        stream.write_all(own.as_bytes()).await?;
        if stream.read_u8().await? != 1 {
            return Err(AuthError::Refused);
        }
        return read_proof(stream, &expected).await;
    }
    match read_proof(stream, &expected).await {
        Ok(()) => {
            let mut answer = [1; 1 + PROOF];
            answer[1..].copy_from_slice(own.as_bytes());
            Ok(stream.write_all(&answer).await?)
        }
        Err(error) => {
            stream.write_all(&[0]).await?;
            stream.flush().await?;
            Err(error)
        }
    }
}

/// Reads the magic first: a peer that says something shorter is not waited for.
async fn read_opening<S: AsyncRead + Unpin>(stream: &mut S) -> Result<[u8; OPENING], AuthError> {
    let mut opening = [0; OPENING];
    let (magic, rest) = opening.split_at_mut(MAGIC.len());
    stream.read_exact(magic).await?;
    if *magic != MAGIC {
        return Err(AuthError::Garbage);
    }
    stream.read_exact(rest).await?;
    Ok(opening)
}

async fn read_proof<S: AsyncRead + Unpin>(stream: &mut S, expected: &blake3::Hash) -> Result<(), AuthError> {
    let mut theirs = [0; PROOF];
    stream.read_exact(&mut theirs).await?;
    // Hashes are compared in constant time.
    if blake3::Hash::from_bytes(theirs) == *expected { Ok(()) } else { Err(AuthError::Token) }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    fn token(secret: &str) -> Token {
        Token::new(secret.as_bytes()).unwrap()
    }

    /// Both sides with their secrets.
    async fn meet(follower: &str, leader: &str) -> (Result<(), AuthError>, Result<(), AuthError>) {
        let (mut one, mut other) = duplex(4096);
        let (follower, leader) = (token(follower), token(leader));
        tokio::join!(
            authenticate(&mut one, Side::Follower, &follower),
            authenticate(&mut other, Side::Leader, &leader)
        )
    }

    /// What the leader makes of these bytes, and what it answers.
    async fn say(bytes: &[u8]) -> (Result<(), AuthError>, Vec<u8>) {
        let (mut stranger, mut leader) = duplex(4096);
        stranger.write_all(bytes).await.unwrap();
        let token = token("the secret of all");
        let result = authenticate(&mut leader, Side::Leader, &token).await;
        drop(leader);
        let mut answer = Vec::new();
        stranger.read_to_end(&mut answer).await.unwrap();
        (result, answer)
    }

    #[tokio::test]
    async fn the_same_secret_lets_both_sides_in() {
        let (follower, leader) = meet("the secret of all", "the secret of all").await;
        follower.unwrap();
        leader.unwrap();
    }

    #[tokio::test]
    async fn another_secret_is_noticed_by_both_sides() {
        let (follower, leader) = meet("the secret of all", "the secret of some").await;
        assert!(matches!(follower, Err(AuthError::Refused)), "{follower:?}");
        assert!(matches!(leader, Err(AuthError::Token)), "{leader:?}");
    }

    #[tokio::test]
    async fn a_leader_that_does_not_know_the_secret_is_refused() {
        let (mut one, mut other) = duplex(4096);
        let token = token("the secret of all");
        let fake = async {
            let mut buffer = [0; OPENING + PROOF];
            other.read_exact(&mut buffer[..OPENING]).await.unwrap();
            other.write_all(&opening(Side::Leader)).await.unwrap();
            other.read_exact(&mut buffer[OPENING..]).await.unwrap();
            // The follower's own proof, sent back.
            other.write_all(&[1]).await.unwrap();
            other.write_all(&buffer[OPENING..]).await.unwrap();
        };
        let (result, ()) = tokio::join!(authenticate(&mut one, Side::Follower, &token), fake);
        assert!(matches!(result, Err(AuthError::Token)), "{result:?}");
    }

    #[tokio::test]
    async fn garbage_is_refused_without_a_word() {
        for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f], b"DPSCPEEX"] {
            let (result, answer) = say(bytes).await;
            assert!(matches!(result, Err(AuthError::Garbage)), "{result:?}");
            assert!(answer.is_empty());
        }
    }

    #[tokio::test]
    async fn another_version_is_refused_and_told_ours() {
        let mut theirs = opening(Side::Follower);
        theirs[8..12].copy_from_slice(&7u32.to_be_bytes());
        let (result, answer) = say(&theirs).await;
        assert!(matches!(result, Err(AuthError::Version { theirs: 7 })), "{result:?}");
        assert_eq!(answer[..12], opening(Side::Leader)[..12]);
    }

    #[tokio::test]
    async fn a_link_for_weights_is_not_a_link_for_commands() {
        let secret = token("the secret of all");
        let (mut one, mut other) = duplex(4096);
        let (sender, receiver) = tokio::join!(
            authenticate(&mut one, Side::Sender, &secret),
            authenticate(&mut other, Side::Receiver, &secret)
        );
        sender.unwrap();
        receiver.unwrap();
        let (mut one, mut other) = duplex(4096);
        let (_, leader) = tokio::join!(
            authenticate(&mut one, Side::Sender, &secret),
            authenticate(&mut other, Side::Leader, &secret)
        );
        assert!(matches!(leader, Err(AuthError::Role)), "{leader:?}");
    }

    #[tokio::test]
    async fn a_recorded_proof_opens_no_second_link() {
        // The stranger repeats a whole exchange that it saw on the wire.
        let (mut follower, mut wire) = duplex(4096);
        let (mut to_leader, mut leader) = duplex(4096);
        let secret = token("the secret of all");
        let tap = async {
            let mut said = vec![0; OPENING];
            wire.read_exact(&mut said).await.unwrap();
            to_leader.write_all(&said).await.unwrap();
            let mut answer = [0; OPENING];
            to_leader.read_exact(&mut answer).await.unwrap();
            wire.write_all(&answer).await.unwrap();
            let mut proof = [0; PROOF];
            wire.read_exact(&mut proof).await.unwrap();
            to_leader.write_all(&proof).await.unwrap();
            let mut last = [0; 1 + PROOF];
            to_leader.read_exact(&mut last).await.unwrap();
            wire.write_all(&last).await.unwrap();
            said.extend(proof);
            said
        };
        let (one, other, recorded) = tokio::join!(
            authenticate(&mut follower, Side::Follower, &secret),
            authenticate(&mut leader, Side::Leader, &secret),
            tap
        );
        one.unwrap();
        other.unwrap();
        let (result, answer) = say(&recorded).await;
        assert!(matches!(result, Err(AuthError::Token)), "{result:?}");
        assert_eq!(answer.len(), OPENING + 1, "no proof of the leader");
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_is_not_waited_for() {
        let (_stranger, mut leader) = duplex(4096);
        let result = authenticate(&mut leader, Side::Leader, &token("the secret of all")).await;
        assert!(matches!(result, Err(AuthError::Slow)), "{result:?}");
    }
}
