//! Answers: JSON, errors in the shape of vLLM's own (`{"error": {"message", "type", "code"}}`).

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::api::{AdminError, ErrorKind};
use crate::staging::upload::UploadError;

/// A request was refused, or has failed.
#[derive(Debug)]
pub(super) struct HttpError {
    pub(super) status: StatusCode,
    pub(super) message: String,
}

impl HttpError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// As it is sent.
    pub(super) fn body(&self) -> serde_json::Value {
        let kind = self.status.canonical_reason().unwrap_or("Error").replace(' ', "");
        json!({"error": {"message": self.message, "type": kind, "code": self.status.as_u16()}})
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        (self.status, Json(self.body())).into_response()
    }
}

impl From<UploadError> for HttpError {
    fn from(error: UploadError) -> Self {
        let status = match &error {
            UploadError::Unknown { .. } | UploadError::UnknownFile { .. } => StatusCode::NOT_FOUND,
            UploadError::Busy { .. } => StatusCode::CONFLICT,
            UploadError::Invalid { .. } => StatusCode::BAD_REQUEST,
            UploadError::NoSpace { .. } => StatusCode::INSUFFICIENT_STORAGE,
            UploadError::Gone { .. } => StatusCode::GONE,
        };
        Self::new(status, error.to_string())
    }
}

impl From<AdminError> for HttpError {
    fn from(error: AdminError) -> Self {
        let status = match error.kind {
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::Busy => StatusCode::CONFLICT,
            ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Failed => StatusCode::BAD_GATEWAY,
            ErrorKind::Timeout => StatusCode::GATEWAY_TIMEOUT,
        };
        Self::new(status, error.message)
    }
}
