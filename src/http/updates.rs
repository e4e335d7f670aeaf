//! `/v1/weights/updates`: start one, follow it as server-sent events, end it, look back.

use std::convert::Infallible;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use dp_sidecar_protocol::machine::weight_update::PauseMode;
use futures::stream::{self, Stream};
use serde::Deserialize;
use tokio::sync::{mpsc, oneshot};

use super::Context;
use super::answers::HttpError;
use crate::admin::server::{AdminCommand, AdminReply};
use crate::admin::types::{
    AdminError, UpdateProgress, UpdateReport, UpdateRequest, UpdateStatus, VersionReport,
};
use crate::driver::handles::Retain;
use crate::driver::weight_update::{AdapterChange, UpdateSource};

/// Progress waiting for a slow reader; more is dropped.
const PROGRESS: usize = 256;
/// Records given by default.
const HISTORY: usize = 16;

/// Body of a new update.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StartBody {
    /// An upload, or `path`.
    upload: Option<String>,
    path: Option<String>,
    /// LoRA adapters; alone, without an upload and a path, too.
    #[serde(default)]
    adapters: Vec<AdapterChange>,
    #[serde(default)]
    source: UpdateSource,
    #[serde(default)]
    retain: Retain,
    version: Option<String>,
    from_version: Option<String>,
    id: Option<String>,
    #[serde(default)]
    mode: PauseMode,
    pause_deadline_ms: Option<u64>,
    #[serde(default)]
    allow_no_rollback: bool,
}

impl StartBody {
    fn request(self) -> Result<UpdateRequest, HttpError> {
        let bad = |message: &str| HttpError::new(StatusCode::BAD_REQUEST, message);
        let (path, source) = match (self.path, self.upload) {
            (Some(path), None) if !matches!(self.source, UpdateSource::Upload(_)) => (path, self.source),
            (None, Some(upload)) => (String::new(), UpdateSource::Upload(upload)),
            (None, None) if !self.adapters.is_empty() => (String::new(), UpdateSource::Auto),
            _ => return Err(bad("expected either path or upload")),
        };
        Ok(UpdateRequest {
            path,
            adapters: self.adapters,
            source,
            retain: self.retain,
            version: self.version,
            mode: self.mode,
            pause_deadline_ms: self.pause_deadline_ms,
            from_version: self.from_version,
            id: self.id,
            allow_no_rollback: self.allow_no_rollback,
        })
    }
}

pub(super) async fn start(
    State(context): State<Context>,
    headers: HeaderMap,
    Json(body): Json<StartBody>,
) -> Result<Response, HttpError> {
    let request = body.request()?;
    let (progress, events) = mpsc::channel(PROGRESS);
    let (reply, report) = oneshot::channel();
    send(&context, AdminCommand::Update { request, progress, reply }).await?;
    answer(&headers, events, report).await
}

/// Progress and report of the update that runs.
pub(super) async fn follow(
    State(context): State<Context>,
    headers: HeaderMap,
    Query(Which { id }): Query<Which>,
) -> Result<Response, HttpError> {
    let (progress, events) = mpsc::channel(PROGRESS);
    let (reply, report) = oneshot::channel();
    send(&context, AdminCommand::UpdateFollow { id, progress, reply }).await?;
    answer(&headers, events, report).await
}

#[derive(Debug, Deserialize)]
pub(super) struct Which {
    id: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Limit {
    limit: Option<usize>,
}

pub(super) async fn history(
    State(context): State<Context>,
    Query(Limit { limit }): Query<Limit>,
) -> Result<Json<Vec<UpdateReport>>, HttpError> {
    let limit = limit.unwrap_or(HISTORY);
    Ok(Json(ask(&context, |reply| AdminCommand::UpdateHistory { limit, reply }).await?))
}

pub(super) async fn abort(State(context): State<Context>) -> Result<StatusCode, HttpError> {
    ask(&context, |reply| AdminCommand::UpdateAbort { reply }).await?;
    Ok(StatusCode::ACCEPTED)
}

pub(super) async fn version(State(context): State<Context>) -> Result<Json<VersionReport>, HttpError> {
    Ok(Json(ask(&context, |reply| AdminCommand::Version { reply }).await?))
}

/// The report, or everything as it happens to whoever accepts an event stream.
async fn answer(
    headers: &HeaderMap,
    events: mpsc::Receiver<UpdateProgress>,
    report: oneshot::Receiver<Result<UpdateReport, AdminError>>,
) -> Result<Response, HttpError> {
    let accepts = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if accepts.contains("text/event-stream") {
        return Ok(Sse::new(event_stream(events, report)).keep_alive(KeepAlive::default()).into_response());
    }
    // Nobody reads them.
    drop(events);
    let report = report.await.map_err(|_| stopping())??;
    Ok((status_of(report.status), Json(report)).into_response())
}

/// `progress` events, and at the end one `report` or `error`.
fn event_stream(
    events: mpsc::Receiver<UpdateProgress>,
    report: oneshot::Receiver<Result<UpdateReport, AdminError>>,
) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(Some((events, report)), async |state| {
        let (mut events, report) = state?;
        if let Some(progress) = events.recv().await {
            return Some((Ok(event("progress", &progress)), Some((events, report))));
        }
        let last = match report.await {
            Ok(Ok(report)) => event("report", &report),
            Ok(Err(error)) => event("error", &HttpError::from(error).body()),
            Err(_) => event("error", &stopping().body()),
        };
        Some((Ok(last), None))
    })
}

fn event(name: &str, data: &impl serde::Serialize) -> Event {
    let event = Event::default().event(name);
    match serde_json::to_string(data) {
        Ok(text) => event.data(text),
        // Plain data: it does not happen.
        Err(error) => event.data(error.to_string()),
    }
}

const fn status_of(status: UpdateStatus) -> StatusCode {
    match status {
        UpdateStatus::Committed => StatusCode::OK,
        UpdateStatus::Refused => StatusCode::UNPROCESSABLE_ENTITY,
        UpdateStatus::RolledBack | UpdateStatus::Degraded => StatusCode::BAD_GATEWAY,
    }
}

async fn ask<T>(
    context: &Context,
    command: impl FnOnce(AdminReply<T>) -> AdminCommand,
) -> Result<T, HttpError> {
    let (reply, answer) = oneshot::channel();
    send(context, command(reply)).await?;
    Ok(answer.await.map_err(|_| stopping())??)
}

async fn send(context: &Context, command: AdminCommand) -> Result<(), HttpError> {
    let admin = context.admin.upgrade().ok_or_else(stopping)?;
    admin.send(command).await.map_err(|_| stopping())
}

fn stopping() -> HttpError {
    HttpError::new(StatusCode::SERVICE_UNAVAILABLE, "the sidecar is stopping")
}
