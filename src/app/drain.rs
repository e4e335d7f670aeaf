//! Draining: requests that run may end, new ones are held in front of the engines.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, info, trace, warn};

use crate::api::{AdminError, ErrorKind};
use crate::driver::control::{ControlGuard, ControlHandle};
use crate::driver::handles::{Admission, HandleError, RankHandle};
use crate::driver::rank::SNAPSHOT_LAG;
use crate::link::server::SNAPSHOT_INTERVAL;

/// Limit for all ranks to open or close their gate.
const GATE: Duration = Duration::from_secs(10);

/// Whether `sidecar drain` is in force. Its holder has the engines' control lock, so that no update opens the
/// gates meanwhile.
#[derive(Clone, Debug, Default)]
pub(crate) struct Drained(Arc<Mutex<Option<ControlGuard>>>);

impl Drained {
    /// Closes the gates of all ranks until [`Self::end`]. Repeating it changes nothing.
    pub(super) async fn begin(
        &self,
        control: &ControlHandle,
        ranks: &[RankHandle],
        patience: Duration,
    ) -> Result<(), AdminError> {
        if self.0.lock().is_some() {
            return Ok(());
        }
        let guard = control.acquire("sidecar drain", patience).await?;
        guard.doing("drained until `sidecar resume`");
        if let Err(error) = gates(ranks, false).await {
            if let Err(error) = gates(ranks, true).await {
                warn!(%error, "a gate stays closed");
            }
            guard.release().await;
            return Err(failed(&error));
        }
        settle().await;
        info!("drained: new requests are held until `sidecar resume`, or until the next sidecar takes over");
        *self.0.lock() = Some(guard);
        Ok(())
    }

    /// Opens the gates again. False if there was no drain, or if the engines are paused besides.
    pub(super) async fn end(&self, ranks: &[RankHandle]) -> Result<bool, AdminError> {
        let Some(guard) = self.0.lock().take() else {
            return Ok(false);
        };
        let paused = guard.grant.paused_by.is_some();
        if let Err(error) = gates(ranks, true).await {
            *self.0.lock() = Some(guard);
            return Err(failed(&error));
        }
        guard.release().await;
        info!("not drained any more");
        Ok(!paused)
    }
}

/// A rank does not answer.
fn failed(error: &HandleError) -> AdminError {
    AdminError::new(ErrorKind::Failed, error.to_string())
}

/// Waits until the ranks' numbers include what passed the gates just before they closed.
pub(super) async fn settle() {
    tokio::time::sleep((SNAPSHOT_LAG + SNAPSHOT_INTERVAL) * 2).await;
}

/// Holds new requests and lets those in flight finish within `limit`; then says what happens to the others.
pub(super) async fn finish_requests(ranks: &[RankHandle], limit: Duration, too_late: &str) {
    let until = Instant::now() + limit;
    if let Err(error) = gates(ranks, false).await {
        debug!(%error, "a gate stays open");
    }
    settle().await;
    if in_flight(ranks) > 0 && !limit.is_zero() {
        info!(in_flight = in_flight(ranks), ?limit, "waiting for requests in flight");
    }
    while in_flight(ranks) > 0 && Instant::now() < until {
        changed(ranks, until).await;
    }
    if in_flight(ranks) > 0 {
        warn!(in_flight = in_flight(ranks), "{too_late}");
    }
}

/// Requests of all frontends in flight.
fn in_flight(ranks: &[RankHandle]) -> u64 {
    ranks.iter().map(|rank| rank.snapshot.borrow().in_flight.values().sum::<u64>()).sum()
}

/// Waits until the requests in flight of some rank may have changed, at most until `until`.
async fn changed(ranks: &[RankHandle], until: Instant) {
    let mut receivers: Vec<_> = ranks.iter().map(|rank| rank.snapshot.clone()).collect();
    let any = receivers.iter_mut().map(|receiver| {
        receiver.mark_unchanged();
        Box::pin(receiver.changed())
    });
    let any = futures::future::select_all(any);
    // A change just before the receivers were marked is seen at the latest after this long.
    let soon = Instant::now() + Duration::from_millis(200);
    if timeout_at(until.min(soon), any).await.is_err() {
        trace!("no rank changed");
    }
}

/// Opens or closes the gates for new requests.
pub(super) async fn gates(ranks: &[RankHandle], open: bool) -> Result<(), HandleError> {
    let told = ranks.iter().map(|rank| rank.ask_within(GATE, Admission { open }));
    futures::future::join_all(told).await.into_iter().collect()
}
