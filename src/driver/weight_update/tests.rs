mod adapters;
pub(super) mod jobs;
mod nodes;
mod recovery;
mod stage;

use std::collections::VecDeque;
use std::path::Path;

use dp_sidecar_protocol::machine::weight_update::{Outcome, Phase, WorkerState};
use dp_sidecar_protocol::{FrontendId, PausedBy};

use super::super::control::{self, ControlConfig};
use super::super::handles::{GroupKind, HeldCall};
use super::super::test_ranks::{FakeRank, LoadScript, held};
use super::*;
use crate::manifest::tests::write;

const LIMIT: Duration = Duration::from_secs(3600);

struct World {
    dir: tempfile::TempDir,
    ranks: Vec<FakeRank>,
    updates: UpdateHandle,
    control: ControlHandle,
    calls: mpsc::Sender<HeldCall>,
    fences: mpsc::Receiver<FenceRequest>,
    tracker: TaskTracker,
    stop: CancellationToken,
    kind: GroupKind,
}

/// A checkpoint whose content depends on `seed`.
fn checkpoint(dir: &Path, name: &str, seed: u8) -> String {
    let path = dir.join(name);
    std::fs::create_dir_all(&path).unwrap();
    let tensors: [(&str, &str, &[usize], &[u8]); 2] =
        [("a", "U8", &[2], &[seed, 1]), ("b", "U8", &[1], &[seed])];
    write(&path, "model.safetensors", &tensors);
    path.to_str().unwrap().to_owned()
}

async fn world(kind: GroupKind) -> World {
    let dir = tempfile::tempdir_in(std::env::temp_dir().canonicalize().unwrap()).unwrap();
    let start = checkpoint(dir.path(), "start", 0);
    checkpoint(dir.path(), "new", 1);
    let ranks: Vec<FakeRank> = (0..2).map(|rank| FakeRank::start(rank, &start)).collect();
    let world = assemble(kind, dir, ranks);
    world.restore_all().await.unwrap();
    world
}

fn assemble(kind: GroupKind, dir: tempfile::TempDir, ranks: Vec<FakeRank>) -> World {
    let handles: Vec<RankHandle> = ranks.iter().map(|rank| rank.handle.clone()).collect();
    let (calls, held) = mpsc::channel(16);
    let (fences_to, fences) = mpsc::channel(16);
    let tracker = TaskTracker::new();
    let stop = CancellationToken::new();
    let control = control::spawn(&ControlConfig::new(kind), handles.clone(), held, &tracker, stop.clone());
    let config = UpdateConfig::new(kind, dir.path());
    let updates = spawn(config, handles, Vec::new(), control.clone(), fences_to, &tracker, stop.clone());
    World { dir, ranks, updates: updates.unwrap(), control, calls, fences, tracker, stop, kind }
}

impl World {
    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn request(&self, id: &str) -> UpdateRequest {
        UpdateRequest {
            id: Some(UpdateId(id.to_owned())),
            version: Some(WeightVersion("v1".to_owned())),
            ..UpdateRequest::new(self.path("new"))
        }
    }

    fn life(&self, rank: usize) -> (EngineIndex, Incarnation) {
        let handle = &self.ranks[rank].handle;
        (handle.rank, handle.snapshot.borrow().incarnation)
    }

    async fn restore_all(&self) -> Result<(), UpdateError> {
        let ranks = vec![self.life(0), self.life(1)];
        tokio::time::timeout(LIMIT, self.updates.restore(ranks)).await.unwrap()
    }

    async fn update(&self, request: UpdateRequest) -> UpdateRecord {
        let run = self.updates.start(request).await.unwrap();
        tokio::time::timeout(LIMIT, run.record()).await.unwrap().unwrap()
    }

