//! Work in the background that takes more than one call: looking at engines, staging, and bringing engines to the
//! committed weights.

use futures::future::OptionFuture;

use super::super::handles::CheckpointDir;
use super::nodes::no_checkpoints;
use super::*;

/// How often a directory that is not there is looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Asks the engines' shims who they are, then stages on all nodes.
pub(super) struct StageJob {
    pub(super) tools: Arc<Tools>,
    pub(super) id: UpdateId,
    pub(super) version: WeightVersion,
    pub(super) request: UpdateRequest,
    /// What the engines hold; none: the start-up checkpoint.
    pub(super) committed: Option<Commit>,
    /// In the order of the chain: the leader first.
    pub(super) nodes: Vec<NodeId>,
    pub(super) engines: Vec<(RankHandle, NodeId, Option<EngineInfo>)>,
    /// Start-up checkpoint of each node: found by the job.
    pub(super) models: BTreeMap<NodeId, CheckpointDir>,
    /// Why an engine did not begin with it: found by the job.
    pub(super) holds_other: Option<String>,
    /// Parameters that are one tensor in every engine: found by the job.
    pub(super) tied: Vec<(String, String)>,
}

impl StageJob {
    pub(super) async fn run(mut self) -> Result<(Staging, Extra), (NodeId, String)> {
        let infos = self.ask_shims().await?;
        let leader = self.leader();
        let model = self.model(leader);
        let adapters = self.prepare_adapters().await?;
        let startup = match self.committed {
            None if !self.request.has_weights() => {
                let found = match &self.holds_other {
                    Some(reason) => Err(reason.clone()),
                    None => self.tools.startup((leader, &model), (leader, &model)).await,
                };
                Some(found.map_err(|error| (leader, error))?)
            }
            _ => None,
        };
        let nodes = match self.request.has_weights() {
            true => self.stage_weights().await?,
            false => no_checkpoints(&self.nodes),
        };
        let draft = infos.iter().find_map(|(rank, info)| Some((rank, info.as_ref()?.keeps_draft()?)));
        let draft = draft.filter(|_| self.request.has_weights());
        let warnings = draft.map(|(rank, text)| format!("rank {rank}: {text}")).into_iter().collect();
        let staging =
            Staging { nodes, adapters: adapters.changes, startup, model_path: model.path, warnings };
        Ok((staging, Extra { guard: None, infos, adapters: adapters.on_nodes }))
    }

    async fn ask_shims(&mut self) -> Result<Infos, (NodeId, String)> {
        let limit = self.tools.config.call_timeout;
        let asked = self.engines.iter().map(async |(handle, node, info)| {
            let info = match info {
                Some(info) => Ok(info.clone()),
                None => shim::info(handle, limit).await,
            };
            let failed = |error| (*node, format!("rank {}: {error}", handle.rank));
            info.map(|info| (handle.rank, *node, info)).map_err(failed)
        });
        let answers = join_all(asked).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        for (rank, node, info) in &answers {
            let model = self.models.entry(*node).or_insert_with(|| info.model());
            if *model != info.model() {
                let (one, other) = (&model.path, &info.model_path);
                let error = format!("engines were started from different checkpoints: {one} and {other}");
                return Err((*node, error));
            }
            let of_rank = |reason: String| format!("rank {rank}: {reason}");
            if let Some(reason) = info.refuses() {
                return Err((*node, of_rank(reason)));
            }
            if let (true, Some(reason)) =
                (self.request.has_weights() && !self.request.allow_stale_kv, info.keeps_kv())
            {
                let way = "--allow-stale-kv, if nobody asks twice with the same beginning or the store is emptied by hand";
                return Err((*node, format!("{}: update with {way}", of_rank(reason))));
            }
            self.holds_other = self.holds_other.take().or_else(|| info.holds_other().map(of_rank));
        }
        let mut infos = answers.iter().map(|(.., info)| info);
        self.tied = infos.next().map(|info| info.tied.clone()).unwrap_or_default();
        infos.for_each(|info| self.tied.retain(|pair| info.tied.contains(pair)));
        Ok(answers.into_iter().map(|(rank, _, info)| (rank, Some(info))).collect())
    }

