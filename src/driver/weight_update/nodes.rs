//! Staging of an update on all nodes: where the bytes come from, and the way back.

use super::super::handles::{CheckpointDir, StageSource, StageSpec, StageState};
use super::jobs::StageJob;
use super::*;
use crate::manifest::{Manifest, ManifestError};

/// The new checkpoint of each node, and the one to go back to.
type Checkpoints = BTreeMap<NodeId, (Checkpoint, Option<Checkpoint>)>;

/// At most so often the progress of a node is told.
const SHOW: Duration = Duration::from_millis(250);
/// The work behind a missing way back ends with this.
const NO_WAY_BACK: &str = "--allow-no-rollback updates all the same";

/// How the bytes reach the engines.
enum Plan {
    /// Engines load from this directory, which all nodes can read.
    Directory(CheckpointDir),
    /// Every node takes this directory into its memory.
    Shared(CheckpointDir),
    /// The leader takes it, and passes it on.
    Chain(StageSource),
}

impl Plan {
    /// What the leader can read.
    const fn directory(&self) -> Option<&CheckpointDir> {
        match self {
            Self::Directory(directory)
            | Self::Shared(directory)
            | Self::Chain(StageSource::Directory(directory)) => Some(directory),
            Self::Chain(_) => None,
        }
    }
}

/// Where only adapters change: there is nothing to stage, and engines know the way back.
pub(super) fn no_checkpoints(nodes: &[NodeId]) -> Checkpoints {
    nodes.iter().map(|node| (*node, (Checkpoint::default(), Some(Checkpoint::default())))).collect()
}

impl StageJob {
    pub(super) async fn stage_weights(&self) -> Result<Checkpoints, (NodeId, String)> {
        let leader = self.leader();
        let on_leader = |error: String| (leader, error);
        let plan = self.plan(leader).await.map_err(on_leader)?;
        let fit = self.fit(leader, &plan).await.map_err(on_leader)?;
        let mut staged = match plan {
            Plan::Directory(source) => self.leader_directory(leader, source, fit).await.map_err(on_leader)?,
            plan => self.stage(leader, &plan, &fit).await?,
        };
        // Of an upload it is known only now.
        let odd = staged.values_mut().flat_map(|(new, _)| std::mem::take(&mut new.odd));
        let odd: BTreeMap<String, OddTensor> = odd.map(|odd| (odd.name.clone(), odd)).collect();
        let source = PathBuf::from(self.request.source_name());
        self.ignored(&source, odd.into_values().collect(), None).await.map_err(on_leader)?;
        Ok(staged)
    }

    /// How the new checkpoint may differ from that of the start.
    async fn fit(&self, leader: NodeId, plan: &Plan) -> Result<Fit, String> {
        let strict_dtype = self.request.strict_dtype;
        let (tied, rename) = (self.tied.clone(), self.request.rename.clone());
        let mut fit = Fit { strict_dtype, tied, rename, ..Fit::default() };
        if let Some(directory) = plan.directory() {
            let (new, model, asked) = (directory.clone(), self.model(leader), fit.clone());
            let compare = move |known: &Known, _: &AtomicBool| known.compare(&new, &model, &asked);
            let (new, _, odd) = self.tools.look(compare).await?;
            fit.ignored = self.ignored(&new.path, odd, Some(&new)).await?;
        }
        Ok(fit)
    }

    /// The names of tensors that only one of the checkpoints has. Refused, unless every engine says that its loader
    /// passes over them.
    async fn ignored(
        &self,
        source: &Path,
        odd: Vec<OddTensor>,
        all: Option<&Manifest>,
    ) -> Result<BTreeSet<String>, String> {
        let mut ignored: BTreeSet<String> = odd.iter().map(|odd| odd.name.clone()).collect();
        if odd.is_empty() {
            return Ok(ignored);
        }
        let limit = self.tools.config.call_timeout;
        let asked = self.engines.iter().map(async |(handle, ..)| {
            let failed = |error| format!("rank {}: {error}", handle.rank);
            shim::ignored(handle, &odd, limit).await.map_err(failed)
        });
        for by_engine in futures::future::try_join_all(asked).await? {
            ignored.retain(|name| by_engine.contains(name));
        }
        let needed = odd.into_iter().filter(|odd| self.engines.is_empty() || !ignored.contains(&odd.name));
        let needed: Vec<OddTensor> = needed.collect();
        if needed.is_empty() { Ok(ignored) } else { Err(ManifestError::odd(source, needed, all).to_string()) }
    }

