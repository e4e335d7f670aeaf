//! LoRA adapters in the transaction: checked while engines serve, changed while they are paused, taken back by the
//! engines themselves, brought to those that come later.

use std::path::Path;

use dp_sidecar_protocol::machine::weight_update::{Adapter, Target, WorkerReport, WorkerState};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use super::super::handles::{ADAPTER_FILE, AdapterPlace, StageRequest};

use super::jobs::StageJob;
use super::lora::{LoraOp, LoraRequest, LoraState, lora};
use super::*;
use crate::api::Chunks;
use crate::files;

/// Bytes of a piece. Other messages of the peer link wait for one at most.
const PIECE: u64 = 512 << 10;
/// Pieces in a row that may bring a node no further.
const REPEATS: u32 = 3;

/// What an update does: the adapter that a name gets, or none.
pub(super) type Changes = BTreeMap<String, Option<Adapter>>;

/// The adapters of an update, everywhere.
#[derive(Clone, Debug, Default)]
pub(super) struct Prepared {
    /// With the directories that the update named.
    pub(super) changes: Changes,
    /// With the directories that engines of each node load from.
    pub(super) on_nodes: BTreeMap<NodeId, Changes>,
}

impl StageJob {
    /// Reads the adapters on the leader, brings them to every node, and has every engine check them. Nothing that
    /// serves is touched.
    pub(super) async fn prepare_adapters(&self) -> Result<Prepared, (NodeId, String)> {
        let stages = &self.tools.stages;
        let (leader, limit) = (stages.leader(), self.limit());
        let mut all = Changes::new();
        for change in &self.request.adapters {
            let adapter = match &change.path {
                Some(path) => {
                    self.name_is_free(&change.name).map_err(|error| (leader, error))?;
                    let read = self.read(path).await;
                    Some(read.map_err(|error| (leader, error))?)
                }
                None => {
                    self.holds_adapter(&change.name).map_err(|error| (leader, error))?;
                    None
                }
            };
            if all.insert(change.name.clone(), adapter).is_some() {
                return Err((leader, format!("adapter {} is named twice", change.name)));
            }
        }
        let placed = self.nodes.iter().map(async |node| {
            let changes = tokio::time::timeout(limit, self.place(*node, &all)).await;
            let late = |_| Err(format!("{} has no adapters within {limit:?}", stages.name(*node)));
            changes.unwrap_or_else(late).map(|changes| (*node, changes)).map_err(|error| (*node, error))
        });
        let on_nodes: BTreeMap<NodeId, Changes> =
            futures::future::try_join_all(placed).await?.into_iter().collect();
        let checks = self.engines.iter().map(async |(engine, node, _)| {
            for (name, adapter) in on_nodes.get(node).into_iter().flatten() {
                let Some(adapter) = adapter else { continue };
                let request = LoraRequest { id: &self.id, op: LoraOp::Check, name, adapter: Some(adapter) };
                let checked = send(engine, &request, limit).await;
                checked.map_err(|(_, error)| (*node, format!("rank {}: {error}", engine.rank)))?;
            }
            Ok::<(), (NodeId, String)>(())
        });
        futures::future::try_join_all(checks).await?;
        Ok(Prepared { changes: all, on_nodes })
    }

    fn name_is_free(&self, name: &str) -> Result<(), String> {
        if !self.tools.config.served_names.iter().any(|served| served == name) {
            return Ok(());
        }
        Err(format!(
            "{name} is the name of the model itself (--served-model-name): no request for it would reach an adapter. \
             --lora OTHER=DIR gives it another name, and --path DIR updates the model"
        ))
    }

    fn holds_adapter(&self, name: &str) -> Result<(), String> {
        let adapters = self.committed.as_ref().map(|commit| &commit.adapters);
        if adapters.is_some_and(|adapters| adapters.contains_key(name)) {
            return Ok(());
        }
        let known = adapters.into_iter().flatten().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        Err(format!(
            "no update has brought an adapter {name}: there is nothing to remove (known adapters: {known})"
        ))
    }

