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

/// Sleeps until a machine's next deadline; for ever when it has none.
async fn sleep_until(due: Option<tokio::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}
