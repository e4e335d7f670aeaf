//! Who may ask, at which name, and how many at a time.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::net::IpAddr;
use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http_body_util::LengthLimitError;
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use super::Context;
use super::answers::HttpError;
use super::routes::JSON_LIMIT;
use crate::strangers::Stranger;
use crate::token::Token;

/// The place that a connection takes, until it ends: among strangers, until a request on it has shown the token.
#[derive(Clone, Debug)]
pub(super) struct Place(Arc<Mutex<Holder>>);

#[derive(Debug)]
enum Holder {
    Stranger { _place: Stranger },
    Client { _place: OwnedSemaphorePermit },
}

impl Place {
    pub(super) fn of_stranger(place: Stranger) -> Self {
        Self(Arc::new(Mutex::new(Holder::Stranger { _place: place })))
    }

    fn is_of_client(&self) -> bool {
        matches!(&*self.0.lock(), Holder::Client { .. })
    }
}

/// Lets only those through who know the token, and name this server.
pub(super) async fn authorize(State(context): State<Context>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| {
        let secret = value.as_bytes().strip_prefix(b"Bearer ")?;
        Token::new(secret).ok()
    });
    // Keys are compared in constant time.
    if context.token.is_some() && given != context.token {
        let error = HttpError::new(
            StatusCode::UNAUTHORIZED,
            "a bearer token is required: that of --http-token-file, or of the file http-token in the state directory",
        );
        let close = (header::CONNECTION, HeaderValue::from_static("close"));
        return ([(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")), close], error)
            .into_response();
    }
    let checked = match check_names(request.headers(), &context.names) {
        Ok(()) => take_place(&context, request.extensions().get::<Place>()).await,
        refused => refused,
    };
    match checked {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn take_place(context: &Context, place: Option<&Place>) -> Result<(), HttpError> {
    let Some(place) = place.filter(|place| !place.is_of_client()) else { return Ok(()) };
    let limit = context.limits.place;
    let free = timeout(limit, Arc::clone(&context.clients).acquire_owned()).await;
    let Ok(Ok(permit)) = free else {
        let message = format!("too many clients: no connection has become free within {limit:?}");
        return Err(HttpError::new(StatusCode::SERVICE_UNAVAILABLE, message));
    };
    *place.0.lock() = Holder::Client { _place: permit };
    Ok(())
}

/// Pages of other sites, in the browser of somebody who can reach this address, are no clients: their requests name
/// where they come from, or a host that was made to mean this one.
fn check_names(headers: &HeaderMap, names: &BTreeSet<String>) -> Result<(), HttpError> {
    if headers.contains_key(header::ORIGIN) {
        return Err(HttpError::new(
            StatusCode::FORBIDDEN,
            "requests of web pages (header Origin) are not accepted",
        ));
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if is_ours(host, names) {
        return Ok(());
    }
    let message = format!(
        "Host {host:?} is no name of this server: an IP address, localhost, the name of this host, that of --http, or one \
         that --http-name gives is expected"
    );
    Err(HttpError::new(StatusCode::MISDIRECTED_REQUEST, message))
}

fn is_ours(host: &str, names: &BTreeSet<String>) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost" || name.parse::<IpAddr>().is_ok() || names.contains(&name)
}

/// Reads the whole body, but for uploads, which go where they belong piece by piece.
pub(super) async fn whole(State(context): State<Context>, request: Request, next: Next) -> Response {
    if request.method() == Method::PUT {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    let limit = context.limits.body;
    let error = match timeout(limit, to_bytes(body, JSON_LIMIT)).await {
        Ok(Ok(bytes)) => return next.run(Request::from_parts(parts, Body::from(bytes))).await,
        Ok(Err(error)) if error.source().is_some_and(|source| source.is::<LengthLimitError>()) => {
            HttpError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the body has more than {JSON_LIMIT} bytes"),
            )
        }
        Ok(Err(error)) => HttpError::new(StatusCode::BAD_REQUEST, format!("the body broke off: {error}")),
        Err(_) => {
            HttpError::new(StatusCode::REQUEST_TIMEOUT, format!("the body was not there within {limit:?}"))
        }
    };
    ([(header::CONNECTION, HeaderValue::from_static("close"))], error).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_and_known_names_are_those_of_this_server() {
        let names = BTreeSet::from(["trainer-0.svc".to_owned()]);
        for host in
            ["127.0.0.1:8090", "10.1.2.3", "[::1]:8090", "localhost:1", "Trainer-0.svc.:80", "trainer-0.svc"]
        {
            assert!(is_ours(host, &names), "{host}");
        }
        for host in
            ["", "evil.example", "127.0.0.1.evil.example:8090", "localhost.evil.example", "svc", "[evil]:1"]
        {
            assert!(!is_ours(host, &names), "{host}");
        }
    }
}