    fn engine(&self, rank: usize) -> parking_lot::MutexGuard<'_, super::super::test_ranks::Engine> {
        self.ranks[rank].engine.lock()
    }

    fn all_hold(&self, name: &str) {
        for rank in 0..2 {
            assert_eq!(self.engine(rank).weights, self.path(name), "rank {rank}");
            assert!(!self.engine(rank).paused, "rank {rank} left paused");
        }
    }

    /// Another sidecar on the same state directory, whose engines start from the command line.
    async fn next_sidecar(self) -> Self {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
        let model = self.engine(0).model_path.clone();
        let ranks = (0..2).map(|rank| FakeRank::start(rank, &model)).collect();
        assemble(self.kind, self.dir, ranks)
    }

    async fn end(self) {
        self.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(Duration::from_secs(5), self.tracker.wait()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_update_reaches_all_engines_in_order_and_is_remembered() {
    let world = world(GroupKind::Lockstep).await;
    let mut run = world.updates.start(world.request("u1")).await.unwrap();
    let (mut phases, mut hashed) = (Vec::new(), None);
    while let Some(event) = run.events.recv().await {
        match event {
            UpdateEvent::Progress { phase, .. } => {
                if phases.last() != Some(&phase) {
                    phases.push(phase);
                }
            }
            UpdateEvent::Hashing { done, total } => hashed = Some((done, total)),
            UpdateEvent::Staging { .. } => panic!("no node has a staging area"),
        }
    }
    let record = run.record().await.unwrap();
    assert_eq!(*record.outcome(), Outcome::Committed, "{record:?}");
    assert_eq!(hashed, Some((3, 3)));
    for phase in [Phase::Staging, Phase::Pausing, Phase::Loading, Phase::Committing, Phase::Resuming] {
        assert!(phases.contains(&phase), "{phase} is not in {phases:?}");
    }
    world.all_hold("new");
    for rank in &world.ranks {
        assert_eq!(
            rank.take_log(),
            [
                "admission false".to_owned(),
                "pause wait false".to_owned(),
                format!("load {}", world.path("new")),
                "version v1".to_owned(),
                "reset false true".to_owned(),
                "resume".to_owned(),
                "admission true".to_owned(),
            ]
        );
    }
    assert_eq!(record.record.ranks[&EngineIndex(1)].workers[0].tensors, 2);
    let status = world.updates.status();
    assert_eq!((status.version.0.as_str(), status.running), ("v1", None));
    let held: Vec<&str> = status.held.values().map(|held| held.0.as_str()).collect();
    assert_eq!(held, ["v1", "v1"]);
    assert_eq!(status.last, Some(record));
    assert!(world.dir.path().join("committed.json").is_file());
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_bad_directory_is_refused_and_no_engine_hears_of_it() {
    let world = world(GroupKind::Independent).await;
    let bad = world.dir.path().join("bad");
    std::fs::create_dir(&bad).unwrap();
    write(&bad, "model.safetensors", &[("a", "U8", &[3], &[1, 2, 3])]);
    let mut request = world.request("u1");
    request.path = Some(bad);
    let record = world.update(request).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.contains("a has shape [3], expected [2]; missing b"), "{}", record.message);
    for rank in &world.ranks {
        assert_eq!(rank.take_log(), [""; 0]);
    }
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_load_that_fails_on_one_rank_leaves_all_at_the_previous_weights() {
    for (script, why) in [
        (LoadScript::Fails("restored-meta", "injected"), "load failed (injected): injected"),
        (LoadScript::Lies, "digest of the consumed tensors is 0123"),
        (LoadScript::Raises, "boom"),
    ] {
        let world = world(GroupKind::Lockstep).await;
        world.engine(1).loads.push_back(script);
        let record = world.update(world.request("u1")).await;
        assert_eq!(*record.outcome(), Outcome::RolledBack);
        assert!(record.message.contains("rank 1: "), "{}", record.message);
        assert!(record.message.contains(why), "{}", record.message);
        world.all_hold("start");
        assert_eq!(world.updates.status().version.0, "default");
        assert!(!world.dir.path().join("committed.json").exists());
        // It can be tried again, under the same name.
        let record = world.update(world.request("u1")).await;
        assert_eq!(*record.outcome(), Outcome::Committed);
        world.all_hold("new");
        world.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_rank_that_finds_the_files_missing_is_left_alone() {
    let world = world(GroupKind::Independent).await;
    for rank in 0..2 {
        let script = LoadScript::Fails("unchanged", "files");
        world.engine(rank).loads.push_back(script);
    }
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RolledBack);
    let report = &record.record.ranks[&EngineIndex(0)].workers[0];
    assert_eq!(report.state, WorkerState::Unchanged);
    let loads = |log: Vec<String>| log.iter().filter(|line| line.starts_with("load")).count();
    assert_eq!(loads(world.ranks[0].take_log()), 1);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_rank_that_can_go_neither_way_is_fenced_and_the_others_serve() {
    let mut world = world(GroupKind::Independent).await;
    for _ in 0..2 {
        let script = LoadScript::Fails("mixed", "load");
        world.engine(1).loads.push_back(script);
    }
    let record = world.update(world.request("u1")).await;
    let fenced = vec![EngineIndex(1)];
    assert_eq!(*record.outcome(), Outcome::Degraded { fenced });
    let request = world.fences.recv().await.unwrap();
    assert_eq!((request.rank, request.incarnation), (EngineIndex(1), Incarnation(1)));
    let log = world.ranks[1].take_log();
    assert!(log.iter().any(|line| line.starts_with("down fenced: rollback failed")), "{log:?}");
    assert!(!log.contains(&"resume".to_owned()), "{log:?}");
    assert_eq!(world.engine(0).weights, world.path("start"));
    assert!(!world.engine(0).paused);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn without_the_shim_an_update_is_refused_and_says_what_to_install() {
    let world = world(GroupKind::Independent).await;
    world.ranks[1].restart();
    world.engine(1).shim_protocol = None;
    world.updates.restore(vec![world.life(1)]).await.unwrap();
    world.ranks[1].admit();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(
        record.message.contains("rank 1: the shim is not in the engine's Python environment: install it there (pip install dp-sidecar-shim)"),
        "{}",
        record.message
    );
    world.engine(1).shim_protocol = Some(1);
    let record = world.update(world.request("u2")).await;
    assert!(record.message.contains("speaks protocol 1, expected 3"), "{}", record.message);
    assert_eq!(world.ranks[0].take_log(), [""; 0]);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_still_runs_at_the_pause_deadline_is_aborted_on_all_ranks() {
    let world = world(GroupKind::Lockstep).await;
    world.engine(0).wait_needs_abort = true;
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    assert!(record.record.pause_escalated);
    assert!(record.record.paused_ms.unwrap() >= 30_000);
    for rank in &world.ranks {
        assert_eq!(rank.take_log()[1..3], ["pause wait false", "pause abort false"]);
    }
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn there_is_one_controller_at_a_time() {
    let world = world(GroupKind::Lockstep).await;
    world.engine(0).wait_needs_abort = true;
    let run = world.updates.start(world.request("u1")).await.unwrap();
    world.ranks[0].logged("pause wait false").await;
    let second = world.update(world.request("u2")).await;
    assert_eq!(*second.outcome(), Outcome::RefusedBusy);
    assert!(second.message.contains("update u1 is running (pausing)"), "{}", second.message);
    for rank in [0, 1] {
        world.calls.send(held(rank, 7, "resume_scheduler")).await.unwrap();
    }
    let refused = "refuse 7 refused by the sidecar: update u1 (pausing) is running";
    world.ranks[0].logged(refused).await;
    world.ranks[1].logged(refused).await;
    let operator = world.control.resume(Duration::ZERO).await.unwrap_err();
    assert_eq!(operator.to_string(), "engines are controlled by update u1 (pausing)");
    assert_eq!(*run.record().await.unwrap().outcome(), Outcome::Committed);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_update_waits_for_the_operator_and_then_is_refused() {
    let world = world(GroupKind::Independent).await;
    let guard = world.control.acquire("operator pause", Duration::ZERO).await.unwrap();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedBusy);
    assert!(record.message.contains("controlled by operator pause"), "{}", record.message);
    drop(guard);
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_same_name_again_gives_the_same_record_without_touching_anything() {
    let world = world(GroupKind::Independent).await;
    let first = world.update(world.request("u1")).await;
    world.ranks[0].take_log();
    let again = world.update(world.request("u1")).await;
    assert_eq!(again.record, first.record);
    let mut other = world.request("u1");
    other.path = Some(world.path("start").into());
    let refused = world.update(other).await;
    assert_eq!(*refused.outcome(), Outcome::RefusedInvalid);
    assert!(refused.message.contains("was already committed from"), "{}", refused.message);
    let mut wrong = world.request("u2");
    wrong.from_version = Some(WeightVersion("v7".to_owned()));
    let refused = world.update(wrong).await;
    assert_eq!(*refused.outcome(), Outcome::RefusedVersion);
    assert_eq!(world.ranks[0].take_log(), [""; 0]);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_starts_again_is_brought_to_the_committed_weights() {
    let world = world(GroupKind::Independent).await;
    assert!(world.ranks[1].take_log().is_empty(), "nothing to restore before the first update");
    world.update(world.request("u1")).await;
    world.ranks[1].take_log();
    world.ranks[1].restart();
    world.updates.restore(vec![world.life(1)]).await.unwrap();
    let load = format!("load {}", world.path("new"));
    assert_eq!(world.ranks[1].take_log(), [load, "version v1".to_owned()]);
    world.all_hold("new");

    world.ranks[1].restart();
    let script = LoadScript::Fails("mixed", "load");
    world.engine(1).loads.push_back(script);
    let error = world.updates.restore(vec![world.life(1)]).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "rank 1: cannot be brought to weight version v1: worker 0: load failed (load): injected"
    );
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_next_sidecar_brings_its_engines_to_what_was_committed() {
    let world = world(GroupKind::Lockstep).await;
    let record = world.update(world.request("u1")).await;
    let world = world.next_sidecar().await;
    world.restore_all().await.unwrap();
    world.all_hold("new");
    assert_eq!(world.engine(1).version, "v1");
    assert_eq!(world.updates.status().version.0, "v1");
    // It also knows the update by name.
    let again = world.update(world.request("u1")).await;
    assert_eq!(again.record, record.record);

    // An end as planned forgets it: engines start from the command line's checkpoint again.
    world.updates.shutdown(true).await.unwrap();
    let world = world.next_sidecar().await;
    world.restore_all().await.unwrap();
    world.all_hold("start");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_committed_directory_that_is_gone_does_not_keep_a_new_sidecar_from_starting() {
    let world = world(GroupKind::Lockstep).await;
    world.update(world.request("u1")).await;
    std::fs::remove_dir_all(world.path("new")).unwrap();
    // While this sidecar's other engines hold it, there is no other way.
    world.ranks[1].restart();
    let script = LoadScript::Fails("unchanged", "files");
    world.engine(1).loads.push_back(script);
    world.updates.restore(vec![world.life(1)]).await.unwrap_err();
    let world = world.next_sidecar().await;
    world.restore_all().await.unwrap();
    world.all_hold("start");
    assert_eq!(world.updates.status().version.0, "default");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn weights_committed_for_another_model_are_not_loaded() {
    let world = world(GroupKind::Independent).await;
    world.update(world.request("u1")).await;
    let other = checkpoint(world.dir.path(), "other", 9);
    for rank in 0..2 {
        world.engine(rank).model_path = other.clone();
    }
    let world = world.next_sidecar().await;
    world.restore_all().await.unwrap();
    world.all_hold("other");
    assert_eq!(world.updates.status().committed, None);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn engines_that_a_frontend_has_paused_stay_paused() {
    let world = world(GroupKind::Lockstep).await;
    for rank in [0, 1] {
        world.calls.send(held(rank, 7, "pause_scheduler")).await.unwrap();
    }
    let mut control = world.control.watch();
    let by = PausedBy::Frontend { id: FrontendId(1) };
    control.wait_for(|state| state.paused_by.as_ref() == Some(&by)).await.unwrap();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    assert!(record.record.left_paused);
    for rank in &world.ranks {
        assert!(!rank.take_log().contains(&"resume".to_owned()));
    }
    assert_eq!(world.control.snapshot().paused_by, Some(by));
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_independent_engine_lost_in_the_middle_is_brought_to_the_new_weights_later() {
    let world = world(GroupKind::Independent).await;
    world.engine(1).loads.push_back(LoadScript::Hangs);
    let run = world.updates.start(world.request("u1")).await.unwrap();
    world.ranks[1].logged(&format!("load {}", world.path("new"))).await;
    world.ranks[1].lose();
    let record = run.record().await.unwrap();
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    world.ranks[1].restart();
    world.updates.restore(vec![world.life(1)]).await.unwrap();
    world.all_hold("new");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_lockstep_group_that_is_not_complete_is_not_updated() {
    let world = world(GroupKind::Lockstep).await;
    world.ranks[1].lose();
    world.control.watch().wait_for(|_| true).await.unwrap();
    // The loss reaches the task before a command that is sent later, or is found out by the pause.
    tokio::time::sleep(Duration::from_millis(10)).await;
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.contains("not complete: rank 1 is not serving"), "{}", record.message);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_without_version_stamps_is_updated_with_a_warning() {
    let world = world(GroupKind::Independent).await;
    world.engine(0).no_version_stamp = true;
    world.ranks[0].restart();
    world.engine(0).vllm_version = "0.26.1";
    world.updates.restore(vec![world.life(0)]).await.unwrap();
    world.ranks[0].admit();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    assert!(record.record.warnings[0].contains("rank 0: outputs do not carry the version"));
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_should_stamp_its_outputs_and_fails_does_not_serve() {
    let mut world = world(GroupKind::Independent).await;
    world.engine(0).no_version_stamp = true;
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Degraded { fenced: vec![EngineIndex(0)] }, "{}", record.message);
    assert!(record.message.contains("the version could not be stamped"), "{}", record.message);
    assert_eq!(world.fences.recv().await.unwrap().rank, EngineIndex(0));
    world.ranks[0].restart();
    let error = world.updates.restore(vec![world.life(0)]).await.unwrap_err();
    assert!(error.to_string().contains("has no attribute"), "{error}");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_cache_that_is_in_use_is_reset_with_its_requests() {
    let world = world(GroupKind::Independent).await;
    world.engine(0).resets.push_back(false);
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    let log = world.ranks[0].take_log();
    let resets: Vec<_> = log.iter().filter(|line| line.starts_with("reset")).collect();
    assert_eq!(resets, ["reset false true", "reset true true"]);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn weights_overwritten_in_place_are_an_update_without_a_way_back() {
    let world = world(GroupKind::Independent).await;
    world.update(world.request("u1")).await;
    checkpoint(world.dir.path(), "new", 2);
    let mut request = world.request("u2");
    let record = world.update(request.clone()).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(
        record.message.contains("could not be rolled back: the directory of the current weights"),
        "{}",
        record.message
    );
    request.allow_no_rollback = true;
    let record = world.update(request).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    assert!(record.record.warnings[0].contains("no way back"));
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn weights_that_a_frontend_loaded_are_replaced_everywhere_even_by_a_rollback() {
    let world = world(GroupKind::Independent).await;
    for rank in [0, 1] {
        world.engine(usize::from(rank)).weights = "external".to_owned();
        let mut call = held(rank, 9, "collective_rpc");
        call.args = vec!["reload_weights".into()];
        world.calls.send(call).await.unwrap();
    }
    let mut control = world.control.watch();
    control.wait_for(|state| state.external_weights).await.unwrap();
    let mut request = world.request("u1");
    request.from_version = Some(WeightVersion::default());
    let record = world.update(request).await;
    assert_eq!(*record.outcome(), Outcome::RefusedVersion);
    let script = LoadScript::Fails("unchanged", "files");
    world.engine(0).loads.push_back(script);
    let record = world.update(world.request("u2")).await;
    assert_eq!(*record.outcome(), Outcome::RolledBack);
    world.all_hold("start");
    assert!(!world.control.snapshot().external_weights);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_update_that_is_called_off_while_it_pauses_resumes_the_engines() {
    let world = world(GroupKind::Independent).await;
    world.engine(0).wait_needs_abort = true;
    let run = world.updates.start(world.request("u1")).await.unwrap();
    world.ranks[0].logged("pause wait false").await;
    world.updates.abort().await.unwrap();
    let record = run.record().await.unwrap();
    assert_eq!(*record.outcome(), Outcome::Aborted);
    assert!(record.message.contains("aborted by the operator"), "{}", record.message);
    world.all_hold("start");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_record_can_be_sent_as_json() {
    let world = world(GroupKind::Independent).await;
    let record = world.update(world.request("u1")).await;
    let text = serde_json::to_string(&record).unwrap();
    let back: UpdateRecord = serde_json::from_str(&text).unwrap();
    assert_eq!(back, record);
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn engines_that_sleep_are_not_updated() {
    let world = world(GroupKind::Independent).await;
    for rank in [0, 1] {
        world.calls.send(held(rank, 7, "sleep")).await.unwrap();
    }
    world.control.watch().wait_for(|state| state.asleep).await.unwrap();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.contains("asleep: wake them up first"), "{}", record.message);
    for rank in &world.ranks {
        assert_eq!(rank.take_log(), ["forward 7"]);
    }
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_link_is_followed_once_so_that_it_may_be_moved_later() {
    let world = world(GroupKind::Independent).await;
    let latest = world.dir.path().join("latest");
    std::os::unix::fs::symlink(world.path("new"), &latest).unwrap();
    let mut request = world.request("u1");
    request.path = Some(latest.clone());
    let record = world.update(request).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    std::fs::remove_file(&latest).unwrap();
    world.all_hold("new");
    world.ranks[1].restart();
    world.updates.restore(vec![world.life(1)]).await.unwrap();
    world.all_hold("new");
    world.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_whose_rank_task_reports_late_is_not_taken_for_lost() {
    let world = world(GroupKind::Independent).await;
    let (rank, life) = world.life(1);
    let next = Incarnation(life.0 + 1);
    // The restore of the next life comes before the snapshot shows that life.
    world.updates.restore(vec![(rank, next)]).await.unwrap();
    world.ranks[1].restart();
    world.ranks[1].admit();
    let record = world.update(world.request("u1")).await;
    assert_eq!(*record.outcome(), Outcome::Committed);
    assert_eq!(record.record.ranks[&rank].incarnation, next);
    world.all_hold("new");
    world.end().await;
}
