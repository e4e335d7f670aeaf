//! The sockets. Nothing else in the sidecar names a ZMQ library.
//!
//! Four kinds:
//!
//! * **Listening sockets** ([`RouterListener`], [`PullListener`]) serve the engines
//!   of this node over `ipc://` in a [`PrivateDir`] or over loopback. They wrap the `zeromq` crate and
//!   keep the rules that make it safe: a fresh set per engine incarnation, one peer per socket,
//!   bounded work in flight (so its queue of 100,000 messages never fills), `send` never cancelled.
//! * The DP coordinator's **publishing socket** ([`XpubListener`]) is of our own: waking all engines of a node is
//!   one write to each connection ([`XpubPublisher::send`]), by the task that publishes.
//! * **Connecting sockets** ([`Connected`]: DEALER, PUSH and XSUB) go to frontends, which may be on other
//!   hosts and may be stopped, slow or hostile. There the rules cannot be kept with that crate: it
//!   queues up to 100,000 messages of any size in front of a peer that does not read, aborts the
//!   process on a declared frame length of 2^62, notices a lost PULL only at the next write, and
//!   retries on its own. They are a small ZMTP 3.0 client of our own ([`zmtp`]): `send` returns when
//!   the kernel has the bytes, sizes are limited, and a lost peer is noticed at once.
//! * The **handshake socket** ([`GuardedRouter`]) is the one TCP port that anybody on the node can
//!   reach. It uses the same codec with tight limits, and names connections instead of identities.
//!
//! `recv` is cancel-safe on all of them. After the last socket is dropped keep the runtime alive for
//! [`linger`]: the crate's writer tasks still have bytes to hand over.

mod connect;
mod error;
mod greet;
mod guard;
mod listen;
mod paths;
mod peer;
mod xpub;
pub mod zmtp;

use std::time::Duration;

pub use connect::Connected;
pub use error::TransportError;
pub use guard::{GuardEvent, GuardLimits, GuardedRouter, GuardedSender};
pub use listen::{PullEvent, PullListener, RouterEvent, RouterListener, RouterSender};
pub use paths::{PrivateDir, check_socket_path, unlink_stale_socket};
pub use peer::{PeerReceiver, PeerSender, Received};
pub use xpub::{Encoded, XpubListener, XpubPublisher};

/// How long the runtime has to live after the last socket is dropped, so that what was sent gets
/// out (measured with the crate: without it a single last message arrives in 6 of 20 runs).
pub const LINGER: Duration = Duration::from_millis(150);

/// Waits for [`LINGER`]. Call it once, after all sockets are dropped and before the runtime ends.
pub async fn linger() {
    tokio::time::sleep(LINGER).await;
}
