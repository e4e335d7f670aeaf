//! The staging areas of all nodes: what is asked of them, and what they report.

use tokio::sync::Semaphore;

use super::super::handles::{
    AdapterPlace, CheckpointDir, StageEvent, StageHandle, StageRequest, StageSource, StageSpec, StageState,
    StagedVersion,
};
use super::*;
use crate::api::StageProgress;

/// For answers that need no bytes.
const ANSWER: Duration = Duration::from_secs(30);
/// For the beginning: headers are read, memory is set up.
const BEGIN: Duration = Duration::from_secs(600);
/// Reports may be lost with a connection: the state is looked at as well.
const LOOK: Duration = Duration::from_secs(2);
/// So often in a row a node that should be staging may say that it is not.
const IDLE_LOOKS: u32 = 3;

/// What was last heard of a node.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) progress: Option<(UpdateId, StageProgress)>,
    ended: Option<(UpdateId, Result<Checkpoint, String>)>,
}

/// Where a node's staging area reports.
#[derive(Clone, Debug, Default)]
pub struct StageReports(Arc<watch::Sender<Seen>>);

impl StageReports {
    /// It has reported something.
    pub fn take(&self, event: StageEvent) {
        self.0.send_modify(|seen| seen.take(event));
    }
}

#[derive(Debug)]
struct Node {
    name: String,
    first: EngineIndex,
    handle: Option<StageHandle>,
    reports: StageReports,
}

/// All nodes.
#[derive(Clone, Debug)]
pub(super) struct Stages {
    nodes: Arc<BTreeMap<NodeId, Node>>,
    /// One node at a time is given what it lacks.
    turn: Arc<Semaphore>,
}

impl Stages {
    pub(super) fn new(nodes: Vec<UpdateNode>) -> Self {
        let node = |UpdateNode { id, name, ranks, stage, reports }| {
            let first = ranks.into_iter().min().unwrap_or(EngineIndex(u16::MAX));
            (id, Node { name, first, handle: stage, reports })
        };
        Self { nodes: Arc::new(nodes.into_iter().map(node).collect()), turn: Arc::new(Semaphore::new(1)) }
    }

    /// In the order of their first rank: the leader first.
    pub(super) fn in_order(&self, mut nodes: Vec<NodeId>) -> Vec<NodeId> {
        nodes.sort_by_key(|node| self.nodes.get(node).map(|known| known.first));
        nodes
    }

    /// The node of the first rank.
    pub(super) fn leader(&self) -> NodeId {
        let first = self.nodes.iter().min_by_key(|(_, node)| node.first);
        first.map(|(id, _)| *id).unwrap_or_default()
    }

    /// All nodes that have a staging area.
    pub(super) fn all(&self) -> Vec<NodeId> {
        self.nodes.keys().copied().filter(|node| self.has_stage(*node)).collect()
    }

    pub(super) fn name(&self, node: NodeId) -> String {
        self.nodes.get(&node).map_or_else(|| format!("node {node}"), |node| node.name.clone())
    }

