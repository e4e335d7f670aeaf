//! Pauses of frontends that are not there any more.

use std::collections::BTreeSet;
use std::time::Duration;

use dp_sidecar_protocol::{FrontendId, PausedBy};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::driver::control::ControlHandle;
use crate::driver::handles::AttachmentHandle;
use crate::tasks::{Task, named};

/// For a frontend that held a pause before a restart to show up again.
const HOLDER_GRACE: Duration = Duration::from_secs(30);

/// Tells the control task which attachments have ended: a pause they hold becomes a lease. So does one that an earlier
/// sidecar has left behind, when the frontend that asked for it does not show up.
pub(super) fn frontends_gone(
    attachments: &AttachmentHandle,
    control: &ControlHandle,
    tracker: &TaskTracker,
    stop: CancellationToken,
) {
    let (mut snapshots, mut state) = (attachments.snapshot.clone(), control.snapshot.clone());
    let control = control.clone();
    tracker.spawn(named(
        Task::PauseWatch,
        stop.run_until_cancelled_owned(async move {
            let mut known: BTreeSet<u64> = BTreeSet::new();
            // Who holds a pause and is not there, since when, and was that told?
            let mut absent: Option<(u64, Instant, bool)> = None;
            loop {
                let due = absent.filter(|(.., told)| !told).map(|(_, since, _)| since + HOLDER_GRACE);
                let late = sleep_until(due.unwrap_or_else(Instant::now));
                let mut gone = BTreeSet::new();
                tokio::select! {
                    changed = snapshots.changed() => if changed.is_err() { return },
                    changed = state.changed() => if changed.is_err() { return },
                    () = late, if due.is_some() => gone.extend(absent.map(|(id, ..)| id)),
                }
                let now: BTreeSet<u64> = snapshots.borrow_and_update().iter().filter_map(|f| f.id).collect();
                gone.extend(known.difference(&now));
                known = now;
                let holder = match &state.borrow_and_update().paused_by {
                    Some(PausedBy::Frontend { id }) if !known.contains(&id.0) => Some(id.0),
                    _ => None,
                };
                absent = holder.map(|id| match absent {
                    Some((before, since, told)) if before == id => (id, since, told || gone.contains(&id)),
                    _ => (id, Instant::now(), gone.contains(&id)),
                });
                for id in gone {
                    control.frontend_gone(FrontendId(id)).await;
                }
            }
        }),
    ));
}

#[cfg(test)]
mod tests {
    use tokio::sync::{mpsc, watch};

    use super::*;
    use crate::api::FrontendSnapshot;
    use crate::driver::control;
    use crate::driver::handles::GroupKind;
    use crate::driver::test_ranks::FakeRank;

    /// Whether the engines are resumed in the end, and after how long, when an earlier sidecar left them paused by
    /// frontend 7, and these show up.
    async fn resumed_after(attached: &[u64], leave: bool) -> Option<Duration> {
        let ranks: Vec<FakeRank> = (0..2).map(|rank| FakeRank::start(rank, "/model")).collect();
        let (_calls, held) = mpsc::channel(4);
        let (commands, _) = mpsc::channel(4);
        let (snapshots, snapshot) = watch::channel(Vec::new());
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let handles = ranks.iter().map(|rank| rank.handle.clone()).collect();
        let control = control::spawn(GroupKind::Lockstep, handles, held, &tracker, stop.clone());
        frontends_gone(&AttachmentHandle { commands, snapshot }, &control, &tracker, stop.clone());
        for rank in &ranks {
            rank.engine.lock().paused = true;
        }
        let guard = control.acquire("recovery", Duration::from_secs(1)).await.unwrap();
        guard.set_paused(Some(PausedBy::Frontend { id: FrontendId(7) })).await;
        guard.release().await;
        let show = |id: &u64| FrontendSnapshot { id: Some(*id), ..FrontendSnapshot::default() };
        snapshots.send_replace(attached.iter().map(show).collect());
        let began = Instant::now();
        if leave {
            tokio::time::sleep(Duration::from_secs(100)).await;
            snapshots.send_replace(Vec::new());
        }
        let mut state = control.snapshot.clone();
        let resumed = state.wait_for(|state| state.paused_by.is_none());
        let resumed = tokio::time::timeout(Duration::from_secs(1000), resumed).await.is_ok();
        assert!(ranks.iter().all(|rank| rank.engine.lock().paused != resumed));
        let after = began.elapsed();
        stop.cancel();
        tracker.close();
        tracker.wait().await;
        resumed.then_some(after)
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_from_before_a_restart_holds_as_long_as_its_frontend_is_there() {
        assert_eq!(resumed_after(&[1, 7], false).await, None);
        let after = resumed_after(&[7], true).await.unwrap();
        assert!(after > Duration::from_secs(100) && after < Duration::from_secs(140), "{after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_from_before_a_restart_ends_when_its_frontend_does_not_come_back() {
        let after = resumed_after(&[1], false).await.unwrap();
        assert!(after > Duration::from_secs(55) && after < Duration::from_secs(70), "{after:?}");
    }
}
