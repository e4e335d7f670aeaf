use tokio::time::Instant;

use super::super::test_ranks::{FakeRank, held};
use super::*;

struct World {
    ranks: Vec<FakeRank>,
    calls: mpsc::Sender<HeldCall>,
    control: ControlHandle,
    tracker: TaskTracker,
    stop: CancellationToken,
}

fn world(kind: GroupKind) -> World {
    let ranks: Vec<FakeRank> = (0..2).map(|rank| FakeRank::start(rank, "/start")).collect();
    let handles = ranks.iter().map(|rank| rank.handle.clone()).collect();
    let (calls, held) = mpsc::channel(16);
    let tracker = TaskTracker::new();
    let stop = CancellationToken::new();
    let control = spawn(kind, handles, held, &tracker, stop.clone());
    World { ranks, calls, control, tracker, stop }
}

impl World {
    async fn call_all(&self, ticket: u64, method: &str) {
        for rank in [0, 1] {
            self.calls.send(held(rank, ticket, method)).await.unwrap();
        }
    }

    async fn both_logged(&self, entry: &str) {
        for rank in &self.ranks {
            rank.logged(entry).await;
        }
    }

    async fn until(&self, holds: impl Fn(&Snapshot) -> bool) {
        let mut snapshot = self.control.snapshot.clone();
        let wait = snapshot.wait_for(|snapshot| holds(snapshot));
        tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap().unwrap();
    }

    async fn end(self) {
        self.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(Duration::from_secs(5), self.tracker.wait()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_round_is_forwarded_on_all_ranks_and_remembered() {
    let world = world(GroupKind::Lockstep);
    world.call_all(1, "pause_scheduler").await;
    world.both_logged("forward 1").await;
    world.until(|state| state.paused_by.is_some()).await;
    world.call_all(2, "resume_scheduler").await;
    world.both_logged("forward 2").await;
    world.until(|state| state.paused_by.is_none()).await;
    world.call_all(3, "resume_scheduler").await;
    world.both_logged("answer 3 nil").await;
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_call_for_one_rank_only_is_refused_in_time() {
    let world = world(GroupKind::Lockstep);
    world.calls.send(held(1, 4, "sleep")).await.unwrap();
    let text = "refuse 4 refused by the sidecar: sleep of frontend 1 came in for rank 1 only, not for rank 0 within 5s";
    world.ranks[1].logged(text).await;
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_guard_keeps_everybody_out_until_it_is_dropped() {
    let world = world(GroupKind::Independent);
    let guard = world.control.acquire("update u1", Duration::ZERO).await.unwrap();
    guard.doing("loading");
    world.until(|state| state.holder.as_deref() == Some("update u1 (loading)")).await;
    world.call_all(1, "pause_scheduler").await;
    world.both_logged("refuse 1 refused by the sidecar: update u1 (loading) is running").await;
    let error = world.control.acquire("update u2", Duration::from_millis(10)).await.unwrap_err();
    assert_eq!(error.to_string(), "engines are controlled by update u1 (loading)");
    drop(guard);
    let guard = world.control.acquire("update u3", Duration::from_secs(1)).await.unwrap();
    assert_eq!(guard.grant.paused_by, None);
    drop(guard);
    world.until(|state| state.holder.is_none()).await;
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_operator_pauses_all_ranks_and_only_the_operator_resumes() {
    let world = world(GroupKind::Lockstep);
    let (control, long) = (&world.control, Duration::from_secs(10));
    control.pause(PauseMode::Abort, long, long).await.unwrap();
    assert_eq!(control.snapshot.borrow().paused_by, Some(PausedBy::Operator));
    for rank in &world.ranks {
        assert!(rank.engine.lock().paused);
    }
    world.call_all(1, "resume_scheduler").await;
    world
        .both_logged(
            "refuse 1 refused by the sidecar: the engines were paused by the operator, who must resume them",
        )
        .await;
    control.resume(long).await.unwrap();
    control.resume(long).await.unwrap();
    for rank in &world.ranks {
        let log = rank.take_log();
        let resumes = log.iter().filter(|line| *line == "resume").count();
        assert_eq!(resumes, 1, "{log:?}");
    }
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_operators_wait_ends_in_abort_when_the_deadline_is_over() {
    let world = world(GroupKind::Lockstep);
    for rank in &world.ranks {
        rank.engine.lock().wait_needs_abort = true;
    }
    let (deadline, patience) = (Duration::from_secs(3), Duration::ZERO);
    let before = Instant::now();
    world.control.pause(PauseMode::Wait, deadline, patience).await.unwrap();
    assert!(before.elapsed() >= deadline && before.elapsed() < deadline * 2);
    for rank in &world.ranks {
        assert_eq!(rank.take_log(), ["pause wait false", "pause abort false"]);
    }
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_lockstep_group_that_is_not_complete_is_not_paused() {
    let world = world(GroupKind::Lockstep);
    world.ranks[1].lose();
    let error =
        world.control.pause(PauseMode::Abort, Duration::from_secs(1), Duration::ZERO).await.unwrap_err();
    assert_eq!(error.to_string(), "engine of rank 1 is not serving");
    assert_eq!(world.ranks[0].take_log(), [""; 0]);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_pause_of_a_dead_frontend_is_lifted_after_the_grace() {
    let world = world(GroupKind::Lockstep);
    world.call_all(1, "pause_scheduler").await;
    world.until(|state| state.paused_by.is_some()).await;
    let before = Instant::now();
    world.control.frontend_gone(FrontendId(1)).await;
    world.both_logged("resume").await;
    assert!(before.elapsed() >= Duration::from_secs(30));
    world.until(|state| state.paused_by.is_none()).await;
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_starts_again_into_a_pause_is_paused() {
    let world = world(GroupKind::Independent);
    world.call_all(1, "pause_scheduler").await;
    world.until(|state| state.paused_by.is_some()).await;
    world.ranks[1].lose();
    world.ranks[1].restart();
    world.ranks[1].admit();
    world.ranks[1].logged("pause keep false").await;
    assert_eq!(world.ranks[0].take_log(), ["forward 1"]);
    world.end().await;
}