    async fn read(&self, path: &Path) -> Result<Adapter, String> {
        let model = self.models.get(&self.leader()).or_else(|| self.models.values().next());
        let model = model.cloned().unwrap_or_default();
        let path = path.to_owned();
        let read = self.tools.look(move |known, cancel| known.adapter(&path, &model, cancel)).await;
        let (checkpoint, config) = read?;
        Ok(Adapter { update: self.id.clone(), checkpoint, config })
    }

    async fn place(&self, node: NodeId, changes: &Changes) -> Result<Changes, String> {
        let mut placed = Changes::new();
        for (name, adapter) in changes {
            let adapter = match adapter {
                Some(adapter) => {
                    let began = Instant::now();
                    let tell = |done, total| self.tell_of_adapter(node, began, done, total);
                    let placed = self.tools.place_adapter(node, adapter, &tell).await;
                    Some(placed.map_err(|error| format!("adapter {name}: {error}"))?)
                }
                None => None,
            };
            placed.insert(name.clone(), adapter);
        }
        Ok(placed)
    }

    fn tell_of_adapter(&self, node: NodeId, began: Instant, done: u64, total: u64) {
        let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let progress = StageProgress {
            done,
            total,
            chunks: Chunks { done: done.div_ceil(PIECE), total: total.div_ceil(PIECE) },
            received: done,
            ms,
            ..StageProgress::default()
        };
        let rate = done.saturating_mul(1000) / ms.max(1);
        let name = self.tools.stages.name(node);
        self.tools.notes.try_send(UpdateEvent::Staging { node, name, progress, rate }).ok();
    }
}