    async fn stage(&self, leader: NodeId, plan: &Plan, fit: &Fit) -> Result<Checkpoints, (NodeId, String)> {
        let stages = &self.tools.stages;
        let mut previous = BTreeMap::new();
        for &node in &self.nodes {
            let state = self.settled(node).await.map_err(|error| (node, error))?;
            let found = self.previous_in(leader, node, &state).await.map_err(|error| (node, error))?;
            previous.insert(node, found);
        }
        let mut downstream = None;
        for &node in self.nodes.iter().rev() {
            let source = match plan {
                Plan::Shared(directory) => StageSource::Directory(directory.clone()),
                Plan::Chain(source) if node == leader => source.clone(),
                _ => StageSource::Upstream,
            };
            let chained = matches!(plan, Plan::Chain(_));
            let spec = StageSpec {
                id: self.id.clone(),
                version: self.version.clone(),
                source,
                downstream: downstream.filter(|_| chained),
                retain: self.request.retain,
                model: self.models.get(&node).cloned(),
                fit: Box::new(fit.clone()),
            };
            let awaits_bytes = spec.source == StageSource::Upstream;
            let begun = stages.begin(node, spec).await.map_err(|error| (node, error))?;
            if awaits_bytes {
                let address = begun
                    .data_address
                    .ok_or_else(|| (node, format!("{}: it opened no data address", stages.name(node))))?;
                downstream = Some(address);
            }
        }
        let shown = self.nodes.iter().map(|node| self.show(*node));
        let staged = self.nodes.iter().map(async |node| {
            let staged = stages.staged(*node, &self.id, self.limit()).await;
            self.tell(*node, 0);
            staged.map(|new| (*node, new)).map_err(|error| (*node, error))
        });
        let staged = tokio::select! {
            staged = futures::future::try_join_all(staged) => staged?,
            _ = join_all(shown) => Vec::new(),
        };
        let both = |(node, new)| (node, (new, previous.get(&node).cloned().flatten()));
        Ok(staged.into_iter().map(both).collect())
    }

    fn tell(&self, node: NodeId, rate: u64) {
        let seen = self.tools.stages.seen(node).and_then(|seen| seen.borrow().progress.clone());
        if let Some((_, progress)) = seen.filter(|(id, _)| *id == self.id) {
            let name = self.tools.stages.name(node);
            self.tools.notes.try_send(UpdateEvent::Staging { node, name, progress, rate }).ok();
        }
    }

