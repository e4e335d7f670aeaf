//! The pure state machines.
//!
//! Every machine has the same four methods and is driven the same way:
//!
//! 1. `handle_event(now, event)` for each thing that happened, `handle_timeout(now)` when
//!    `poll_timeout` is due (calling it early is harmless);
//! 2. then `poll_action()` until it returns `None`, and the driver performs each action;
//! 3. then `poll_timeout()` for the time of the next `handle_timeout`.
//!
//! `snapshot()` is plain data for status and metrics. A machine changes its state only on what a
//! peer reported, never on what its own message is expected to cause; it never fails on a peer's
//! input: what is wrong with it comes out as an action.

pub mod attachment;
pub mod control;
pub mod coordinator;
pub mod handshake;
pub mod held_call;
pub mod lifecycle;
pub mod memory;
#[cfg_attr(not(feature = "mutations"), allow(dead_code, reason = "only tests switch them on"))]
#[doc(hidden)]
pub mod mutation;
pub mod policy;
pub mod restart;
pub mod virtual_engine;
pub mod weight_update;