    async fn read_anyway(&self, directory: CheckpointDir) -> Result<CheckpointDir, String> {
        let read = move |_: &Known, _: &AtomicBool| match directory.manifest() {
            Ok(_) => Ok(directory),
            Err(error) => Err(error.to_string()),
        };
        self.tools.look(read).await
    }

    pub(super) fn leader(&self) -> NodeId {
        self.nodes.first().copied().unwrap_or_default()
    }

    /// The checkpoint that the engines of a node were started from.
    pub(super) fn model(&self, node: NodeId) -> CheckpointDir {
        self.models.get(&node).cloned().unwrap_or_default()
    }

    /// Which files of a directory count, as vLLM's loader in an engine of the node says.
    pub(super) async fn resolve(&self, node: NodeId, path: &str) -> Result<CheckpointDir, String> {
        let unasked = CheckpointDir { path: path.to_owned(), files: None };
        let Some((handle, ..)) = self.engines.iter().find(|(_, of, _)| *of == node) else {
            return Ok(unasked);
        };
        if !Path::new(path).is_dir() {
            // vLLM would take it for a name on a hub.
            return self.read_anyway(unasked).await;
        }
        let error = match shim::directory(handle, path, self.tools.config.call_timeout).await {
            Ok(directory) => return self.tools.look(|_, _| directory.meant().map(|()| directory)).await,
            Err(error) => error,
        };
        // What is wrong with the directory is said better here.
        self.read_anyway(unasked).await?;
        Err(format!("rank {}: vLLM does not read {path}: {error}", handle.rank))
    }

    /// For each part of it.
    pub(super) fn limit(&self) -> Duration {
        self.tools.config.machine.stage_timeout + SLACK
    }
}

