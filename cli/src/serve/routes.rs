//! Which path is answered how, and to whom.

use std::{net::IpAddr, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header, uri::Authority},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tokio::{sync::OwnedSemaphorePermit, task};

use super::{
    body,
    choices::Choices,
    closing::Answering,
    cost::{self, Texts},
    error::Refused,
    request::{Asked, Form},
    respond::{self, Outline},
    room,
    server::Server,
};

use crate::text::give_back_memory;

/// The page at `/`.
const PAGE: &str = include_str!("page.html");

/// What the page may do: run its own script, and ask this server.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                           base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What was taken to read a request is given back to the system at once where it was more than this, in KiB: that takes time
/// of all threads.
const KEPT_BY_ALLOCATOR: usize = 16 << 10;

/// Paths that need no key: the page, which asks for it, and what says whether the server lives.
const OPEN: [&str; 2] = ["/", "/health"];

pub fn router(server: Arc<Server>) -> Router {
    let complete = |State(server): State<Arc<Server>>, request: Request| answer(server, Form::Completion, request);
    let chat = |State(server): State<Arc<Server>>, request: Request| answer(server, Form::Chat, request);
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(|State(server): State<Arc<Server>>| async move { respond::json(respond::models(&server)) }))
        .route("/v1/models/{*model}", get(model))
        .route("/v1/completions", post(complete))
        .route("/v1/chat/completions", post(chat))
        .fallback(|uri: Uri| async move {
            let message = format!(
                "there is no {}; this server has /v1/models, /v1/completions, /v1/chat/completions, /health and /metrics",
                uri.path()
            );
            Refused::new(StatusCode::NOT_FOUND, message)
        })
        .method_not_allowed_fallback(|uri: Uri| async move {
            let method = if uri.path().ends_with("completions") { "POST" } else { "GET" };
            Refused::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} takes {method} alone", uri.path()))
        })
        .layer(middleware::from_fn_with_state(Arc::clone(&server), admit))
        .with_state(server)
}

/// Lets in whom the rules allow, and counts.
async fn admit(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let response = match check(&server, &path, request.headers()) {
        Ok(()) => next.run(request).await,
        Err(refused) => refused.into_response(),
    };
    server.http.note(&path, response.status().as_u16());
    response
}

fn check(server: &Server, path: &str, headers: &HeaderMap) -> Result<(), Refused> {
    let value = |name| headers.get(name).map_or(&b""[..], HeaderValue::as_bytes);
    match &server.rules.key {
        Some(key) if !OPEN.contains(&path) && !key.is_in(value(header::AUTHORIZATION)) => {
            let message = "the API key is missing or wrong; send the header Authorization: Bearer KEY";
            Err(Refused::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key"))
        }
        // A page of another site may have a name of its own lead here, and would then read the answers.
        None if server.rules.is_local && !is_local(value(header::HOST)) => {
            let message =
                "this server is for its own machine: call it localhost or by its address, or give it an --api-key";
            Err(Refused::new(StatusCode::FORBIDDEN, message))
        }
        _ => Ok(()),
    }
}

/// Whether a `Host` is an address or this machine's own name. Clients that send none are no browsers.
fn is_local(host: &[u8]) -> bool {
    let Ok(host) = Authority::try_from(host) else { return host.is_empty() };
    let name = host.host().trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

async fn page() -> Response {
    let mut response = Response::new(Body::from(PAGE));
    for (name, value) in [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, PAGE_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

async fn health(State(server): State<Arc<Server>>) -> Response {
    match server.closing.has_begun() {
        true => Refused::closing().into_response(),
        false => respond::json("{\"status\":\"ok\"}"),
    }
}

async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let mut response =
        Response::new(Body::from(server.http.text(&server.engine.stats(), &server.memory, &server.name)));
    let version = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, version);
    response
}

async fn model(State(server): State<Arc<Server>>, uri: Uri) -> Result<Response, Refused> {
    let asked = unescaped(uri.path().trim_start_matches("/v1/models/"));
    match asked == server.name {
        true => Ok(respond::json(respond::model(&server))),
        false => Err(Refused::no_model(&asked, &server.name)),
    }
}

/// A path's text, without `%2F` and its like.
fn unescaped(path: &str) -> String {
    let byte = |hex: &str| u8::from_str_radix(hex, 16).ok();
    let mut parts = path.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match part.get(..2).and_then(byte) {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend(&part.as_bytes()[2..]);
            }
            None => bytes.extend([b"%", part.as_bytes()].concat()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn answer(server: Arc<Server>, form: Form, request: Request) -> Result<Response, Refused> {
    let answering = Answering::begin(&server).ok_or_else(Refused::closing)?;
    let body::Held { bytes, permit } = body::read(&server, request).await?;
    let (room, longest_text) = room_to_read(&server, form, &bytes).await?;
    let reader = Arc::clone(&server);
    // It takes time, which other connections do not wait for.
    let asked = task::spawn_blocking(move || {
        let asked = Asked::read(&reader.terms(longest_text), form, &bytes);
        // Other long bodies may come, before this one is answered.
        drop((bytes, permit));
        if room.num_permits() > KEPT_BY_ALLOCATOR {
            give_back_memory();
        }
        drop(room);
        asked
    });
    let asked = asked.await;
    let asked = asked.map_err(|error| {
        let message = format!("reading the request failed: {error}; this is a bug, please report it");
        Refused::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    })??;
    server.room.check(&asked, server.context)?;
    let outline = Outline::of(&asked);
    let choices = Choices::begin(Arc::clone(&server), asked, answering)?;
    respond::respond(&server, &outline, choices).await
}

/// Waits until there is room for what a body takes while it is parsed and cut into tokens; and how long a text may be for that.
async fn room_to_read(server: &Server, form: Form, body: &[u8]) -> Result<(OwnedSemaphorePermit, usize), Refused> {
    let texts = if form == Form::Chat { Texts::Together } else { Texts::OneByOne };
    let cost = cost::of(body, texts);
    let most = room::reading(server.context, server.rules.body);
    if cost.parsed > most {
        let cost = cost.parsed;
        let message =
            format!("to read the request takes {cost} bytes, more than the {most} that there are: shorten it");
        return Err(Refused::new(StatusCode::PAYLOAD_TOO_LARGE, message));
    }
    let taken = cost.taken(server.longest_text, most);
    let permits = Arc::clone(&server.reading).acquire_many_owned(u32::try_from(taken >> 10).unwrap_or(u32::MAX)).await;
    let permits = permits.map_err(|_| Refused::closing())?;
    Ok((permits, server.longest_text.min(cost.longest_text(most))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_s_name_may_be_escaped_in_a_path() {
        for (path, name) in [("a%2Fb", "a/b"), ("a/b", "a/b"), ("%C3%a9", "é"), ("50%", "50%"), ("%zz%2", "%zz%2")] {
            assert_eq!(unescaped(path), name);
        }
    }

    #[test]
    fn only_addresses_and_localhost_are_local_names() {
        for (host, local) in [
            ("localhost:8080", true),
            ("LOCALHOST", true),
            ("127.0.0.1:8080", true),
            ("[::1]:8080", true),
            ("", true),
            ("localhost.example.com", false),
            ("example.com:8080", false),
            ("not a host", false),
        ] {
            assert_eq!(is_local(host.as_bytes()), local, "{host}");
        }
    }
}
