//! Updates over two nodes with two ranks each.

use super::stage::{FakeStage, Network, Script};
use super::*;

pub(super) struct Nodes {
    pub(super) dir: tempfile::TempDir,
    pub(super) ranks: Vec<FakeRank>,
    pub(super) stages: Vec<FakeStage>,
    pub(super) network: Network,
    pub(super) updates: UpdateHandle,
    pub(super) control: ControlHandle,
    pub(super) fences: mpsc::Receiver<FenceRequest>,
    pub(super) calls: mpsc::Sender<HeldCall>,
    tracker: TaskTracker,
    stop: CancellationToken,
    kind: GroupKind,
}

pub(super) async fn nodes(kind: GroupKind) -> Nodes {
    let dir = tempfile::tempdir_in(std::env::temp_dir().canonicalize().unwrap()).unwrap();
    let start = checkpoint(dir.path(), "start", 0);
    checkpoint(dir.path(), "new", 1);
    checkpoint(dir.path(), "newer", 2);
    let ranks: Vec<FakeRank> = (0..4).map(|rank| FakeRank::start(rank, &start)).collect();
    let nodes = assemble(kind, dir, ranks, None);
    let all = nodes.lives();
    nodes.updates.restore(all).await.unwrap();
    nodes
}

fn assemble(
    kind: GroupKind,
    dir: tempfile::TempDir,
    ranks: Vec<FakeRank>,
    areas: Option<Vec<FakeStage>>,
) -> Nodes {
    let handles: Vec<RankHandle> = ranks.iter().map(|rank| rank.handle.clone()).collect();
    let (calls, held) = mpsc::channel(16);
    let (fences_to, fences) = mpsc::channel(16);
    let tracker = TaskTracker::new();
    let stop = CancellationToken::new();
    let control = control::spawn(kind, handles.clone(), held, &tracker, stop.clone());
    let config = UpdateConfig::new(kind, dir.path());
    let network = Network::default();
    let mut stages = Vec::new();
    let mut nodes = Vec::new();
    for node in 0..2u16 {
        let (stage, handle, reports) = FakeStage::start(node, &network);
        if let Some(before) = areas.as_ref().and_then(|areas| areas.get(usize::from(node))) {
            stage.area.lock().state = before.area.lock().state.clone();
        }
        stages.push(stage);
        nodes.push(UpdateNode {
            id: NodeId(node),
            name: format!("node {node}"),
            ranks: vec![EngineIndex(node * 2), EngineIndex(node * 2 + 1)],
            stage: Some(handle),
            reports,
        });
    }
    let updates = spawn(config, handles, nodes, control.clone(), fences_to, &tracker, stop.clone()).unwrap();
    Nodes { dir, ranks, stages, network, updates, control, fences, calls, tracker, stop, kind }
}

impl Nodes {
    pub(super) fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub(super) fn request(&self, id: &str, name: &str) -> UpdateRequest {
        UpdateRequest {
            id: Some(UpdateId(id.to_owned())),
            version: Some(WeightVersion(format!("v-{id}"))),
            ..UpdateRequest::new(self.path(name))
        }
    }

    pub(super) fn lives(&self) -> Vec<(EngineIndex, Incarnation)> {
        self.ranks.iter().map(|rank| (rank.handle.rank, rank.handle.snapshot.borrow().incarnation)).collect()
    }

    pub(super) async fn update(&self, request: UpdateRequest) -> UpdateRecord {
        let run = self.updates.start(request).await.unwrap();
        tokio::time::timeout(2 * LIMIT, run.record()).await.unwrap().unwrap()
    }

    pub(super) fn holds(&self) -> Vec<String> {
        self.ranks.iter().map(|rank| rank.engine.lock().weights.clone()).collect()
    }

    pub(super) fn all_hold(&self, paths: [&str; 4]) {
        assert_eq!(self.holds(), paths);
        for rank in &self.ranks {
            assert!(!rank.engine.lock().paused, "rank {} left paused", rank.handle.rank);
            assert!(rank.handle.snapshot.borrow().admission_open, "rank {} is closed", rank.handle.rank);
        }
    }

    pub(super) fn segments(&self, id: &str) -> Vec<String> {
        (0..4).map(|rank| format!("/shm/{}/{id}", rank / 2)).collect()
    }

    pub(super) fn all_hold_segments(&self, id: &str) {
        let segments = self.segments(id);
        let paths: Vec<&str> = segments.iter().map(String::as_str).collect();
        self.all_hold(paths.try_into().unwrap());
    }

    /// The sidecar is killed and started again; its engines and the nodes' memory live on.
    pub(super) async fn next_leader(self) -> Self {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
        assemble(self.kind, self.dir, self.ranks, Some(self.stages))
    }

    pub(super) async fn adopt_all(&self) -> Result<(), UpdateError> {
        tokio::time::timeout(LIMIT, self.updates.adopt(self.lives())).await.unwrap()
    }

