//! Work in the background that takes more than one call: staging, and bringing engines to the committed
//! weights.

use std::path::Path;

use super::adapters::Preparation;
use super::nodes::NodesJob;
use super::*;

/// Asks the engines' shims who they are, then stages on all nodes.
pub(super) struct StageJob {
    pub(super) engines: Vec<(RankHandle, NodeId, Option<EngineInfo>)>,
    pub(super) call_timeout: Duration,
    /// Its model paths are found here.
    pub(super) nodes: NodesJob,
}

impl StageJob {
    pub(super) async fn run(mut self) -> Result<Staged, (NodeId, String)> {
        let limit = self.call_timeout;
        let handles: Vec<(RankHandle, NodeId)> =
            self.engines.iter().map(|(handle, node, _)| (handle.clone(), *node)).collect();
        let asked = self.engines.into_iter().map(async |(handle, node, info)| {
            let info = match info {
                Some(info) => Ok(info),
                None => shim::info(&handle, limit).await,
            };
            let failed = |error| (node, format!("rank {}: {error}", handle.rank));
            info.map(|info| (handle.rank, node, info)).map_err(failed)
        });
        let answers = join_all(asked).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        for (_, node, info) in &answers {
            let path = self.nodes.model_paths.entry(*node).or_insert_with(|| info.model_path.clone());
            if *path != info.model_path {
                let (one, other) = (path, &info.model_path);
                let error = format!("engines were started from different checkpoints: {one} and {other}");
                return Err((*node, error));
            }
        }
        let leader = self.nodes.nodes.first().copied().unwrap_or_default();
        let model_path = self.nodes.model_paths.get(&leader).cloned().unwrap_or_default();
        let any_path = self.nodes.model_paths.values().next().cloned().unwrap_or_default();
        let infos = answers.into_iter().map(|(rank, _, info)| (rank, info)).collect();
        let request = &self.nodes.request;
        let on_leader = |error| (leader, error);
        let preparation = Preparation {
            id: &self.nodes.id,
            stages: &self.nodes.stages,
            nodes: &self.nodes.nodes,
            engines: &handles,
            known: &self.nodes.known,
            model_path: Path::new(if model_path.is_empty() { &any_path } else { &model_path }),
            cancel: &self.nodes.cancel,
            notes: &self.nodes.notes,
            limit: self.nodes.limit,
        };
        let adapters = preparation.run(&request.adapters).await?;
        let mut startup = None;
        if !request.has_weights() && self.nodes.committed.is_none() {
            let at = (leader, model_path.as_str());
            let found =
                nodes::startup(&self.nodes.stages, &self.nodes.known, &self.nodes.cancel, at, at).await;
            startup = Some(found.map_err(on_leader)?);
        }
        Ok(Staged { nodes: self.nodes.run().await?, adapters, startup, infos, model_path })
    }
}

/// Brings engines to the committed weights.
pub(super) struct RestoreJob {
    pub(super) stages: Stages,
    pub(super) stage_timeout: Duration,
    pub(super) committed: Option<Committed>,
    /// No engine of this process holds the committed weights yet, so a journal that cannot be followed is
    /// better forgotten.
    pub(super) may_forget: bool,
    pub(super) call_timeout: Duration,
    pub(super) load_timeout: Duration,
    pub(super) known: Known,
    pub(super) cancel: Arc<std::sync::atomic::AtomicBool>,
}

