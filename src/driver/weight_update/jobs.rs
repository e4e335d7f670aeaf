//! Work in the background that takes more than one call: staging, and bringing engines to the committed
//! weights.

use super::*;

/// Checks the engines' shims, then the directories.
pub(super) struct StageJob {
    pub(super) source: PathBuf,
    pub(super) allow_no_rollback: bool,
    pub(super) committed: Option<Commit>,
    pub(super) engines: Vec<(RankHandle, Option<EngineInfo>)>,
    pub(super) call_timeout: Duration,
    pub(super) known: Known,
    pub(super) cancel: Arc<std::sync::atomic::AtomicBool>,
}

impl StageJob {
    pub(super) async fn run(self, events: Vec<mpsc::Sender<UpdateEvent>>) -> Result<Staged, String> {
        let limit = self.call_timeout;
        let asked = self.engines.into_iter().map(async |(handle, info)| {
            let info = match info {
                Some(info) => Ok(info),
                None => shim::info(&handle, limit).await,
            };
            info.map(|info| (handle.rank, info)).map_err(|error| format!("rank {}: {error}", handle.rank))
        });
        let infos: BTreeMap<EngineIndex, EngineInfo> =
            join_all(asked).await.into_iter().collect::<Result<_, _>>()?;
        let mut paths = infos.values().map(|info| info.model_path.clone());
        let model_path = paths.next().unwrap_or_default();
        if let Some(other) = paths.find(|path| *path != model_path) {
            return Err(format!("engines were started from different checkpoints: {model_path} and {other}"));
        }
        let job = Job {
            source: self.source,
            model_path: PathBuf::from(&model_path),
            committed: self.committed,
            allow_no_rollback: self.allow_no_rollback,
        };
        let checked = tokio::task::spawn_blocking(move || {
            let shown = AtomicU64::new(0);
            let progress = |progress: crate::manifest::Progress| {
                // About a hundred steps, and the last one.
                let step = (progress.total / 100).max(1);
                let before = shown.load(Ordering::Relaxed);
                if progress.done >= before + step || progress.done == progress.total {
                    shown.fetch_max(progress.done, Ordering::Relaxed);
                    let event = UpdateEvent::Hashing { done: progress.done, total: progress.total };
                    for events in &events {
                        events.try_send(event.clone()).ok();
                    }
                }
            };
            self.known.check(&job, &progress, &self.cancel)
        });
        let checked = checked.await.map_err(|error| error.to_string())??;
        Ok(Staged { checked, infos, model_path })
    }
}

/// Brings engines to the committed weights.
pub(super) struct RestoreJob {
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
    pub(super) async fn run(self, handles: Vec<RankHandle>) -> Result<Restored, UpdateError> {
        let asked =
            handles.iter().map(async |handle| (handle.rank, shim::info(handle, self.call_timeout).await));
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
        let loads = handles.iter().map(async |handle| {
            let model_path = infos.get(&handle.rank).map(|info| info.model_path.as_str());
            self.bring(handle, commit, model_path.unwrap_or_default())
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
        (!std::path::Path::new(path).is_dir()).then(|| format!("the committed weights in {path} are gone"))
    }

    async fn bring(&self, handle: &RankHandle, commit: &Commit, model_path: &str) -> Result<(), String> {
        if commit.checkpoint.path == model_path {
            // The engine has read that directory itself; it must still be what was committed.
            let (known, cancel) = (self.known.clone(), self.cancel.clone());
            let checkpoint = commit.checkpoint.clone();
            let verified = tokio::task::spawn_blocking(move || known.verify(&checkpoint, &cancel)).await;
            verified.map_err(|error| error.to_string())??;
        } else {
            info!(
                rank = handle.rank.0, version = %commit.version, path = commit.checkpoint.path,
                "loading the committed weights"
            );
            let limit = self.load_timeout;
            let workers = shim::load(handle, &commit.id, &commit.checkpoint, limit).await?;
            if workers.is_empty() {
                return Err("no worker answered to the load".to_owned());
            }
            if let Some(fault) = workers.iter().find_map(|w| w.fault(&commit.checkpoint)) {
                return Err(fault);
            }
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