    pub(super) async fn end(self) {
        self.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(Duration::from_secs(5), self.tracker.wait()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_directory_that_all_nodes_can_read_is_taken_by_each_into_its_own_memory() {
    let nodes = nodes(GroupKind::Lockstep).await;
    let mut run = nodes.updates.start(nodes.request("u1", "new")).await.unwrap();
    let mut staged = BTreeMap::new();
    while let Some(event) = run.events.recv().await {
        if let UpdateEvent::Staging { name, progress, .. } = event {
            staged.insert(name, progress.done);
        }
    }
    let record = run.record().await.unwrap();
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    assert_eq!(record.record.warnings, [""; 0]);
    nodes.all_hold_segments("u1");
    let begin = format!("begin u1 from directory {}", nodes.path("new"));
    for stage in &nodes.stages {
        assert_eq!(stage.take_log(), [begin.clone(), "commit u1".to_owned()]);
    }
    assert_eq!(staged.into_iter().collect::<Vec<_>>(), [("node 0".to_owned(), 3), ("node 1".to_owned(), 3)]);
    // The way back of the next one is in memory.
    nodes.ranks[3].engine.lock().loads.push_back(LoadScript::Raises);
    let record = nodes.update(nodes.request("u2", "newer")).await;
    assert_eq!(*record.outcome(), Outcome::RolledBack, "{}", record.message);
    nodes.all_hold_segments("u1");
    for stage in &nodes.stages {
        assert_eq!(stage.take_log().last().unwrap(), "discard u2");
    }
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_directory_that_only_the_leader_can_read_goes_down_the_chain() {
    for source in [UpdateSource::Auto, UpdateSource::Leader] {
        let nodes = nodes(GroupKind::Independent).await;
        nodes.stages[1].area.lock().blind.push(nodes.path("new"));
        let request = UpdateRequest { source, ..nodes.request("u1", "new") };
        let record = nodes.update(request).await;
        assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
        nodes.all_hold_segments("u1");
        assert_eq!(nodes.stages[1].take_log(), ["begin u1 from upstream", "commit u1"]);
        assert!(nodes.network.lock().is_empty());
        let refused = UpdateRequest { source: UpdateSource::Shared, ..nodes.request("u2", "newer") };
        nodes.stages[1].area.lock().blind.push(nodes.path("newer"));
        let record = nodes.update(refused).await;
        assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
        assert!(record.message.contains("not every node sees the same files"), "{}", record.message);
        nodes.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_goes_down_the_chain_under_its_own_name() {
    let nodes = nodes(GroupKind::Independent).await;
    let mut request = nodes.request("u1", "new");
    request.path = None;
    request.upload = Some("t7".to_owned());
    let record = nodes.update(request).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    assert_eq!(record.record.source, "upload:t7");
    assert_eq!(nodes.stages[0].take_log()[0], "begin u1 from upload t7");
    nodes.all_hold_segments("u1");
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn with_retain_disk_engines_load_from_a_directory_that_all_can_read() {
    let nodes = nodes(GroupKind::Lockstep).await;
    let request = UpdateRequest { retain: Retain::Disk, ..nodes.request("u1", "new") };
    let record = nodes.update(request).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    let new = nodes.path("new");
    nodes.all_hold([&new, &new, &new, &new]);
    assert!(nodes.stages[1].take_log().is_empty());
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn with_retain_none_an_engine_that_fails_gets_the_new_version_again_or_is_fenced() {
    let mut nodes = nodes(GroupKind::Independent).await;
    nodes.ranks[1].engine.lock().loads.push_back(LoadScript::Raises);
    for _ in 0..2 {
        nodes.ranks[3].engine.lock().loads.push_back(LoadScript::Fails("mixed", "load"));
    }
    let request = UpdateRequest { retain: Retain::None, ..nodes.request("u1", "new") };
    let record = nodes.update(request).await;
    assert_eq!(*record.outcome(), Outcome::Degraded { fenced: vec![EngineIndex(3)] });
    assert!(record.record.committed);
    assert_eq!(nodes.holds()[..3], nodes.segments("u1")[..3]);
    assert_eq!(nodes.fences.recv().await.unwrap().rank, EngineIndex(3));
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_stage_ends_the_update_before_any_engine_is_touched() {
    for script in [Script::Fails, Script::Hangs] {
        let nodes = nodes(GroupKind::Lockstep).await;
        nodes.stages[1].area.lock().scripts.push_back(script.clone());
        let record = nodes.update(nodes.request("u1", "new")).await;
        assert_eq!(
            record.record.outcome,
            match script {
                Script::Fails => Outcome::RefusedInvalid,
                Script::Hangs => Outcome::Aborted,
            }
        );
        if script == Script::Fails {
            assert!(record.message.contains("node 1: disk full"), "{}", record.message);
        }
        for (rank, stage) in nodes.ranks.iter().zip(nodes.stages.iter().cycle()) {
            assert!(rank.take_log().is_empty());
            assert!(stage.area.lock().state.staged.is_none());
        }
        nodes.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_update_is_called_off_while_nodes_stage() {
    let nodes = nodes(GroupKind::Lockstep).await;
    nodes.stages[1].area.lock().scripts.push_back(Script::Hangs);
    let run = nodes.updates.start(nodes.request("u1", "new")).await.unwrap();
    while nodes.stages[1].area.lock().state.running.is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    nodes.updates.abort().await.unwrap();
    let record = run.record().await.unwrap();
    assert_eq!(*record.outcome(), Outcome::Aborted);
    for stage in &nodes.stages {
        assert_eq!(stage.take_log().last().unwrap(), "discard u1");
    }
    let record = nodes.update(nodes.request("u2", "new")).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_same_update_sent_twice_while_it_runs_is_followed_by_both() {
    let nodes = nodes(GroupKind::Lockstep).await;
    nodes.ranks[0].engine.lock().wait_needs_abort = true;
    let first = nodes.updates.start(nodes.request("u1", "new")).await.unwrap();
    nodes.ranks[0].logged("pause wait false").await;
    let mut second = nodes.updates.start(nodes.request("u1", "new")).await.unwrap();
    let mut third = nodes.updates.follow(None).await.unwrap();
    // Both are told at once where it is; nothing moves until the pause deadline.
    for run in [&mut second, &mut third] {
        let event = run.events.try_recv();
        assert!(matches!(event, Ok(UpdateEvent::Progress { phase: Phase::Pausing, .. })), "{event:?}");
    }
    let other = nodes.updates.follow(Some(UpdateId("u9".to_owned()))).await.unwrap_err();
    assert_eq!(other.to_string(), "update u9 is not running");
    let differs = nodes.update(nodes.request("u1", "newer")).await;
    assert_eq!(*differs.outcome(), Outcome::RefusedBusy);
    let first = first.record().await.unwrap();
    assert_eq!(*first.outcome(), Outcome::Committed);
    assert_eq!(second.record().await.unwrap(), first);
    assert_eq!(third.record().await.unwrap(), first);
    let pauses = nodes.ranks[1].take_log().iter().filter(|line| line.starts_with("load")).count();
    assert_eq!(pauses, 1);
    let history = nodes.updates.history(10).await.unwrap();
    assert_eq!(history, [first]);
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_stage_that_was_not_made_current_is_so_before_the_next_update() {
    let nodes = nodes(GroupKind::Lockstep).await;
    nodes.stages[1].area.lock().refuse_commits = 3;
    let record = nodes.update(nodes.request("u1", "new")).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    assert!(nodes.stages[1].area.lock().state.current.is_none());
    let record = nodes.update(nodes.request("u2", "newer")).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    let state = nodes.stages[1].area.lock().state.clone();
    assert_eq!(state.previous.unwrap().id.0, "u1");
    assert_eq!(state.current.unwrap().id.0, "u2");
    nodes.all_hold_segments("u2");
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_comes_late_gets_the_committed_weights_from_a_node_that_has_them() {
    let nodes = nodes(GroupKind::Independent).await;
    nodes.update(nodes.request("u1", "new")).await;
    nodes.stages[1].forget();
    nodes.stages[1].take_log();
    for rank in [2, 3] {
        nodes.ranks[rank].restart();
    }
    nodes.updates.restore(nodes.lives()[2..].to_vec()).await.unwrap();
    nodes.all_hold_segments("u1");
    assert_eq!(nodes.stages[1].take_log(), ["begin u1 from upstream", "commit u1"]);
    // Nobody has them: they are staged again from where they came, and must be the same.
    for stage in &nodes.stages {
        stage.forget();
    }
    nodes.ranks[3].restart();
    nodes.updates.restore(nodes.lives()[3..].to_vec()).await.unwrap();
    nodes.all_hold_segments("u1");
    nodes.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_update_does_not_begin_while_an_engine_may_serve_that_is_not_reached() {
    let nodes = nodes(GroupKind::Independent).await;
    let nodes = nodes.next_leader().await;
    nodes.updates.adopt(nodes.lives()[..2].to_vec()).await.unwrap();
    let record = nodes.update(nodes.request("u1", "new")).await;
    assert_eq!(*record.outcome(), Outcome::RefusedInvalid);
    assert!(record.message.contains("rank 2, 3 may be serving the current weights"), "{}", record.message);
    nodes.updates.adopt(nodes.lives()[2..].to_vec()).await.unwrap();
    let record = nodes.update(nodes.request("u1", "new")).await;
    assert_eq!(*record.outcome(), Outcome::Committed, "{}", record.message);
    nodes.end().await;
}
