//! Staging over loopback: chains of nodes, each with its own task, in one process.

mod adapters;
mod chain;
mod faults;
mod prefault;
mod restart;
mod uploads;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dp_sidecar_protocol::machine::weight_update::{Checkpoint, Fit};
use dp_sidecar_protocol::{UpdateId, WeightVersion};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::config::StageConfig;
use super::upload::{Uploads, channel};
use crate::api::{Retain, StageProgress};
use crate::driver::handles::{
    CheckpointDir, HandleError, NodeEvent, StageEvent, StageHandle, StageRequest, StageSource, StageSpec,
    StageState,
};
use crate::manifest::tests::write;

const LIMIT: Duration = Duration::from_secs(30);
/// Small, so that small checkpoints have many chunks.
const CHUNK: u32 = 4096;

/// Folders of a node, which outlive it.
struct Place {
    dir: tempfile::TempDir,
    name: String,
}

impl Place {
    fn new(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("state")).unwrap();
        std::fs::create_dir(dir.path().join("shm")).unwrap();
        Self { dir, name: name.to_owned() }
    }

    fn config(&self) -> StageConfig {
        let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let mut config = StageConfig::new(&self.name, self.dir.path().join("state"), "run", host, None);
        config.shm_dir = self.shm();
        config.chunk = CHUNK;
        config.accept_limit = Duration::from_secs(10);
        config
    }

    fn shm(&self) -> PathBuf {
        self.dir.path().join("shm")
    }

    /// Names and lengths of the segments that exist.
    fn segments(&self) -> BTreeMap<String, u64> {
        let entries = std::fs::read_dir(self.shm()).unwrap();
        let entries = entries.map(|entry| entry.unwrap());
        entries
            .map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len()))
            .collect()
    }
}

/// A running staging task.
struct Node {
    handle: StageHandle,
    events: mpsc::Receiver<NodeEvent>,
    tracker: TaskTracker,
    stop: CancellationToken,
    uploads: Uploads,
}

impl Node {
    fn start(place: &Place) -> Self {
        Self::with(place.config())
    }

    fn with(mut config: StageConfig) -> Self {
        let (events_in, events) = mpsc::channel(64);
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let (uploads, requests) = channel();
        config.uploads = Some(requests);
        let handle = super::spawn(config, events_in, &tracker, stop.clone()).unwrap();
        Self { handle, events, tracker, stop, uploads }
    }

    async fn ask(&self, request: StageRequest) -> Result<StageState, HandleError> {
        self.handle.ask_within(LIMIT, request).await
    }

    async fn state(&self) -> StageState {
        self.ask(StageRequest::State).await.unwrap()
    }

    async fn begin(&self, spec: StageSpec) -> Option<SocketAddr> {
        self.ask(StageRequest::Begin(spec)).await.unwrap().data_address
    }

    /// Waits for the end of a staging.
    async fn outcome(&mut self) -> Result<(Checkpoint, StageProgress), String> {
        loop {
            match timeout(LIMIT, self.events.recv()).await.unwrap().unwrap() {
                NodeEvent::Stage(StageEvent::Progress { .. }) => {}
                NodeEvent::Stage(StageEvent::Staged { checkpoint, progress, .. }) => {
                    return Ok((checkpoint, progress));
                }
                NodeEvent::Stage(StageEvent::Failed { error, .. }) => return Err(error),
                other => panic!("{other:?}"),
            }
        }
    }

    async fn commit(&self, id: &str) -> StageState {
        self.ask(StageRequest::Commit { id: UpdateId(id.to_owned()) }).await.unwrap()
    }

    async fn discard(&self, id: &str) -> StageState {
        self.ask(StageRequest::Discard { id: UpdateId(id.to_owned()) }).await.unwrap()
    }

    async fn end(self) {
        self.stop.cancel();
        self.tracker.close();
        timeout(LIMIT, self.tracker.wait()).await.unwrap();
    }
}