impl Tools {
    /// Makes sure that a node has an adapter; gives it as engines of that node are to load it. A node that finds it neither
    /// in its store nor in the directory it came from gets it from the leader's store.
    async fn place_adapter(
        &self,
        node: NodeId,
        adapter: &Adapter,
        tell: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Adapter, String> {
        let Some(digest) = adapter.checkpoint.digest.as_deref().filter(|_| self.stages.has_stage(node))
        else {
            return Ok(adapter.clone());
        };
        let source = &adapter.checkpoint.path;
        let take = || StageRequest::TakeAdapter { digest: digest.to_owned(), path: Some(source.clone()) };
        let path = match self.stages.adapter(node, take()).await? {
            AdapterPlace::Here { path } => path,
            AdapterPlace::Lacks { from } => {
                let leader = self.stages.leader();
                let own = match self.stages.adapter(leader, take()).await? {
                    AdapterPlace::Here { path } => path,
                    AdapterPlace::Lacks { .. } => {
                        return Err(format!(
                            "{}: it is not in {source} any more, and not kept here",
                            self.stages.name(leader)
                        ));
                    }
                };
                self.pass_adapter_on(node, digest, &Path::new(&own).join(ADAPTER_FILE), from, tell).await?
            }
        };
        Ok(Adapter { checkpoint: Checkpoint { path, ..adapter.checkpoint.clone() }, ..adapter.clone() })
    }

    /// Sends what a node lacks of a file, in pieces.
    async fn pass_adapter_on(
        &self,
        node: NodeId,
        digest: &str,
        file: &Path,
        mut from: u64,
        tell: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<String, String> {
        let failed = |error: std::io::Error| format!("reading {}: {error}", file.display());
        let mut open = tokio::fs::File::from_std(files::open_regular(file).map_err(failed)?);
        let size = open.metadata().await.map_err(failed)?.len();
        info!(digest, size, from, to = self.stages.name(node), "passing an adapter on");
        let mut repeats = REPEATS;
        loop {
            let count = size.saturating_sub(from).min(PIECE);
            let mut piece = vec![0; usize::try_from(count).unwrap_or_default()];
            open.seek(std::io::SeekFrom::Start(from)).await.map_err(failed)?;
            open.read_exact(&mut piece).await.map_err(failed)?;
            let (digest, bytes) = (digest.to_owned(), piece.into());
            let piece = StageRequest::AdapterPiece { digest, offset: from, size, bytes };
            let next = match self.stages.adapter(node, piece).await? {
                AdapterPlace::Here { path } => {
                    tell(size, size);
                    return Ok(path);
                }
                AdapterPlace::Lacks { from } => from,
            };
            if next <= from {
                // What it had was of no use. Once may be, not for ever.
                repeats -= 1;
                if repeats == 0 {
                    return Err(format!("{} takes no bytes of the adapter", self.stages.name(node)));
                }
            }
            from = next;
            tell(from.min(size), size);
        }
    }

    /// Brings an engine to the committed adapters, whatever it has.
    pub(super) async fn bring_adapters(
        &self,
        engine: &RankHandle,
        id: &UpdateId,
        committed: &BTreeMap<String, Adapter>,
        limit: Duration,
    ) -> Result<(), String> {
        let node = self.node_of(engine.rank);
        let list = LoraRequest { id, op: LoraOp::List, name: "", adapter: None };
        let listed = lora(engine, &list, limit).await?;
        let there: BTreeSet<String> =
            listed.iter().flat_map(|worker| &worker.adapters).map(|adapter| adapter.name.clone()).collect();
        for name in there.iter().filter(|name| !committed.contains_key(*name)) {
            let request = LoraRequest { id, op: LoraOp::Remove, name, adapter: None };
            send(engine, &request, limit).await.map_err(|(_, error)| error)?;
        }
        for (name, adapter) in committed {
            let placed = tokio::time::timeout(limit, self.place_adapter(node, adapter, &|_, _| ())).await;
            let late = |_| Err(format!("{} does not have it within {limit:?}", self.stages.name(node)));
            let adapter = placed.unwrap_or_else(late).map_err(|error| format!("adapter {name}: {error}"))?;
            let request =
                LoraRequest { id: &adapter.update, op: LoraOp::Replace, name, adapter: Some(&adapter) };
            send(engine, &request, limit).await.map_err(|(_, error)| error)?;
        }
        Ok(())
    }
}

/// Makes the changes on a paused engine, or takes them back. The report stands for all its workers.
pub(super) async fn change(
    engine: &RankHandle,
    id: &UpdateId,
    target: Target,
    changes: &Changes,
    limit: Duration,
) -> WorkerReport {
    let mut touched = false;
    for (name, adapter) in changes {
        let op = match (target, adapter) {
            (Target::Previous, _) => LoraOp::Undo,
            (Target::New, Some(_)) => LoraOp::Replace,
            (Target::New, None) => LoraOp::Remove,
        };
        let request = LoraRequest { id, op, name, adapter: adapter.as_ref() };
        match send(engine, &request, limit).await {
            Ok(()) => touched = true,
            Err((state, error)) => {
                let unchanged = state == LoraState::Unchanged && !touched && target == Target::New;
                let state = if unchanged { WorkerState::Unchanged } else { WorkerState::Mixed };
                let error_kind = Some("adapter".to_owned());
                return WorkerReport { state, error: Some(error), error_kind, ..WorkerReport::default() };
            }
        }
    }
    WorkerReport { ok: true, state: WorkerState::Loaded, ..WorkerReport::default() }
}

/// The first fault, and the worst state that a worker is left in.
async fn send(
    engine: &RankHandle,
    request: &LoraRequest<'_>,
    limit: Duration,
) -> Result<(), (LoraState, String)> {
    let workers = lora(engine, request, limit).await.map_err(|error| (LoraState::Mixed, error))?;
    if workers.is_empty() {
        return Err((LoraState::Mixed, "no worker answered".to_owned()));
    }
    let Some(fault) = workers.iter().find_map(|worker| worker.fault(request)) else {
        return Ok(());
    };
    let unchanged = workers.iter().all(|worker| worker.state == LoraState::Unchanged);
    Err((if unchanged { LoraState::Unchanged } else { LoraState::Mixed }, fault))
}