    pub(super) fn has_stage(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.handle.is_some())
    }

    pub(super) fn seen(&self, node: NodeId) -> Option<watch::Receiver<Seen>> {
        self.nodes.get(&node).map(|node| node.reports.0.subscribe())
    }

    async fn ask(&self, node: NodeId, request: StageRequest) -> Result<StageState, String> {
        let limit = match request {
            StageRequest::Probe { .. } | StageRequest::Begin(_) | StageRequest::TakeAdapter { .. } => BEGIN,
            _ => ANSWER,
        };
        let name = self.name(node);
        let known = self.nodes.get(&node).and_then(|node| node.handle.as_ref());
        let handle = known.ok_or_else(|| format!("{name} has no staging area"))?;
        handle.ask_within(limit, request).await.map_err(|error| format!("{name}: {error}"))
    }

    pub(super) async fn state(&self, node: NodeId) -> Result<StageState, String> {
        self.ask(node, StageRequest::State).await
    }

    /// What a node sees in a directory; none: it cannot read it.
    pub(super) async fn probe(
        &self,
        node: NodeId,
        directory: &CheckpointDir,
    ) -> Result<Option<String>, String> {
        let probed = self.ask(node, StageRequest::Probe(directory.clone())).await?;
        Ok(probed.probed)
    }

    pub(super) async fn commit(&self, node: NodeId, id: &UpdateId) -> Result<StageState, String> {
        self.ask(node, StageRequest::Commit { id: id.clone() }).await
    }

    pub(super) async fn discard(&self, node: NodeId, id: &UpdateId) -> Result<StageState, String> {
        self.ask(node, StageRequest::Discard { id: id.clone() }).await
    }

    /// Asks a node about an adapter: to look for it, or to take a piece of its file.
    pub(super) async fn adapter(&self, node: NodeId, request: StageRequest) -> Result<AdapterPlace, String> {
        let state = self.ask(node, request).await?;
        state.adapter.ok_or_else(|| format!("{}: no answer about the adapter", self.name(node)))
    }

    /// Has a node forget all adapters but these.
    pub(super) async fn keep_adapters(&self, node: NodeId, digests: BTreeSet<String>) -> Result<(), String> {
        self.ask(node, StageRequest::KeepAdapters { digests }).await.map(|_| ())
    }

    pub(super) async fn begin(&self, node: NodeId, spec: StageSpec) -> Result<StageState, String> {
        if let Some(known) = self.nodes.get(&node) {
            known.reports.0.send_modify(|seen| {
                if seen.ended.as_ref().is_some_and(|(id, _)| *id == spec.id) {
                    seen.ended = None;
                }
            });
        }
        self.ask(node, StageRequest::Begin(spec)).await
    }

    /// Waits until a node that has begun is done.
    pub(super) async fn staged(
        &self,
        node: NodeId,
        id: &UpdateId,
        limit: Duration,
    ) -> Result<Checkpoint, String> {
        let waiting = async {
            let name = self.name(node);
            let mut seen = self.seen(node).ok_or_else(|| format!("{name} is not known"))?;
            let mut idle = 0;
            loop {
                let ended = seen.borrow_and_update().ended.clone().filter(|(of, _)| of == id);
                if let Some((_, result)) = ended {
                    return result.map_err(|error| format!("{name}: {error}"));
                }
                if tokio::time::timeout(LOOK, seen.changed()).await.is_ok() {
                    continue;
                }
                let Ok(state) = self.state(node).await else {
                    continue; // it may come back, until the limit
                };
                let found = [&state.staged, &state.current].into_iter().flatten().find(|v| v.id == *id);
                if let Some(version) = found {
                    return Ok(version.checkpoint.clone());
                }
                idle = if state.running.is_some() { 0 } else { idle + 1 };
                if idle == IDLE_LOOKS {
                    return Err(format!("{name} was restarted and has lost update {id}"));
                }
            }
        };
        let late = |_| Err(format!("{} has not staged {id} within {limit:?}", self.name(node)));
        tokio::time::timeout(limit, waiting).await.unwrap_or_else(late)
    }

    /// Makes sure that a node holds the committed version in its current segment. Bytes come from a node that has
    /// them, else from the directory they came from.
    pub(super) async fn ensure(
        &self,
        node: NodeId,
        commit: &Commit,
        model: &CheckpointDir,
        limit: Duration,
    ) -> Result<Checkpoint, String> {
        let _turn = tokio::time::timeout(limit, self.turn.acquire()).await;
        let state = self.state(node).await?;
        if let Some(current) = committed_in(state.current, commit) {
            return Ok(current);
        }
        if state.staged.is_some_and(|staged| staged.id == *commit.weights_id()) {
            return self.committed(node, commit).await;
        }
        if let Some((id, _)) = state.running {
            // Of a leader that has ended.
            self.discard(node, &id).await?;
        }
        let spec = |source| StageSpec {
            id: commit.weights_id().clone(),
            version: commit.version.clone(),
            source,
            downstream: None,
            retain: Retain::Memory,
            model: Some(model.clone()),
            fit: Box::new(Fit { rename: commit.checkpoint.rename.clone(), ..Fit::default() }),
        };
        let mut why = "no node has it".to_owned();
        for other in self.nodes.keys().copied().filter(|other| *other != node && self.has_stage(*other)) {
            if !self.state(other).await.is_ok_and(|state| committed_in(state.current, commit).is_some()) {
                continue;
            }
            info!(version = %commit.version, from = self.name(other), to = self.name(node), "passing the committed weights on");
            match self.pass_on(other, node, &spec(StageSource::Upstream), commit, limit).await {
                Ok(checkpoint) => return Ok(checkpoint),
                Err(error) => why = error,
            }
            self.discard(node, commit.weights_id()).await.ok();
        }
        if let Some(path) = commit.directory() {
            info!(version = %commit.version, path, node = self.name(node), "staging the committed weights again");
            let staged = async {
                let files = Some(commit.checkpoint.files.clone());
                let directory = CheckpointDir { path: path.to_owned(), files };
                self.begin(node, spec(StageSource::Directory(directory))).await?;
                self.take(node, commit, limit).await
            };
            match staged.await {
                Ok(checkpoint) => return Ok(checkpoint),
                Err(error) => why = format!("{why}; {error}"),
            }
            self.discard(node, commit.weights_id()).await.ok();
        }
        Err(format!(
            "{}: the committed weights are not available: {why} (a start with --forget-committed would serve the \
             checkpoint of the command line)",
            self.name(node)
        ))
    }

    async fn pass_on(
        &self,
        from: NodeId,
        to: NodeId,
        spec: &StageSpec,
        commit: &Commit,
        limit: Duration,
    ) -> Result<Checkpoint, String> {
        let begun = self.begin(to, spec.clone()).await?;
        let source = StageSpec {
            source: StageSource::Current,
            downstream: Some(begun.data_address.ok_or("no data address")?),
            model: None,
            ..spec.clone()
        };
        self.begin(from, source).await?;
        self.take(to, commit, limit).await
    }

    /// Waits for the bytes, compares them with the commit record, and makes them current.
    async fn take(&self, node: NodeId, commit: &Commit, limit: Duration) -> Result<Checkpoint, String> {
        let checkpoint = self.staged(node, commit.weights_id(), limit).await?;
        let (actual, expected) = (&checkpoint.digest, &commit.checkpoint.digest);
        if actual != expected {
            let text = |digest: &Option<String>| digest.clone().unwrap_or_else(|| "none".to_owned());
            return Err(format!(
                "{} has other weights than the committed ones: digest {}, expected {}",
                self.name(node),
                text(actual),
                text(expected)
            ));
        }
        self.committed(node, commit).await
    }

    async fn committed(&self, node: NodeId, commit: &Commit) -> Result<Checkpoint, String> {
        let state = self.commit(node, commit.weights_id()).await?;
        committed_in(state.current, commit)
            .ok_or_else(|| format!("{} did not make {} current", self.name(node), commit.version))
    }
}

/// What engines load, if it is the committed version.
fn committed_in(current: Option<StagedVersion>, commit: &Commit) -> Option<Checkpoint> {
    current.filter(|current| current.id == *commit.weights_id()).map(|current| current.checkpoint)
}

impl Seen {
    fn take(&mut self, event: StageEvent) {
        match event {
            StageEvent::Progress { id, progress } => self.progress = Some((id, progress)),
            StageEvent::Staged { id, checkpoint, progress } => {
                self.progress = Some((id.clone(), progress));
                self.ended = Some((id, Ok(checkpoint)));
            }
            StageEvent::Failed { id, error } => self.ended = Some((id, Err(error))),
        }
    }
}