impl RestoreJob {
    pub(super) async fn run(self, handles: Vec<(RankHandle, NodeId)>) -> Result<Restored, UpdateError> {
        let asked = handles
            .iter()
            .map(async |(handle, _)| (handle.rank, shim::info(handle, self.call_timeout).await));
        let answers = join_all(asked).await;
        let mut infos = BTreeMap::new();
        for (rank, answer) in answers {
            match (answer, &self.committed) {
                (Ok(info), _) => {
                    info!(
                        rank = rank.0,
                        shim = info.shim_version,
                        vllm = info.vllm_version,
                        "the shim answers"
                    );
                    infos.insert(rank, info);
                }
                (Err(error), None) => {
                    warn!(rank = rank.0, "weights of this engine cannot be updated: {error}");
                }
                (Err(reason), Some(committed)) => {
                    return Err(failed(rank, &committed.commit, reason));
                }
            }
        }
        let Some(committed) = &self.committed else {
            return Ok(Restored { infos, forget: None });
        };
        let commit = &committed.commit;
        if let Some(why) = self.not_to_be_followed(committed, &infos) {
            return Ok(Restored { infos, forget: Some(why) });
        }
        let model_path = |rank| infos.get(&rank).map(|info| info.model_path.as_str()).unwrap_or_default();
        let mut checkpoints: BTreeMap<NodeId, Checkpoint> = BTreeMap::new();
        for (handle, node) in &handles {
            if checkpoints.contains_key(node) {
                continue;
            }
            let path = model_path(handle.rank);
            let found = on_node(&self.stages, *node, commit, path, self.stage_timeout).await;
            match found {
                Ok(checkpoint) => checkpoints.insert(*node, checkpoint),
                Err(why) if self.may_forget => return Ok(Restored { infos, forget: Some(why) }),
                Err(reason) => return Err(failed(handle.rank, commit, reason)),
            };
        }
        let loads = handles.iter().map(async |(handle, node)| {
            let checkpoint = checkpoints.get(node).unwrap_or(&commit.checkpoint);
            self.bring((handle, *node), commit, checkpoint, model_path(handle.rank))
                .await
                .map_err(|reason| failed(handle.rank, commit, reason))
        });
        for result in join_all(loads).await {
            result?;
        }
        Ok(Restored { infos, forget: None })
    }

    fn not_to_be_followed(
        &self,
        committed: &Committed,
        infos: &BTreeMap<EngineIndex, EngineInfo>,
    ) -> Option<String> {
        if !self.may_forget {
            return None;
        }
        let other = infos.values().find(|info| info.model_path != committed.model_path);
        if let Some(info) = other {
            return Some(format!(
                "the state directory has weights committed for {}, but the engines run {}",
                committed.model_path, info.model_path
            ));
        }
        let path = &committed.commit.checkpoint.path;
        if !committed.commit.checkpoint.extents.is_empty() {
            return None;
        }
        (!std::path::Path::new(path).is_dir()).then(|| format!("the committed weights in {path} are gone"))
    }

    async fn bring(
        &self,
        (handle, node): (&RankHandle, NodeId),
        commit: &Commit,
        checkpoint: &Checkpoint,
        model_path: &str,
    ) -> Result<(), String> {
        if checkpoint.path == model_path {
            // The engine has read that directory itself; it must still be what was committed.
            let (known, cancel) = (self.known.clone(), self.cancel.clone());
            let checkpoint = checkpoint.clone();
            let verified = tokio::task::spawn_blocking(move || known.verify(&checkpoint, &cancel)).await;
            verified.map_err(|error| error.to_string())??;
        } else {
            info!(
                rank = handle.rank.0, version = %commit.version, path = checkpoint.path,
                "loading the committed weights"
            );
            let limit = self.load_timeout;
            let workers = shim::load(handle, &commit.id, checkpoint, limit).await?;
            if workers.is_empty() {
                return Err("no worker answered to the load".to_owned());
            }
            if let Some(fault) = workers.iter().find_map(|w| w.fault(checkpoint)) {
                return Err(fault);
            }
        }
        if !commit.adapters.is_empty() {
            let place = (&self.stages, node);
            adapters::bring(handle, &commit.id, &commit.adapters, place, self.load_timeout).await?;
        }
        let version = vec![commit.version.0.as_str().into()];
        if let Err(error) = handle.call("set_weight_version", version, self.call_timeout).await {
            // vLLM has the method since 0.27.1.
            warn!(rank = handle.rank.0, %error, "outputs do not carry the weight version");
        }
        Ok(())
    }
}

fn failed(rank: EngineIndex, commit: &Commit, reason: String) -> UpdateError {
    UpdateError::Restore { rank, version: commit.version.clone(), reason }
}

/// What engines of a node load to hold the committed weights.
pub(super) async fn on_node(
    stages: &Stages,
    node: NodeId,
    commit: &Commit,
    model_path: &str,
    limit: Duration,
) -> Result<Checkpoint, String> {
    if commit.checkpoint.extents.is_empty() {
        return Ok(commit.checkpoint.clone());
    }
    stages.ensure(node, commit, model_path, limit).await
}
