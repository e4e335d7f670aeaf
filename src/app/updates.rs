//! Between the admin socket's words for a weight update and the update task's.

use std::time::Duration;

use dp_sidecar_protocol::machine::weight_update::{Phase, RankRecord, RankState};
use dp_sidecar_protocol::{UpdateId, WeightVersion};
use tokio::sync::mpsc;

use crate::admin::types::{
    AdminError, EngineTimes, ErrorKind, UpdateProgress, UpdateReport, UpdateRequest, UpdateStatus,
    WeightsStatus,
};
use crate::config::Config;
use crate::driver::weight_update::{
    self, UpdateError, UpdateEvent, UpdateHandle, UpdateOutcome, UpdateRecord, UpdateRun, state_words,
};

/// Version of weights that a frontend has loaded by itself.
pub(super) const UNKNOWN: &str = "unknown";

/// Runs one update to its end; progress goes to the client as long as it listens.
pub(super) async fn run(
    updates: &UpdateHandle,
    config: &Config,
    request: UpdateRequest,
    progress: mpsc::Sender<UpdateProgress>,
) -> Result<UpdateReport, AdminError> {
    let deadline = request.pause_deadline_ms.map(Duration::from_millis);
    let wanted = weight_update::UpdateRequest {
        id: request.id.map(UpdateId),
        version: request.version.map(WeightVersion),
        from_version: request.from_version.map(WeightVersion),
        mode: request.mode,
        pause_deadline: deadline.unwrap_or(config.pause_deadline),
        allow_no_rollback: request.allow_no_rollback,
        source: request.source,
        adapters: request.adapters,
        retain: request.retain,
        ..weight_update::UpdateRequest::new(request.path)
    };
    let run = updates.start(wanted).await.map_err(failed)?;
    follow(run, &progress).await
}

/// Follows the update that runs to its end.
pub(super) async fn attach(
    updates: &UpdateHandle,
    id: Option<String>,
    progress: mpsc::Sender<UpdateProgress>,
) -> Result<UpdateReport, AdminError> {
    let run = updates.follow(id.map(UpdateId)).await.map_err(failed)?;
    follow(run, &progress).await
}

/// Reports of the last updates.
pub(super) async fn history(updates: &UpdateHandle, limit: usize) -> Result<Vec<UpdateReport>, AdminError> {
    Ok(updates.history(limit).await.map_err(failed)?.iter().map(report).collect())
}

/// Ends the running update.
pub(super) async fn abort(updates: &UpdateHandle) -> Result<(), AdminError> {
    let status = updates.status();
    if status.running.is_none() {
        return Err(AdminError::new(ErrorKind::Unavailable, "no update is running"));
    }
    updates.abort().await.map_err(failed)
}

fn failed(error: UpdateError) -> AdminError {
    match error {
        UpdateError::NotRunning { .. } => AdminError::new(ErrorKind::Unavailable, error.to_string()),
        _ => AdminError::new(ErrorKind::Unavailable, "the sidecar is stopping"),
    }
}

async fn follow(
    mut run: UpdateRun,
    progress: &mpsc::Sender<UpdateProgress>,
) -> Result<UpdateReport, AdminError> {
    while let Some(event) = run.events.recv().await {
        // A client that reads slowly, or has gone, misses progress only.
        if let Err(error) = progress.try_send(describe(event)) {
            tracing::trace!(%error, "progress dropped");
        }
    }
    let record = run.record().await.map_err(failed)?;
    match record.outcome {
        UpdateOutcome::RefusedBusy => Err(AdminError::new(ErrorKind::Busy, record.message)),
        _ => Ok(report(&record)),
    }
}

/// What status says about weights.
///
/// `external`: a frontend has loaded weights since the last update.
pub(super) fn weights(updates: &UpdateHandle, external: bool) -> WeightsStatus {
    let status = updates.status();
    // Engines may have loaded it from shared memory.
    let loaded_from = status.committed.map(|checkpoint| checkpoint.path);
    let dir = status.source.filter(|source| source.starts_with('/')).or(loaded_from);
    WeightsStatus {
        version: if external { UNKNOWN.to_owned() } else { status.version.0 },
        dir: dir.filter(|_| !external),
        last_update: status.last.as_ref().map(report),
    }
}

fn describe(event: UpdateEvent) -> UpdateProgress {
    UpdateProgress { event: Some(event.clone()), ..in_words(event) }
}

fn in_words(event: UpdateEvent) -> UpdateProgress {
    match event {
        UpdateEvent::Hashing { done, total } => UpdateProgress {
            phase: Phase::Staging.as_str().to_owned(),
            message: "checking and hashing the checkpoint".to_owned(),
            done,
            total,
            event: None,
        },
        UpdateEvent::Staging { name, progress, .. } => UpdateProgress {
            phase: Phase::Staging.as_str().to_owned(),
            message: format!("{name} copying the checkpoint into shared memory"),
            done: progress.done,
            total: progress.total,
            event: None,
        },
        UpdateEvent::Progress { phase, ranks } => {
            let past = |state: &&RankState| has_passed(phase, **state);
            let done = ranks.values().filter(past).count();
            let states: Vec<String> =
                ranks.iter().map(|(rank, state)| format!("rank {rank} {}", state_words(*state))).collect();
            UpdateProgress {
                phase: phase.as_str().to_owned(),
                message: states.join(", "),
                done: done as u64,
                total: ranks.len() as u64,
                event: None,
            }
        }
    }
}

/// Whether a rank has done its part of a phase.
fn has_passed(phase: Phase, state: RankState) -> bool {
    match phase {
        Phase::Pausing => state == RankState::Paused,
        Phase::Loading | Phase::Verifying => state == RankState::Loaded,
        Phase::RollingBack => state == RankState::RolledBack,
        Phase::Committing => state == RankState::Stamped,
        Phase::Resuming => state == RankState::Resumed,
        Phase::Idle | Phase::Staging | Phase::Prepared => false,
    }
}

fn report(record: &UpdateRecord) -> UpdateReport {
    let (status, fenced) = match &record.outcome {
        UpdateOutcome::Committed => (UpdateStatus::Committed, Vec::new()),
        UpdateOutcome::RefusedInvalid
        | UpdateOutcome::RefusedBusy
        | UpdateOutcome::RefusedVersion
        | UpdateOutcome::Aborted => (UpdateStatus::Refused, Vec::new()),
        UpdateOutcome::RolledBack => (UpdateStatus::RolledBack, Vec::new()),
        UpdateOutcome::Degraded { fenced } => (UpdateStatus::Degraded, fenced.clone()),
    };
    let detail = &record.record;
    UpdateReport {
        id: record.id.to_string(),
        reason: (status != UpdateStatus::Committed).then(|| record.message.clone()),
        status,
        version: record.version.to_string(),
        previous: detail.from_version.as_ref().map_or_else(|| UNKNOWN.to_owned(), ToString::to_string),
        fenced,
        total_s: seconds(detail.total_ms),
        paused_s: seconds(detail.paused_ms.unwrap_or_default()),
        bytes: detail.checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.bytes),
        engines: detail.ranks.iter().map(|(rank, of)| (*rank, times(of))).collect(),
        phases: detail.phases.clone(),
        warnings: detail.warnings.clone(),
    }
}

fn times(of: &RankRecord) -> EngineTimes {
    EngineTimes {
        state: of.state,
        pause_ms: of.pause_ms,
        load_ms: of.load_ms,
        rollback_ms: of.rollback_ms,
        errors: of.errors.clone(),
    }
}

fn seconds(ms: u64) -> f64 {
    Duration::from_millis(ms).as_secs_f64()
}