impl Tools {
    /// Looks at directories, which blocks, on a thread of its own.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Known, &AtomicBool) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let (known, cancel) = (self.known.clone(), self.cancel.clone());
        let seen = tokio::task::spawn_blocking(move || look(&known, &cancel)).await;
        seen.map_err(|error| error.to_string())?
    }

    /// Whether a directory still holds what it held when it was committed.
    pub(super) async fn verify(&self, checkpoint: &Checkpoint) -> Result<(), String> {
        let checkpoint = checkpoint.clone();
        self.look(move |known, cancel| known.verify(&checkpoint, cancel)).await
    }

    pub(super) fn node_of(&self, rank: EngineIndex) -> NodeId {
        self.node_of.get(&rank).copied().unwrap_or_default()
    }

    pub(super) fn handles<'a>(&self, ranks: impl IntoIterator<Item = &'a EngineIndex>) -> Vec<RankHandle> {
        ranks.into_iter().filter_map(|rank| self.ranks.get(rank).cloned()).collect()
    }

    /// Opens the gates of ranks; `closed`: only of those that are known to be closed.
    pub(super) async fn open_gates(
        &self,
        ranks: impl Iterator<Item = &EngineIndex> + Send,
        closed: bool,
    ) -> Result<(), String> {
        let mut gates = self.handles(ranks);
        gates.retain(|handle| !closed || !handle.snapshot.borrow().admission_open);
        actions::admission(&gates, true, TELL_LIMIT).await
    }

    /// Asks engines, and their nodes, what can be known of them.
    pub(super) async fn inspect(
        &self,
        engines: &Engines,
        adopted: bool,
        directory: Option<&Checkpoint>,
    ) -> (Found, Infos) {
        let limit = self.config.call_timeout;
        let handles = self.handles(engines.keys());
        let asked = handles.iter().map(async |handle| {
            let paused = async {
                if !adopted {
                    return false;
                }
                match handle.call("is_scheduler_paused", Vec::new(), limit).await {
                    Ok(answer) => answer.as_bool() == Some(true),
                    // It cannot be paused either.
                    Err(error) if engine_calls::is_unknown_method(&error) => false,
                    Err(error) => {
                        warn!(rank = handle.rank.0, %error, "it is not known whether the engine is paused");
                        true
                    }
                }
            };
            let stamp = async {
                let asked = adopted.then(|| handle.call("get_weight_version", Vec::new(), limit));
                let answer = OptionFuture::from(asked).await?.ok()?;
                Some(WeightVersion(answer.as_str()?.to_owned()))
            };
            let (info, paused, stamp) = futures::join!(shim::info(handle, limit), paused, stamp);
            (handle.rank, info, paused, stamp)
        });
        let nodes: BTreeSet<NodeId> = engines.keys().map(|rank| self.node_of(*rank)).collect();
        let seen = nodes.iter().map(async |node| match directory {
            Some(directory) => self.lacks(*node, directory).await,
            None => false,
        });
        let (answers, missing) = futures::join!(join_all(asked), join_all(seen));
        let mut found = Found { missing: missing.contains(&true), ..Found::default() };
        let mut infos = Infos::new();
        for (rank, info, paused, stamp) in answers {
            found.stamps.extend(stamp.map(|stamp| (rank, stamp)));
            if paused {
                found.paused.insert(rank);
            }
            let model = match info {
                Ok(info) => {
                    let (shim, vllm) = (&info.shim_version, &info.vllm_version);
                    info!(rank = rank.0, shim, vllm, "the shim answers");
                    let model = info.model_path.clone();
                    infos.insert(rank, Some(info));
                    Ok(model)
                }
                Err(error) => {
                    warn!(rank = rank.0, "weights of this engine cannot be updated: {error}");
                    infos.insert(rank, None);
                    Err(error)
                }
            };
            found.models.insert(rank, model);
        }
        (found, infos)
    }

    /// A node says that it cannot find a directory, also at the end of the start. A node that does not answer does not.
    async fn lacks(&self, node: NodeId, committed: &Checkpoint) -> bool {
        let until = self.began + self.config.startup_timeout;
        let path = &committed.path;
        let directory = CheckpointDir { path: path.clone(), files: Some(committed.files.clone()) };
        let mut told = false;
        loop {
            let lacks = match self.stages.has_stage(node) {
                true => matches!(self.stages.probe(node, &directory).await, Ok(None)),
                false => matches!(tokio::fs::try_exists(path).await, Ok(false)),
            };
            if !lacks || Instant::now() >= until {
                return lacks;
            }
            if !std::mem::replace(&mut told, true) {
                let (node, limit) = (self.stages.name(node), self.config.startup_timeout);
                warn!(
                    path,
                    ?limit,
                    "{node} does not find the committed weights yet: is a file system missing?"
                );
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Brings engines to the committed weights. The error names the rank.
    pub(super) async fn restore(
        &self,
        engines: &Engines,
        committed: &Committed,
        infos: &Infos,
    ) -> Result<(), (EngineIndex, String)> {
        let info = |rank: &EngineIndex| infos.get(rank).and_then(Option::as_ref);
        let mut checkpoints: BTreeMap<NodeId, Checkpoint> = BTreeMap::new();
        for rank in engines.keys() {
            let node = self.node_of(*rank);
            if checkpoints.contains_key(&node) {
                continue;
            }
            let model = info(rank).map(EngineInfo::model).unwrap_or_default();
            let found = self.committed_in(node, &committed.commit, &model).await;
            checkpoints.insert(node, found.map_err(|reason| (*rank, reason))?);
        }
        let loads = self.handles(engines.keys()).into_iter().map(async |handle| {
            let node = self.node_of(handle.rank);
            let checkpoint = checkpoints.get(&node).unwrap_or(&committed.commit.checkpoint);
            let loaded =
                self.load_committed(&handle, &committed.commit, checkpoint, info(&handle.rank)).await;
            loaded.map_err(|reason| (handle.rank, reason))
        });
        join_all(loads).await.into_iter().collect()
    }

    async fn load_committed(
        &self,
        handle: &RankHandle,
        commit: &Commit,
        checkpoint: &Checkpoint,
        info: Option<&EngineInfo>,
    ) -> Result<(), String> {
        let limit = self.config.machine.load_timeout;
        if info.is_some_and(|info| checkpoint.path == info.model_path) {
            // The engine has read that directory itself; it must still be what was committed.
            self.verify(checkpoint).await?;
        } else {
            info!(
                rank = handle.rank.0, version = %commit.version, path = checkpoint.path,
                "loading the committed weights"
            );
            let workers = shim::load(handle, &commit.id, checkpoint, limit).await?;
            if workers.is_empty() {
                return Err("no worker answered to the load".to_owned());
            }
            if let Some(fault) = workers.iter().find_map(|w| w.fault(checkpoint)) {
                return Err(fault);
            }
        }
        if !commit.adapters.is_empty() {
            self.bring_adapters(handle, &commit.id, &commit.adapters, limit).await?;
        }
        if !shim::stamp(handle, info, &commit.version, self.config.call_timeout).await? {
            warn!(rank = handle.rank.0, "outputs do not carry the weight version: its vllm is too old");
        }
        Ok(())
    }

    /// What engines of a node load to hold the committed weights.
    async fn committed_in(
        &self,
        node: NodeId,
        commit: &Commit,
        model: &CheckpointDir,
    ) -> Result<Checkpoint, String> {
        if commit.checkpoint.extents.is_empty() {
            return Ok(commit.checkpoint.clone());
        }
        self.stages.ensure(node, commit, model, self.config.machine.stage_timeout).await
    }

    /// The same for engines that are taken over, which may have to go back to the start-up checkpoint.
    pub(super) async fn committed_on(
        &self,
        node: NodeId,
        committed: Option<&Committed>,
        before: Option<Checkpoint>,
        infos: &Infos,
    ) -> Result<Checkpoint, String> {
        let info = |node| {
            let mut there = infos.iter().filter(|(rank, _)| self.node_of(**rank) == node);
            there.find_map(|(_, info)| info.as_ref())
        };
        let model = |node| info(node).map(EngineInfo::model).unwrap_or_default();
        match (committed, before) {
            (Some(committed), _) => self.committed_in(node, &committed.commit, &model(node)).await,
            (None, Some(before)) => Ok(before),
            (None, None) => {
                let leader = self.stages.in_order(self.node_of.values().copied().collect());
                let leader = leader.first().copied().unwrap_or(node);
                let (own, leaders) = (model(node), model(leader));
                if let Some(reason) = info(node).and_then(EngineInfo::holds_other) {
                    return Err(reason);
                }
                self.startup((leader, &leaders), (node, &own)).await
            }
        }
    }

    /// Keeps an engine from serving, and has it started again. False: it is not certain that it does not serve.
    pub(super) async fn fence(&self, rank: EngineIndex, incarnation: Incarnation, why: String) -> bool {
        let handle = self.ranks.get(&rank).cloned();
        let down = EngineDown { incarnation, reason: format!("fenced: {why}") };
        let request = FenceRequest { rank, incarnation, reason: why };
        let tell = async {
            if let Some(handle) = &handle
                && let Err(error) = handle.commands.tell(down).await
            {
                error!(rank = rank.0, %error, "fenced engine");
            }
            if self.fences.send(request).await.is_err() {
                error!(rank = rank.0, "no task restarts the fenced engine");
            }
        };
        if tokio::time::timeout(TELL_LIMIT, tell).await.is_err() {
            error!(rank = rank.0, limit = ?TELL_LIMIT, "fencing took too long");
        }
        let Some(mut snapshot) = handle.map(|handle| handle.snapshot) else {
            return false;
        };
        let down = snapshot.wait_for(|now| now.incarnation > incarnation || !now.admitted);
        tokio::time::timeout(self.config.machine.admission_timeout * 2, down).await.is_ok()
    }
}
