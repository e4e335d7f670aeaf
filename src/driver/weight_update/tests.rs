mod adapters;
mod checkpoints;
mod engines;
pub(super) mod jobs;
mod nodes;
mod recovery;
mod sleep;
mod stage;
mod transaction;

use std::collections::VecDeque;
use std::path::Path;

use dp_sidecar_protocol::machine::weight_update::{Outcome, Phase, WorkerState};
use dp_sidecar_protocol::{FrontendId, PausedBy};

use super::super::control;
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
    let world = assemble(kind, dir, ranks, |_| ());
    world.restore_all().await.unwrap();
    world
}

fn assemble(
    kind: GroupKind,
    dir: tempfile::TempDir,
    ranks: Vec<FakeRank>,
    configure: impl FnOnce(&mut UpdateConfig),
) -> World {
    let handles: Vec<RankHandle> = ranks.iter().map(|rank| rank.handle.clone()).collect();
    let (calls, held) = mpsc::channel(16);
    let (fences_to, fences) = mpsc::channel(16);
    let tracker = TaskTracker::new();
    let stop = CancellationToken::new();
    let control = control::spawn(kind, handles.clone(), held, &tracker, stop.clone());
    let mut config = UpdateConfig::new(kind, dir.path());
    configure(&mut config);
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
        self.next_sidecar_with(|_| ()).await
    }

    async fn next_sidecar_with(self, configure: impl FnOnce(&mut UpdateConfig)) -> Self {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
        let model = self.engine(0).model_path.clone();
        let ranks = (0..2).map(|rank| FakeRank::start(rank, &model)).collect();
        assemble(self.kind, self.dir, ranks, configure)
    }

    async fn end(self) {
        self.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(Duration::from_secs(5), self.tracker.wait()).await.unwrap();
    }
}
