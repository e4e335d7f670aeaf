//! The follower's way to its leader.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use super::auth::{self, AuthError, Side};
use super::epoch::Epoch;
use super::frame;
use super::hello::{LeaderAnswer, NodeHello};
use super::leader::{WORD_PERIOD, resolve};
use super::registry::missing_text;
use super::stream::set_options;
use crate::exit_code;
use crate::log_limit::LogLimit;
use crate::token::Token;

/// Limit for a connection to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Pauses between attempts grow from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// The same trouble is logged again after this long.
const REPEAT: Duration = Duration::from_secs(30);
/// Kinds of trouble that are told apart in that time.
const TROUBLES: usize = 16;
/// A leader that says nothing for this long is gone.
const SILENCE: Duration = Duration::from_secs(4 * WORD_PERIOD.as_secs());
/// Ranks that are held by another node are asked for again, for this long: its connection may be dead.
const HELD: Duration = Duration::from_secs(10);

/// State of the way to the leader, for status.
#[derive(Clone, Debug)]
pub struct LeaderView {
    pub state: String,
    pub up: bool,
    /// Since when it is up, or down.
    pub since: Instant,
}

impl Default for LeaderView {
    fn default() -> Self {
        Self { state: "not connected yet".to_owned(), up: false, since: Instant::now() }
    }
}

/// An open link.
#[derive(Debug)]
pub struct Found {
    /// It carries the link from here on; the leader asks.
    pub stream: TcpStream,
    /// This node's address that the leader sees.
    pub own: IpAddr,
}

/// There is no way to the leader.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FindError {
    /// The leader was not there in time; with the last trouble.
    #[error("no leader at {leader} within {limit:?}: {reason}")]
    Away { leader: String, limit: Duration, reason: String },
    /// The leader does not let this node in.
    #[error("refused by the leader at {leader}: {reason}")]
    Refused { leader: String, reason: String },
    /// The deployment ends: all nodes do, with this exit code.
    #[error("the leader at {leader}: {reason}")]
    Over { leader: String, code: u8, reason: String },
}

impl FindError {
    /// The code with which the sidecar ends.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Away { .. } => exit_code::TIMEOUT,
            Self::Refused { .. } => exit_code::MISMATCH,
            Self::Over { code, .. } => *code,
        }
    }
}

/// One attempt failed.
enum Trouble {
    /// Try again.
    Again(String),
    /// Try again for a while.
    Held(String),
    /// It makes no sense to try again.
    Refused(String),
    Over(u8, String),
}

/// Looks for a leader.
#[derive(Debug)]
pub struct Finder {
    /// `host:port`.
    pub leader: String,
    /// The shared secret.
    pub token: Token,
    /// What the leader is told, but for the epoch.
    pub hello: NodeHello,
    /// The newest leader so far.
    pub epoch: Arc<Epoch>,
    /// Refusals end the search. Not so when engines run already: somebody may set the leader right.
    pub strict: bool,
    /// For status.
    pub view: watch::Sender<LeaderView>,
}

