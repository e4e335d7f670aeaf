//! Work that is lost: it panics, and what waits for it ends as the machine says.

use parking_lot::Mutex;

use super::nodes::nodes;
use super::*;

/// Names of the actions whose work is to panic, each once.
pub(crate) type Faults = Arc<Mutex<Vec<&'static str>>>;

thread_local! {
    static FAULTS: Faults = Faults::default();
}

/// Of the update tasks of this test.
pub(crate) fn faults() -> Faults {
    FAULTS.with(Faults::clone)
}

/// The work, or a panic in its place.
pub(crate) fn faulty<F: Future>(
    faults: &Faults,
    action: &Action,
    work: F,
) -> impl Future<Output = F::Output> + use<F> {
    let text = match action {
        Action::Step { action, .. } => format!("{action:?}"),
        action => format!("{action:?}"),
    };
    let name = text.split([' ', '(']).next().unwrap_or_default();
    let mut faults = faults.lock();
    let at = faults.iter().position(|fault| *fault == name);
    let lost = at.map(|at| faults.remove(at)).is_some();
    async move {
        assert!(!lost, "lost on purpose");
        work.await
    }
}

/// An update during which work is lost, and another one after it.
async fn lose(kind: GroupKind, lost: &[&'static str]) -> (UpdateRecord, Vec<FenceRequest>) {
    let mut world = world(kind).await;
    world.update(world.request("u1")).await;
    checkpoint(world.dir.path(), "newer", 2);
    let newer = |id: &str| UpdateRequest {
        path: Some(world.path("newer").into()),
        version: Some(WeightVersion("v2".to_owned())),
        ..world.request(id)
    };
    let (u2, u3) = (newer("u2"), newer("u3"));
    faults().lock().extend(lost);
    let record = world.update(u2).await;
    assert_eq!(faults().lock()[..], [""; 0], "{lost:?}");
    let mut fences = Vec::new();
    while let Ok(Some(fence)) = tokio::time::timeout(Duration::from_secs(1), world.fences.recv()).await {
        fences.push(fence);
    }
    // Fenced engines start again, as the node task would have it.
    for fence in &fences {
        world.ranks[usize::from(fence.rank.0)].restart();
    }
    let again: Vec<_> = fences.iter().map(|fence| world.life(usize::from(fence.rank.0))).collect();
    if !again.is_empty() {
        world.updates.restore(again).await.unwrap();
    }
    for fence in &fences {
        world.ranks[usize::from(fence.rank.0)].admit();
    }
    world.all_hold(if record.record.committed { "newer" } else { "new" });
    for rank in &world.ranks {
        assert!(
            rank.handle.snapshot.borrow().admission_open,
            "{lost:?}: rank {} is closed",
            rank.handle.rank
        );
    }
    let next = world.update(u3).await;
    assert_eq!(*next.outcome(), Outcome::Committed, "{lost:?}: {}", next.message);
    world.all_hold("newer");
    world.end().await;
    (record, fences)
}

#[tokio::test(start_paused = true)]
async fn an_update_whose_work_is_lost_ends_and_the_next_one_begins() {
    use Outcome::{Aborted, Committed, RefusedBusy, RefusedInvalid, RolledBack};
    let kinds = [GroupKind::Independent, GroupKind::Lockstep];
    for (lost, outcome) in [
        ("Acquire", RefusedBusy),
        ("Stage", RefusedInvalid),
        ("SaveLedger", Aborted),
        ("CloseGates", Aborted),
        ("Load", RolledBack),
        // These are done again.
        ("WriteCommit", Committed),
        ("SetVersion", Committed),
        ("ResetCaches", Committed),
        ("Conclude", Committed),
    ] {
        for kind in kinds {
            let (record, fences) = lose(kind, &[lost]).await;
            assert_eq!(*record.outcome(), outcome, "{lost}: {}", record.message);
            assert_eq!(fences, [], "{lost}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_engine_of_which_nobody_knows_what_it_was_told_starts_again() {
    for lost in ["Pause", "Resume"] {
        for (kind, ranks) in [(GroupKind::Independent, 1), (GroupKind::Lockstep, 2)] {
            let (record, fences) = lose(kind, &[lost]).await;
            assert!(matches!(record.outcome(), Outcome::Degraded { .. }), "{lost}: {}", record.message);
            assert_eq!(fences.len(), ranks, "{lost} {kind:?}");
        }
    }
    // A fence that is lost is done again.
    let (_, fences) = lose(GroupKind::Independent, &["Pause", "Fence"]).await;
    assert_eq!(fences.len(), 1);
    // Nobody knows whether it is committed, or whether the gates are open.
    let writes = ["WriteCommit"; 3];
    let (record, fences) = lose(GroupKind::Independent, &writes).await;
    assert!(!record.record.committed);
    assert_eq!(fences.len(), 2, "{}", record.message);
}

#[tokio::test(start_paused = true)]
async fn a_restore_whose_work_is_lost_is_answered_and_holds_up_nothing() {
    for lost in ["Inspect", "Restore"] {
        let world = world(GroupKind::Independent).await;
        world.update(world.request("u1")).await;
        world.ranks[1].restart();
        faults().lock().push(lost);
        let error = world.updates.restore(vec![world.life(1)]).await.unwrap_err();
        assert!(error.to_string().contains("its work was lost"), "{error}");
        let record = world.update(world.request("u2")).await;
        assert_eq!(*record.outcome(), Outcome::Committed, "{lost}: {}", record.message);
        world.updates.restore(vec![world.life(1)]).await.unwrap();
        world.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_adoption_whose_work_is_lost_is_answered_or_done_again() {
    for (lost, fails) in [("Inspect", true), ("TakeOver", true), ("OpenGates", false)] {
        let nodes = nodes(GroupKind::Lockstep).await.next_leader().await;
        faults().lock().push(lost);
        let adopted = nodes.adopt_all().await;
        assert_eq!(adopted.is_err(), fails, "{lost}: {adopted:?}");
        nodes.adopt_all().await.unwrap();
        let record = nodes.update(nodes.request("u1", "new")).await;
        assert_eq!(*record.outcome(), Outcome::Committed, "{lost}: {}", record.message);
        nodes.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn committed_weights_are_followed_or_forgotten_by_all_engines() {
    let world = world(GroupKind::Independent).await;
    world.update(world.request("u1")).await;
    let world = world.next_sidecar().await;
    world.updates.restore(vec![world.life(0)]).await.unwrap();
    std::fs::remove_dir_all(world.path("new")).unwrap();
    let script = LoadScript::Fails("unchanged", "files");
    world.engine(1).loads.push_back(script);
    world.updates.restore(vec![world.life(1)]).await.unwrap_err();
    assert_eq!(world.updates.snapshot.borrow().version.0, "v1");
    world.end().await;
}
