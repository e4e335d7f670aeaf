//! `/v1/weights/uploads`: a trainer's files, in pieces, resumable.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt as _;
use serde::Deserialize;
use tokio::time::timeout;

use super::Context;
use super::answers::HttpError;
use crate::staging::FileSize;
use crate::staging::upload::{UploadStatus, UploadedFile};

/// A body from which nothing came for this long is given up.
const BODY_IDLE: Duration = Duration::from_secs(30);
/// From the start of the file on, so many bytes are there without a hole.
const UPLOAD_OFFSET: HeaderName = HeaderName::from_static("upload-offset");
const UPLOAD_LENGTH: HeaderName = HeaderName::from_static("upload-length");

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateBody {
    id: String,
    files: Vec<FileSize>,
}

pub(super) async fn create(
    State(context): State<Context>,
    Json(body): Json<CreateBody>,
) -> Result<Json<UploadStatus>, HttpError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if body.id.is_empty() || body.id.len() > 128 || !body.id.chars().all(plain) {
        let message = format!("upload id {:?}: 1 to 128 of letters, digits, -, _ and . expected", body.id);
        return Err(HttpError::new(StatusCode::BAD_REQUEST, message));
    }
    Ok(Json(context.uploads.create(&body.id, body.files).await?))
}

pub(super) async fn status(
    State(context): State<Context>,
    Path(id): Path<String>,
) -> Result<Json<UploadStatus>, HttpError> {
    Ok(Json(context.uploads.status(&id)?))
}

pub(super) async fn discard(
    State(context): State<Context>,
    Path(id): Path<String>,
) -> Result<StatusCode, HttpError> {
    context.uploads.discard(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Also answers `HEAD`.
pub(super) async fn file(
    State(context): State<Context>,
    Path((id, file)): Path<(String, String)>,
) -> Result<Response, HttpError> {
    let file = one(&context, &id, &file)?;
    Ok(answer(file))
}

pub(super) async fn write(
    State(context): State<Context>,
    Path((id, name)): Path<(String, String)>,
    headers: HeaderMap,
    mut body: Body,
) -> Result<Response, HttpError> {
    let size = one(&context, &id, &name)?.size;
    let bad = |message: String| HttpError::new(StatusCode::BAD_REQUEST, message);
    let (mut at, end) = match headers.get(header::CONTENT_RANGE) {
        None => (0, size),
        Some(range) => {
            let text = range.to_str().unwrap_or_default();
            parse_range(text, size).ok_or_else(|| {
                bad(format!("Content-Range {text:?}, expected \"bytes FROM-TO/{size}\" within {name}"))
            })?
        }
    };
    loop {
        let frame = timeout(BODY_IDLE, body.frame()).await;
        let frame = frame.map_err(|_| {
            let message = format!("no data for {BODY_IDLE:?}, after {at} bytes of {name}");
            HttpError::new(StatusCode::REQUEST_TIMEOUT, message)
        })?;
        let Some(frame) = frame else { break };
        let frame =
            frame.map_err(|error| bad(format!("the body broke off at byte {at} of {name}: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if data.len() as u64 > end - at {
            return Err(bad(format!("the body is longer than the {} bytes up to {end} of {name}", end - at)));
        }
        // Copies and hashes some 100 KiB: shorter than a switch to another thread is worth.
        context.uploads.write(&id, &name, at, &data)?;
        at += data.len() as u64;
    }
    if at < end {
        return Err(bad(format!("the body ended at byte {at} of {name}, expected {end}")));
    }
    Ok(answer(one(&context, &id, &name)?))
}

fn one(context: &Context, id: &str, name: &str) -> Result<UploadedFile, HttpError> {
    let status = context.uploads.status(id)?;
    let file = status.files.into_iter().find(|file| file.name == name);
    file.ok_or_else(|| HttpError::new(StatusCode::NOT_FOUND, format!("upload {id:?} has no file {name:?}")))
}

fn answer(file: UploadedFile) -> Response {
    let offset = match file.ranges.first() {
        Some((0, to)) => *to,
        _ => 0,
    };
    let headers = [(UPLOAD_OFFSET, offset.to_string()), (UPLOAD_LENGTH, file.size.to_string())];
    (headers, Json(file)).into_response()
}

/// `bytes FROM-TO/SIZE` (both ends included) as `[from, to)`; none if it is not within the file.
pub(super) fn parse_range(text: &str, size: u64) -> Option<(u64, u64)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (from, last) = range.split_once('-')?;
    let digits = |text: &str| -> Option<u64> {
        let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| text.parse().ok()).flatten()
    };
    let (from, end) = (digits(from)?, digits(last)?.checked_add(1)?);
    let fits = from < end && end <= size && (total == "*" || digits(total)? == size);
    fits.then_some((from, end))
}
