//! Staging areas for tests: what they answer is decided here, no byte moves.

use std::net::SocketAddr;

use dp_sidecar_protocol::machine::weight_update::Extent;
use parking_lot::Mutex;

use super::super::super::handles::{
    AdapterPlace, CheckpointDir, Envelope, HandleError, StageEvent, StageHandle, StageRequest, StageSource,
    StageSpec, StageState, StagedVersion, queue,
};
use super::*;
use crate::api::{Chunks, StageProgress};

/// What a staging area does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Script {
    /// Says that it failed.
    Fails,
    /// Says nothing more.
    Hangs,
}

#[derive(Debug, Default)]
pub(super) struct Area {
    pub(super) state: StageState,
    /// Directories that this node cannot read.
    pub(super) blind: Vec<String>,
    /// Adapters by digest, and where they are.
    pub(super) adapters: BTreeMap<String, String>,
    /// For the next beginnings.
    pub(super) scripts: VecDeque<Script>,
    pub(super) refuse_commits: u32,
    pub(super) log: Vec<String>,
}

/// Who listens at which data address.
pub(super) type Network = Arc<Mutex<BTreeMap<SocketAddr, (FakeStage, StageSpec)>>>;

#[derive(Clone, Debug)]
pub(super) struct FakeStage {
    node: u16,
    pub(super) area: Arc<Mutex<Area>>,
    reports: StageReports,
}

impl FakeStage {
    pub(super) fn start(node: u16, network: &Network) -> (Self, StageHandle, StageReports) {
        let (handle, mut inbox) = queue("staging");
        let reports = StageReports::default();
        let this = Self { node, area: Arc::default(), reports: reports.clone() };
        let (served, network) = (this.clone(), network.clone());
        tokio::spawn(async move {
            while let Some(Envelope { ask, reply, .. }) = inbox.recv().await {
                let answer = served.answer(ask, &network).await;
                reply.send::<StageRequest>(answer.map_err(HandleError::failed));
            }
        });
        (this, handle, reports)
    }

    pub(super) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.area.lock().log)
    }

    /// A node that was started again with empty memory.
    pub(super) fn forget(&self) {
        self.area.lock().state = StageState::default();
    }

    async fn answer(&self, request: StageRequest, network: &Network) -> Result<StageState, String> {
        match request {
            StageRequest::State => {}
            StageRequest::Probe(CheckpointDir { path, .. }) => {
                let mut state = self.area.lock().state.clone();
                let readable = !self.area.lock().blind.contains(&path);
                state.probed = readable.then(|| format!("probe of {path}"));
                return Ok(state);
            }
            StageRequest::Begin(spec) => self.begin(spec, network).await?,
            StageRequest::Commit { id } => {
                let mut area = self.area.lock();
                area.log.push(format!("commit {id}"));
                if area.refuse_commits > 0 {
                    area.refuse_commits -= 1;
                    return Err("not now".to_owned());
                }
                if area.state.staged.as_ref().is_some_and(|staged| staged.id == id) {
                    area.state.previous = area.state.current.take();
                    area.state.current = area.state.staged.take();
                } else if area.state.current.as_ref().is_none_or(|current| current.id != id) {
                    return Err(format!("{id} is not staged"));
                }
            }
            StageRequest::Discard { id } => {
                let mut area = self.area.lock();
                area.log.push(format!("discard {id}"));
                area.state.staged = area.state.staged.take().filter(|staged| staged.id != id);
                area.state.running = None;
            }
            StageRequest::TakeAdapter { digest, path } => {
                let path = path.filter(|path| !self.area.lock().blind.contains(path));
                let mut area = self.area.lock();
                if let Some(path) = path {
                    area.adapters.entry(digest.clone()).or_insert(path);
                }
                let mut state = area.state.clone();
                state.adapter = Some(match area.adapters.get(&digest) {
                    Some(path) => AdapterPlace::Here { path: path.clone() },
                    None => AdapterPlace::Lacks { from: 0 },
                });
                return Ok(state);
            }
            StageRequest::AdapterPiece { digest, offset, size, bytes } => {
                let mut area = self.area.lock();
                area.log.push(format!("piece {offset} {} of {size}", bytes.len()));
                let mut state = area.state.clone();
                let path = format!("/state/{}/{digest}", self.node);
                area.adapters.insert(digest, path.clone());
                state.adapter = Some(AdapterPlace::Here { path });
                return Ok(state);
            }
            StageRequest::KeepAdapters { digests } => {
                self.area.lock().adapters.retain(|digest, _| digests.contains(digest));
            }
        }
        Ok(self.area.lock().state.clone())
    }

    async fn begin(&self, spec: StageSpec, network: &Network) -> Result<(), String> {
        let source = match &spec.source {
            StageSource::Directory(directory) => format!("directory {}", directory.path),
            StageSource::Upload(id) => format!("upload {id}"),
            StageSource::Upstream => "upstream".to_owned(),
            StageSource::Current => "current".to_owned(),
        };
        let content = {
            let mut area = self.area.lock();
            area.log.push(format!("begin {} from {source}", spec.id));
            match area.scripts.pop_front() {
                Some(Script::Fails) => {
                    let error = "disk full".to_owned();
                    self.reports.take(StageEvent::Failed { id: spec.id, error });
                    return Ok(());
                }
                Some(Script::Hangs) => {
                    area.state.running = Some((spec.id, StageProgress::default()));
                    return Ok(());
                }
                None => {}
            }
            match &spec.source {
                StageSource::Upstream => {
                    let address = SocketAddr::from(([127, 0, 0, 1], 9000 + self.node));
                    area.state.data_address = Some(address);
                    area.state.running = Some((spec.id.clone(), StageProgress::default()));
                    network.lock().insert(address, (self.clone(), spec));
                    return Ok(());
                }
                StageSource::Directory(directory) => directory.path.clone(),
                StageSource::Upload(id) => format!("upload:{id}"),
                StageSource::Current => {
                    let current = area.state.current.as_ref().ok_or("nothing is current")?;
                    current.checkpoint.digest.clone().unwrap_or_default()["xxh3:".len()..].to_owned()
                }
            }
        };
        Box::pin(self.done(spec, &content, network)).await;
        Ok(())
    }

    /// All bytes are there; the next node gets them, too.
    async fn done(&self, spec: StageSpec, content: &str, network: &Network) {
        let next = spec.downstream.and_then(|address| network.lock().remove(&address));
        if let Some((node, spec)) = next {
            Box::pin(node.done(spec, content, network)).await;
        }
        if spec.source == StageSource::Current {
            return;
        }
        let checkpoint = Checkpoint {
            path: format!("/shm/{}/{}", self.node, spec.id),
            files: vec!["model.safetensors".to_owned()],
            extents: vec![Extent { offset: 0, length: 100 }],
            tensors: 2,
            bytes: 3,
            digest: Some(format!("xxh3:{content}")),
            ..Checkpoint::default()
        };
        let progress = StageProgress {
            done: 3,
            total: 3,
            chunks: Chunks { done: 1, total: 1 },
            ..StageProgress::default()
        };
        {
            let mut area = self.area.lock();
            area.state.running = None;
            area.state.data_address = None;
            let (id, version) = (spec.id.clone(), spec.version.clone());
            area.state.staged = Some(StagedVersion { id, version, checkpoint: checkpoint.clone() });
        }
        self.reports.take(StageEvent::Staged { id: spec.id, checkpoint, progress });
    }
}