    /// Tells of a node's progress, for ever.
    async fn show(&self, node: NodeId) {
        let Some(mut seen) = self.tools.stages.seen(node) else {
            return std::future::pending().await;
        };
        let (mut told, mut done) = (Instant::now(), 0);
        loop {
            let progress = seen.borrow_and_update().progress.clone().filter(|(id, _)| *id == self.id);
            if let Some((_, progress)) = progress
                && progress.done != done
            {
                let ms = u64::try_from(told.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
                let rate = progress.done.saturating_sub(done).saturating_mul(1000) / ms;
                (told, done) = (Instant::now(), progress.done);
                self.tell(node, rate);
            }
            if seen.changed().await.is_err() {
                return std::future::pending().await;
            }
            if !told.elapsed().is_zero() && told.elapsed() < SHOW {
                tokio::time::sleep(SHOW.saturating_sub(told.elapsed())).await;
            }
        }
    }

    async fn plan(&self, leader: NodeId) -> Result<Plan, String> {
        if let Some(upload) = &self.request.upload {
            return Ok(Plan::Chain(StageSource::Upload(upload.clone())));
        }
        let path = self.request.path.clone().unwrap_or_default();
        if !path.is_absolute() {
            return Err(format!("checkpoint {}: expected an absolute path", path.display()));
        }
        // What a link points to: links such as `latest` are moved when the next checkpoint comes.
        let path = path.canonicalize().unwrap_or(path);
        let directory = self.resolve(leader, path.to_str().ok_or("the path is not UTF-8")?).await?;
        if !self.nodes.iter().any(|node| self.tools.stages.has_stage(*node)) {
            return Ok(Plan::Directory(directory));
        }
        let path = path.display();
        let shared = match self.request.source {
            UpdateSource::Leader => self.nodes.len() == 1,
            _ => self.is_shared(leader, &directory).await?,
        };
        match self.request.source {
            UpdateSource::Shared if !shared => Err(format!("not every node sees the same files in {path}")),
            _ if shared && self.request.retain == Retain::Disk => Ok(Plan::Directory(directory)),
            _ if shared => Ok(Plan::Shared(directory)),
            _ => Ok(Plan::Chain(StageSource::Directory(directory))),
        }
    }

    async fn is_shared(&self, leader: NodeId, directory: &CheckpointDir) -> Result<bool, String> {
        if self.nodes.len() == 1 {
            return Ok(true);
        }
        let probes = join_all(self.nodes.iter().map(|node| self.tools.stages.probe(*node, directory))).await;
        let mut digests = probes.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter();
        let Some(Some(first)) = digests.next() else {
            return Err(format!("{} cannot read {}", self.tools.stages.name(leader), directory.path));
        };
        Ok(digests.all(|digest| digest.as_ref() == Some(&first)))
    }

    /// The state of a node, after what the last update may have left undone.
    async fn settled(&self, node: NodeId) -> Result<StageState, String> {
        let mut state = self.tools.stages.state(node).await?;
        if let Some((running, _)) = state.running.clone() {
            state = self.tools.stages.discard(node, &running).await?;
        }
        let Some(staged) = &state.staged else {
            return Ok(state);
        };
        if self.committed.as_ref().is_some_and(|commit| *commit.weights_id() == staged.id) {
            return self.tools.stages.commit(node, &staged.id.clone()).await;
        }
        if staged.id != self.id {
            return self.tools.stages.discard(node, &staged.id.clone()).await;
        }
        Ok(state)
    }

    /// Engines load from the directory, as the leader sees it.
    async fn leader_directory(
        &self,
        leader: NodeId,
        source: CheckpointDir,
        fit: Fit,
    ) -> Result<Checkpoints, String> {
        let model = self.model(leader);
        let previous = self.previous_in(leader, leader, &StageState::default()).await?;
        let notes = self.tools.notes.clone();
        let new = self.tools.look(move |known, cancel| {
            let shown = AtomicU64::new(0);
            let progress = |progress: crate::manifest::Progress| {
                // About a hundred steps, and the last one.
                let step = (progress.total / 100).max(1);
                let before = shown.load(Ordering::Relaxed);
                if progress.done >= before + step || progress.done == progress.total {
                    shown.fetch_max(progress.done, Ordering::Relaxed);
                    let event = UpdateEvent::Hashing { done: progress.done, total: progress.total };
                    notes.try_send(event).ok();
                }
            };
            known.check(&source, &model, &fit, &progress, cancel)
        });
        let new = new.await?;
        let mut all = Checkpoints::new();
        for &node in &self.nodes {
            let previous = match node == leader {
                true => previous.clone(),
                false => self.previous_in(leader, node, &StageState::default()).await?,
            };
            all.insert(node, (new.clone(), previous));
        }
        Ok(all)
    }

    /// The way back on a node.
    async fn previous_in(
        &self,
        leader: NodeId,
        node: NodeId,
        state: &StageState,
    ) -> Result<Option<Checkpoint>, String> {
        if self.request.retain == Retain::None {
            return Ok(None);
        }
        match self.way_back(leader, node, state).await {
            Ok(previous) => Ok(Some(previous)),
            Err(reason) if self.request.allow_no_rollback => {
                warn!(%reason, "this update cannot be rolled back");
                Ok(None)
            }
            Err(reason) => {
                Err(format!("a load that fails could not be rolled back: {reason}; {NO_WAY_BACK}"))
            }
        }
    }

    async fn way_back(&self, leader: NodeId, node: NodeId, state: &StageState) -> Result<Checkpoint, String> {
        let Some(commit) = &self.committed else {
            return match &self.holds_other {
                Some(reason) => Err(reason.clone()),
                None => self.tools.startup((leader, &self.model(leader)), (node, &self.model(node))).await,
            };
        };
        if let Some(current) = state.current.as_ref().filter(|current| current.id == *commit.weights_id())
            && self.request.retain == Retain::Memory
        {
            return Ok(current.checkpoint.clone());
        }
        if !commit.checkpoint.extents.is_empty() {
            return Err(format!(
                "{} does not keep the current weights, {}, in memory",
                self.tools.stages.name(node),
                commit.version
            ));
        }
        self.tools.verify(&commit.checkpoint).await.map_err(|error| {
            let path = &commit.checkpoint.path;
            format!("the directory of the current weights, {path}, cannot be used: {error}")
        })?;
        Ok(commit.checkpoint.clone())
    }
}

impl Tools {
    /// The checkpoint that the engines of a node were started from, as the leader knows it.
    pub(super) async fn startup(
        &self,
        (leader, leaders): (NodeId, &CheckpointDir),
        (node, own): (NodeId, &CheckpointDir),
    ) -> Result<Checkpoint, String> {
        let model = leaders.clone();
        let found = self.look(move |known, cancel| known.startup(&model, cancel)).await?;
        if node == leader {
            return Ok(found);
        }
        let (ours, theirs) = (self.stages.probe(leader, leaders).await?, self.stages.probe(node, own).await?);
        if ours.is_none() || ours != theirs {
            return Err(format!(
                "{} was started from other files in {} than the leader in {}",
                self.stages.name(node),
                own.path,
                leaders.path
            ));
        }
        Ok(Checkpoint { path: own.path.clone(), ..found })
    }
}