impl Finder {
    /// Connects, and waits until the leader has all nodes; tries again for `limit`.
    ///
    /// # Errors
    /// [`FindError`].
    pub async fn find(&self, limit: Duration) -> Result<Found, FindError> {
        let began = Instant::now();
        let mut pause = BACKOFF.0;
        let mut last = String::from("not tried");
        let mut logged = LogLimit::new(REPEAT, TROUBLES);
        let mut held_since: Option<Instant> = None;
        let leader = self.leader.clone();
        loop {
            let left = limit.saturating_sub(began.elapsed());
            let attempt = timeout(left, self.attempt()).await;
            let Ok(attempt) = attempt else {
                let view = self.view.borrow().state.clone();
                let reason = if view.is_empty() { last } else { view };
                return Err(FindError::Away { leader, limit, reason });
            };
            let reason = match attempt {
                Ok(found) => {
                    self.tell("connected", true);
                    return Ok(found);
                }
                Err(Trouble::Over(code, reason)) if self.strict => {
                    return Err(FindError::Over { leader, code, reason });
                }
                Err(Trouble::Refused(reason)) if self.strict => {
                    return Err(FindError::Refused { leader, reason });
                }
                Err(Trouble::Held(reason)) => {
                    let since = *held_since.get_or_insert_with(Instant::now);
                    if self.strict && since.elapsed() >= HELD {
                        return Err(FindError::Refused { leader, reason });
                    }
                    reason
                }
                Err(Trouble::Again(reason) | Trouble::Refused(reason) | Trouble::Over(_, reason)) => reason,
            };
            self.tell(&reason, false);
            if logged.admit(reason.clone()).is_some() {
                info!("waiting for the leader at {}: {reason}", self.leader);
            }
            last = reason;
            if began.elapsed() + pause >= limit {
                return Err(FindError::Away { leader, limit, reason: last });
            }
            sleep(pause).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    fn tell(&self, state: &str, up: bool) {
        self.view.send_if_modified(|view| {
            let modified = view.state != state || view.up != up;
            if view.up != up {
                view.since = Instant::now();
            }
            view.up = up;
            state.clone_into(&mut view.state);
            modified
        });
    }

    async fn attempt(&self) -> Result<Found, Trouble> {
        let address = resolve(&self.leader).await.map_err(Trouble::Again)?;
        let mut stream = match timeout(CONNECT_LIMIT, TcpStream::connect(address)).await {
            Ok(connected) => connected.map_err(|error| Trouble::Again(error.to_string()))?,
            Err(_) => {
                return Err(Trouble::Again(format!("{address} does not answer within {CONNECT_LIMIT:?}")));
            }
        };
        let again = |error: std::io::Error| Trouble::Again(error.to_string());
        set_options(&stream).map_err(again)?;
        let own = stream.local_addr().map_err(again)?.ip();
        auth::authenticate(&mut stream, Side::Follower, &self.token).await.map_err(|error| match error {
            AuthError::Slow | AuthError::Io(_) => Trouble::Again(error.to_string()),
            error => Trouble::Refused(error.to_string()),
        })?;
        let hello = NodeHello { epoch: self.epoch.newest(), ..self.hello.clone() };
        frame::write(&mut stream, &hello, auth::LIMIT).await.map_err(again)?;
        let found = self.wait_for_welcome(stream, own).await?;
        info!(leader = %self.leader, peer = %address, "connected to the leader");
        Ok(found)
    }

    async fn wait_for_welcome(&self, mut stream: TcpStream, own: IpAddr) -> Result<Found, Trouble> {
        let mut known = String::new();
        loop {
            let answer: LeaderAnswer = frame::read(&mut stream, SILENCE).await.map_err(|error| {
                Trouble::Again(format!("connection lost while others were missing: {error}"))
            })?;
            match answer {
                LeaderAnswer::Waiting { missing } => {
                    let doing = match missing_text(&missing) {
                        missing if missing.is_empty() => "starts".to_owned(),
                        missing => format!("waits for {missing}"),
                    };
                    if doing != known {
                        info!("the leader at {} {doing}", self.leader);
                        self.tell(&format!("connected; the leader {doing}"), false);
                        known = doing;
                    }
                }
                LeaderAnswer::Welcome { epoch } => {
                    let newest = self.epoch.clone();
                    let written = tokio::task::spawn_blocking(move || newest.follow(epoch)).await;
                    let written = written.unwrap_or_else(|error| Err(std::io::Error::other(error)));
                    written
                        .map_err(|error| Trouble::Again(format!("cannot remember the leader: {error}")))?;
                    return Ok(Found { stream, own: self.hello.address.unwrap_or(own) });
                }
                LeaderAnswer::Refused { reason, retry: true } => return Err(Trouble::Held(reason)),
                LeaderAnswer::Refused { reason, retry: false } => return Err(Trouble::Refused(reason)),
                LeaderAnswer::Over { code, reason } => {
                    debug!(code, %reason, "the leader gives up");
                    return Err(Trouble::Over(code, reason));
                }
            }
        }
    }
}
