//! One driver per machine: sockets and timers in, actions out. Drivers talk to each other only
//! through the handles in [`handles`].

pub mod attachment;
pub mod control;
pub mod coordinator;
pub mod edge;
pub(crate) mod engine_calls;
pub mod frontend;
pub mod handles;
pub mod handshake;
mod init;
pub mod node;
pub mod processes;
pub mod rank;
#[cfg(test)]
pub(crate) mod test_ranks;
pub mod weight_update;

use std::pin::Pin;

use dp_sidecar_protocol::Time;
use tokio::time::{Instant, Sleep};

/// Time as a machine sees it: since its driver was started.
#[derive(Clone, Copy, Debug)]
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn now(self) -> Time {
        Time::from_start(self.0.elapsed())
    }

    /// When it is that time.
    fn at(self, time: Time) -> Instant {
        self.0 + time.since_start()
    }

    /// Sleeps until a machine's next deadline; for ever when it has none.
    async fn reach(self, due: Option<Time>) {
        match due {
            Some(due) => tokio::time::sleep_until(self.at(due)).await,
            None => std::future::pending().await,
        }
    }
}

/// Sets the timer if there is something to wait for. Leaves it alone if it is right already.
fn arm(timer: Pin<&mut Sleep>, due: Option<Instant>) -> bool {
    if let Some(due) = due
        && timer.deadline() != due
    {
        timer.reset(due);
    }
    due.is_some()
}

/// Sets what is published. Whether it was something else.
fn replace_if_other<T: PartialEq>(published: &mut T, now: T) -> bool {
    let changed = *published != now;
    *published = now;
    changed
}
