//! The update task behind the commands of clients.

use dp_sidecar_protocol::machine::weight_update::Outcome;

use crate::api::{AdminError, ErrorKind, Reply, Response, UNKNOWN, UpdateReport, WeightsStatus};
use crate::driver::weight_update::{UpdateError, UpdateHandle, UpdateRun};

/// Goes with an update to its end; progress goes to the client as long as it listens.
pub(super) async fn follow(
    run: Result<UpdateRun, UpdateError>,
    client: &Reply,
) -> Result<Response, AdminError> {
    let mut run = run?;
    while let Some(event) = run.events.recv().await {
        client.progress(event.into());
    }
    let record = run.record().await?;
    match record.outcome() {
        Outcome::RefusedBusy => Err(AdminError::new(ErrorKind::Busy, record.message)),
        _ => Ok(Response::Update(UpdateReport::from(&record))),
    }
}

/// Reports of the last updates.
pub(super) async fn history(updates: &UpdateHandle, limit: usize) -> Result<Response, AdminError> {
    let records = updates.history(limit).await?;
    Ok(Response::Updates(records.iter().map(UpdateReport::from).collect()))
}

/// Ends the running update.
pub(super) async fn abort(updates: &UpdateHandle) -> Result<(), AdminError> {
    if updates.snapshot.borrow().running.is_none() {
        return Err(AdminError::new(ErrorKind::Unavailable, "no update is running"));
    }
    Ok(updates.abort().await?)
}

impl From<UpdateError> for AdminError {
    fn from(error: UpdateError) -> Self {
        match error {
            UpdateError::NotRunning { .. } => Self::new(ErrorKind::Unavailable, error.to_string()),
            _ => Self::stopping(),
        }
    }
}

/// What status says about weights.
///
/// `external`: a frontend has loaded weights under this sidecar, after the last update.
pub(super) fn weights(updates: &UpdateHandle, external: bool) -> WeightsStatus {
    let status = updates.snapshot.borrow().clone();
    let external = external || status.external_weights;
    // Engines may have loaded it from shared memory.
    let loaded_from = status.committed.map(|checkpoint| checkpoint.path);
    let dir = status.source.filter(|source| source.starts_with('/')).or(loaded_from);
    WeightsStatus {
        version: if external { UNKNOWN.to_owned() } else { status.version.0 },
        dir: dir.filter(|_| !external),
        updates: status.updates,
        last_update: status.last.as_ref().map(UpdateReport::from),
    }
}
