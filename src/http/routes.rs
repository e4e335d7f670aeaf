//! What can be asked for, and by whom.

use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use tokio::time::timeout;

use super::answers::HttpError;
use super::{Context, gate, updates, uploads};

/// So long a request waits until the segments are hashed; then the client is told to come again.
const OPENING_LIMIT: Duration = Duration::from_secs(60);
/// Longest JSON body, in bytes: an upload may have many files.
pub(super) const JSON_LIMIT: usize = 8 << 20;

pub(super) fn router(context: Context) -> Router {
    Router::new()
        .route("/v1/weights/uploads", post(uploads::create))
        .route("/v1/weights/uploads/{id}", get(uploads::status).delete(uploads::discard))
        .route("/v1/weights/uploads/{id}/{file}", put(uploads::write).get(uploads::file))
        .route_layer(from_fn_with_state(context.clone(), opened))
        .route("/v1/weights/updates", post(updates::start).get(updates::history))
        .route("/v1/weights/updates/events", get(updates::follow))
        .route("/v1/weights/updates/abort", post(updates::abort))
        .route("/v1/weights/version", get(updates::version))
        .fallback(|| async { HttpError::new(StatusCode::NOT_FOUND, "no such path") })
        .layer(DefaultBodyLimit::max(JSON_LIMIT))
        .layer(from_fn_with_state(context.clone(), gate::whole))
        .layer(from_fn_with_state(context.clone(), gate::authorize))
        .with_state(context)
}

/// What a predecessor has taken of an upload is known before anybody is told of it.
async fn opened(State(context): State<Context>, request: Request, next: Next) -> Response {
    if timeout(OPENING_LIMIT, context.uploads.opened()).await.is_err() {
        let message = "the segments in shared memory are still being checked; try again later";
        return HttpError::new(StatusCode::SERVICE_UNAVAILABLE, message).into_response();
    }
    next.run(request).await
}
