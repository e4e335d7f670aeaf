//! `/v1/weights/updates`: start one, follow it as server-sent events, end it, look back.

use std::convert::Infallible;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use dp_sidecar_protocol::UpdateId;
use futures::stream::{self, Stream};
use serde::Deserialize;
use tokio::sync::mpsc;

use super::Context;
use super::answers::HttpError;
use crate::api::{AdminCommand, AdminError, Command, ReportStatus, Response as Answer, UpdateRequest};

type Answers = mpsc::Receiver<Answer>;

/// Records given by default.
const HISTORY: usize = 16;

pub(super) async fn start(
    State(context): State<Context>,
    headers: HeaderMap,
    Json(request): Json<UpdateRequest>,
) -> Result<Response, HttpError> {
    request.check().map_err(|problem| HttpError::new(StatusCode::BAD_REQUEST, problem))?;
    let answers = ask(&context, Command::Update(request)).await?;
    told(&headers, answers).await
}

/// Progress and report of the update that runs.
pub(super) async fn follow(
    State(context): State<Context>,
    headers: HeaderMap,
    Query(Which { id }): Query<Which>,
) -> Result<Response, HttpError> {
    let answers = ask(&context, Command::UpdateFollow { id }).await?;
    told(&headers, answers).await
}

#[derive(Debug, Deserialize)]
pub(super) struct Which {
    id: Option<UpdateId>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Limit {
    limit: Option<usize>,
}

pub(super) async fn history(
    State(context): State<Context>,
    Query(Limit { limit }): Query<Limit>,
) -> Result<Response, HttpError> {
    let limit = limit.unwrap_or(HISTORY);
    last(ask(&context, Command::UpdateHistory { limit }).await?).await
}

pub(super) async fn abort(State(context): State<Context>) -> Result<Response, HttpError> {
    last(ask(&context, Command::UpdateAbort).await?).await
}

pub(super) async fn version(State(context): State<Context>) -> Result<Response, HttpError> {
    last(ask(&context, Command::Version).await?).await
}

/// The report, or everything as it happens to whoever accepts an event stream.
async fn told(headers: &HeaderMap, answers: Answers) -> Result<Response, HttpError> {
    let accepts = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if accepts.contains("text/event-stream") {
        return Ok(Sse::new(event_stream(answers)).keep_alive(KeepAlive::default()).into_response());
    }
    last(answers).await
}

/// The last answer, without the steps before it.
async fn last(mut answers: Answers) -> Result<Response, HttpError> {
    Ok(loop {
        break match answers.recv().await.ok_or_else(AdminError::stopping)? {
            Answer::Progress(_) => continue,
            Answer::Update(report) => (status_of(report.status), Json(report)).into_response(),
            Answer::Updates(reports) => Json(reports).into_response(),
            Answer::Version(report) => Json(report).into_response(),
            Answer::Done => StatusCode::ACCEPTED.into_response(),
            Answer::Error(error) => return Err(error.into()),
            // To commands that are not given over HTTP.
            Answer::Status(_) | Answer::Frontends(_) | Answer::Sleep(_) => {
                StatusCode::INTERNAL_SERVER_ERROR.into_response()
            }
        };
    })
}

/// `progress` events, and at the end one `report` or `error`.
fn event_stream(answers: Answers) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(Some(answers), async |answers| {
        let mut answers = answers?;
        let last = match answers.recv().await {
            Some(Answer::Progress(step)) => return Some((Ok(event("progress", &step)), Some(answers))),
            Some(Answer::Update(report)) => event("report", &report),
            Some(Answer::Error(error)) => event("error", &HttpError::from(error).body()),
            _ => event("error", &HttpError::from(AdminError::stopping()).body()),
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

const fn status_of(status: ReportStatus) -> StatusCode {
    match status {
        ReportStatus::Committed => StatusCode::OK,
        ReportStatus::Refused => StatusCode::UNPROCESSABLE_ENTITY,
        ReportStatus::RolledBack | ReportStatus::Degraded => StatusCode::BAD_GATEWAY,
    }
}

async fn ask(context: &Context, command: Command) -> Result<Answers, HttpError> {
    let (command, answers) = AdminCommand::new(command);
    let admin = context.admin.upgrade().ok_or_else(AdminError::stopping)?;
    admin.send(command).await.map_err(|_| AdminError::stopping())?;
    Ok(answers)
}
