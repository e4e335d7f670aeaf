//! LoRA adapters in the transaction: checked while engines serve, changed while they are paused, taken back by the
//! engines themselves, brought to those that come later.

use std::path::Path;

use dp_sidecar_protocol::machine::weight_update::{Adapter, WorkerReport, WorkerState};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};

use super::super::handles::{ADAPTER_FILE, AdapterPlace};

use super::lora::{LoraOp, LoraRequest, LoraState, lora};
use super::*;
use crate::api::Chunks;

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

/// What is needed to prepare adapters.
pub(super) struct Preparation<'a> {
    pub(super) id: &'a UpdateId,
    pub(super) stages: &'a Stages,
    pub(super) nodes: &'a [NodeId],
    pub(super) engines: &'a [(RankHandle, NodeId)],
    pub(super) known: &'a Known,
    /// Directory of the checkpoint that the engines were started from.
    pub(super) model_path: &'a Path,
    pub(super) cancel: &'a Arc<std::sync::atomic::AtomicBool>,
    pub(super) notes: &'a mpsc::Sender<UpdateEvent>,
    pub(super) limit: Duration,
}

impl Preparation<'_> {
    /// Reads the adapters on the leader, brings them to every node, and has every engine check them. Nothing that
    /// serves is touched.
    pub(super) async fn run(&self, changes: &[AdapterChange]) -> Result<Prepared, (NodeId, String)> {
        let leader = self.stages.leader();
        let mut all = Changes::new();
        for change in changes {
            let adapter = match &change.path {
                Some(path) => {
                    let read = self.read(path).await;
                    Some(read.map_err(|error| (leader, error))?)
                }
                None => None,
            };
            if all.insert(change.name.clone(), adapter).is_some() {
                return Err((leader, format!("adapter {} is named twice", change.name)));
            }
        }
        let placed = self.nodes.iter().map(async |node| {
            let changes = tokio::time::timeout(self.limit, self.place(*node, &all)).await;
            let late =
                |_| Err(format!("{} has no adapters within {:?}", self.stages.name(*node), self.limit));
            changes.unwrap_or_else(late).map(|changes| (*node, changes)).map_err(|error| (*node, error))
        });
        let on_nodes: BTreeMap<NodeId, Changes> =
            futures::future::try_join_all(placed).await?.into_iter().collect();
        let checks = self.engines.iter().map(async |(engine, node)| {
            for (name, adapter) in on_nodes.get(node).into_iter().flatten() {
                let Some(adapter) = adapter else { continue };
                let request = request(self.id, LoraOp::Check, name, Some(adapter));
                let checked = send(engine, &request, self.limit).await;
                checked.map_err(|(_, error)| (*node, format!("rank {}: {error}", engine.rank)))?;
            }
            Ok::<(), (NodeId, String)>(())
        });
        futures::future::try_join_all(checks).await?;
        Ok(Prepared { changes: all, on_nodes })
    }

    async fn read(&self, path: &Path) -> Result<Adapter, String> {
        let (known, cancel) = (self.known.clone(), self.cancel.clone());
        let (path, model) = (path.to_owned(), self.model_path.to_owned());
        let read = tokio::task::spawn_blocking(move || known.adapter(&path, &model, &cancel)).await;
        let (checkpoint, config) = read.map_err(|error| error.to_string())??;
        Ok(Adapter { update: self.id.clone(), checkpoint, config })
    }

    async fn place(&self, node: NodeId, changes: &Changes) -> Result<Changes, String> {
        let mut placed = Changes::new();
        for (name, adapter) in changes {
            let adapter = match adapter {
                Some(adapter) => {
                    let began = Instant::now();
                    let tell = |done, total| self.tell(node, began, done, total);
                    let placed = on_node(self.stages, node, adapter, &tell).await;
                    Some(placed.map_err(|error| format!("adapter {name}: {error}"))?)
                }
                None => None,
            };
            placed.insert(name.clone(), adapter);
        }
        Ok(placed)
    }

    fn tell(&self, node: NodeId, began: Instant, done: u64, total: u64) {
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
        let name = self.stages.name(node);
        self.notes.try_send(UpdateEvent::Staging { node, name, progress, rate }).ok();
    }
}

/// Makes sure that a node has an adapter; gives it as engines of that node are to load it. A node that finds it neither
/// in its store nor in the directory it came from gets it from the leader's store.
pub(super) async fn on_node(
    stages: &Stages,
    node: NodeId,
    adapter: &Adapter,
    tell: &(dyn Fn(u64, u64) + Sync),
) -> Result<Adapter, String> {
    let Some(digest) = adapter.checkpoint.digest.as_deref().filter(|_| stages.has_stage(node)) else {
        return Ok(adapter.clone());
    };
    let source = &adapter.checkpoint.path;
    let path = match stages.take_adapter(node, digest, source).await? {
        AdapterPlace::Here { path } => path,
        AdapterPlace::Lacks { from } => {
            let leader = stages.leader();
            let own = match stages.take_adapter(leader, digest, source).await? {
                AdapterPlace::Here { path } => path,
                AdapterPlace::Lacks { .. } => {
                    return Err(format!(
                        "{}: it is not in {source} any more, and not kept here",
                        stages.name(leader)
                    ));
                }
            };
            pass_on(stages, node, digest, &Path::new(&own).join(ADAPTER_FILE), from, tell).await?
        }
    };
    Ok(Adapter { checkpoint: Checkpoint { path, ..adapter.checkpoint.clone() }, ..adapter.clone() })
}

