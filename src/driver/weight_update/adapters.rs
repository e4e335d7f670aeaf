//! LoRA adapters in the transaction: checked while engines serve, changed while they are paused, taken back by the
//! engines themselves, brought to those that come later.

use std::path::Path;

use dp_sidecar_protocol::machine::weight_update::{Adapter, WorkerReport, WorkerState};

use super::lora::{LoraOp, LoraRequest, LoraState, lora};
use super::types::AdapterChange;
use super::*;

/// What an update does: the adapter that a name gets, or none.
pub(super) type Changes = BTreeMap<String, Option<Adapter>>;

/// Reads the adapters on the leader and has every engine check them. Nothing is touched.
pub(super) async fn check(
    id: &UpdateId,
    changes: &[AdapterChange],
    engines: &[RankHandle],
    (known, cancel): (&Known, &Arc<std::sync::atomic::AtomicBool>),
    limit: Duration,
) -> Result<Changes, String> {
    let mut all = Changes::new();
    for change in changes {
        let adapter = match &change.path {
            Some(path) => Some(read(id, path, known, cancel).await?),
            None => None,
        };
        if all.insert(change.name.clone(), adapter).is_some() {
            return Err(format!("adapter {} is named twice", change.name));
        }
    }
    for (name, adapter) in &all {
        let Some(adapter) = adapter else {
            continue;
        };
        let request = request(id, LoraOp::Check, name, Some(adapter));
        let asked = engines.iter().map(async |engine| {
            let checked = send(engine, &request, limit).await;
            checked.map_err(|(_, error)| format!("rank {}: {error}", engine.rank))
        });
        futures::future::try_join_all(asked).await?;
    }
    Ok(all)
}

async fn read(
    id: &UpdateId,
    path: &Path,
    known: &Known,
    cancel: &Arc<std::sync::atomic::AtomicBool>,
) -> Result<Adapter, String> {
    let (known, cancel, path) = (known.clone(), cancel.clone(), path.to_owned());
    let read = tokio::task::spawn_blocking(move || known.adapter(&path, &cancel)).await;
    let (checkpoint, config) = read.map_err(|error| error.to_string())??;
    Ok(Adapter { update: id.clone(), checkpoint, config })
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
        let request = request(&adapter.update, LoraOp::Replace, name, Some(adapter));
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