fn spec(id: &str, source: StageSource, downstream: Option<SocketAddr>) -> StageSpec {
    StageSpec {
        id: UpdateId(id.to_owned()),
        version: WeightVersion(format!("version of {id}")),
        source,
        downstream,
        retain: Retain::Memory,
        model: None,
        fit: Box::default(),
    }
}

fn checkpoint_dir(dir: &Path) -> CheckpointDir {
    CheckpointDir { path: dir.to_string_lossy().into_owned(), files: None }
}

fn directory(dir: &Path) -> StageSource {
    StageSource::Directory(checkpoint_dir(dir))
}

/// A checkpoint of `files` files with a few tensors each; the bytes depend on the seed.
fn checkpoint(seed: u64, files: usize, elements: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(dir.path(), seed, files, elements);
    dir
}

fn write_checkpoint(dir: &Path, seed: u64, files: usize, elements: usize) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    for file in 0..files {
        let data: Vec<Vec<u8>> =
            (0..3).map(|_| (0..elements * 2).map(|_| random.random()).collect()).collect();
        let names: Vec<String> = (0..3).map(|tensor| format!("layer.{file}.{tensor}")).collect();
        let shape = [elements];
        let tensors: Vec<(&str, &str, &[usize], &[u8])> = names
            .iter()
            .zip(&data)
            .map(|(name, data)| (name.as_str(), "BF16", &shape[..], &data[..]))
            .collect();
        write(dir, &format!("model-{file}.safetensors"), &tensors);
    }
}

/// The segment holds exactly the directory's files.
#[track_caller]
fn assert_holds(checkpoint: &Checkpoint, dir: &Path) {
    let segment = std::fs::read(&checkpoint.path).unwrap();
    assert!(!checkpoint.files.is_empty());
    for (file, extent) in checkpoint.files.iter().zip(&checkpoint.extents) {
        let (from, length) = (extent.offset as usize, extent.length as usize);
        assert!(extent.offset.is_multiple_of(u64::from(CHUNK)));
        let expected = std::fs::read(dir.join(file)).unwrap();
        assert!(segment[from..from + length] == expected, "{file} differs");
    }
}

/// A chain of nodes.
struct Chain {
    places: Vec<Place>,
    nodes: Vec<Node>,
}

impl Chain {
    fn new(nodes: usize) -> Self {
        let places: Vec<Place> = (0..nodes).map(|at| Place::new(&format!("node {at}"))).collect();
        let nodes = places.iter().map(Node::start).collect();
        Self { places, nodes }
    }

    /// Begins at the last node, up to the first.
    async fn begin(&self, id: &str, source: StageSource) {
        self.begin_with(id, source, |spec| spec).await;
    }

    async fn begin_with(&self, id: &str, source: StageSource, change: impl Fn(StageSpec) -> StageSpec) {
        let mut downstream = None;
        for node in self.nodes[1..].iter().rev() {
            let spec = change(spec(id, StageSource::Upstream, downstream));
            downstream = node.begin(spec).await;
        }
        self.nodes[0].begin(change(spec(id, source, downstream))).await;
    }

    async fn outcomes(&mut self) -> Vec<Result<(Checkpoint, StageProgress), String>> {
        let outcomes = self.nodes.iter_mut().map(Node::outcome);
        futures::future::join_all(outcomes).await
    }

    /// Stages and commits; gives every node's progress.
    async fn update(&mut self, id: &str, dir: &Path) -> Vec<StageProgress> {
        self.begin(id, directory(dir)).await;
        let mut all = Vec::new();
        let mut digests = std::collections::BTreeSet::new();
        for outcome in self.outcomes().await {
            let (checkpoint, progress) = outcome.unwrap();
            assert_holds(&checkpoint, dir);
            digests.insert(checkpoint.digest);
            all.push(progress);
        }
        assert_eq!(digests.len(), 1, "all nodes hold the same");
        for node in &self.nodes {
            node.commit(id).await;
        }
        all
    }

    async fn end(self) -> Vec<Place> {
        for node in self.nodes {
            node.end().await;
        }
        self.places
    }
}