/// Sends what a node lacks of a file, in pieces.
async fn pass_on(
    stages: &Stages,
    node: NodeId,
    digest: &str,
    file: &Path,
    mut from: u64,
    tell: &(dyn Fn(u64, u64) + Sync),
) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("reading {}: {error}", file.display());
    let mut open = tokio::fs::File::open(file).await.map_err(failed)?;
    let size = open.metadata().await.map_err(failed)?.len();
    info!(digest, size, from, to = stages.name(node), "passing an adapter on");
    let mut repeats = REPEATS;
    loop {
        let count = size.saturating_sub(from).min(PIECE);
        let mut piece = vec![0; usize::try_from(count).unwrap_or_default()];
        open.seek(std::io::SeekFrom::Start(from)).await.map_err(failed)?;
        open.read_exact(&mut piece).await.map_err(failed)?;
        let next = match stages.adapter_piece(node, digest, (from, size), piece.into()).await? {
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
                return Err(format!("{} takes no bytes of the adapter", stages.name(node)));
            }
        }
        from = next;
        tell(from.min(size), size);
    }
}

/// Makes the changes on a paused engine. The report stands for all its workers.
pub(super) async fn apply(
    engine: &RankHandle,
    id: &UpdateId,
    changes: &Changes,
    limit: Duration,
) -> WorkerReport {
    let mut touched = false;
    for (name, adapter) in changes {
        let op = if adapter.is_some() { LoraOp::Replace } else { LoraOp::Remove };
        match send(engine, &request(id, op, name, adapter.as_ref()), limit).await {
            Ok(()) => touched = true,
            Err((state, error)) => {
                let unchanged = state == LoraState::Unchanged && !touched;
                let state = if unchanged { WorkerState::Unchanged } else { WorkerState::Mixed };
                let error_kind = Some("adapter".to_owned());
                return WorkerReport { state, error: Some(error), error_kind, ..WorkerReport::default() };
            }
        }
    }
    WorkerReport { ok: true, state: WorkerState::Loaded, ..WorkerReport::default() }
}

/// Takes the changes back.
pub(super) async fn undo(
    engine: &RankHandle,
    id: &UpdateId,
    changes: &Changes,
    limit: Duration,
) -> WorkerReport {
    for name in changes.keys() {
        if let Err((_, error)) = send(engine, &request(id, LoraOp::Undo, name, None), limit).await {
            let error_kind = Some("adapter".to_owned());
            return WorkerReport { error: Some(error), error_kind, ..WorkerReport::default() };
        }
    }
    WorkerReport { ok: true, state: WorkerState::Loaded, ..WorkerReport::default() }
}

/// Brings an engine to the committed adapters, whatever it has.
pub(super) async fn bring(
    engine: &RankHandle,
    id: &UpdateId,
    committed: &BTreeMap<String, Adapter>,
    (stages, node): (&Stages, NodeId),
    limit: Duration,
) -> Result<(), String> {
    let listed = lora(engine, &request(id, LoraOp::List, "", None), limit).await?;
    let there: BTreeSet<String> =
        listed.iter().flat_map(|worker| &worker.adapters).map(|adapter| adapter.name.clone()).collect();
    for name in there.iter().filter(|name| !committed.contains_key(*name)) {
        let removed = send(engine, &request(id, LoraOp::Remove, name, None), limit).await;
        removed.map_err(|(_, error)| error)?;
    }
    for (name, adapter) in committed {
        let placed = tokio::time::timeout(limit, on_node(stages, node, adapter, &|_, _| ())).await;
        let late = |_| Err(format!("{} does not have it within {limit:?}", stages.name(node)));
        let adapter = placed.unwrap_or_else(late).map_err(|error| format!("adapter {name}: {error}"))?;
        let request = request(&adapter.update, LoraOp::Replace, name, Some(&adapter));
        send(engine, &request, limit).await.map_err(|(_, error)| error)?;
    }
    Ok(())
}

fn request(id: &UpdateId, op: LoraOp, name: &str, adapter: Option<&Adapter>) -> LoraRequest {
    LoraRequest {
        id: id.clone(),
        op,
        name: name.to_owned(),
        source: adapter.map(|adapter| adapter.checkpoint.clone()),
        config: adapter.map(|adapter| adapter.config.clone()),
    }
}

/// The first fault, and the worst state that a worker is left in.
async fn send(
    engine: &RankHandle,
    request: &LoraRequest,
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
