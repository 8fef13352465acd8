//! The body of a request, within limits of size and time.

use std::{future::poll_fn, pin::pin, sync::Arc};

use axum::{
    body::{Body, HttpBody},
    extract::Request,
    http::{StatusCode, header},
};
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use super::{
    error::Refused,
    server::{LONG_BODY, Server},
};

/// So much of a body that is too long is read and thrown away: whoever still sends does not hear why it is refused.
const THROWN_AWAY: usize = 64 << 20;

/// A body, and the right to hold it where it is a long one.
pub struct Held {
    pub bytes: Vec<u8>,
    pub permit: Option<OwnedSemaphorePermit>,
}

/// Reads the body of a request that is JSON.
pub async fn read(server: &Server, request: Request) -> Result<Held, Refused> {
    let content_type = request.headers().get(header::CONTENT_TYPE).map_or(&b""[..], |value| value.as_bytes());
    // A page of another site cannot send this without asking first, which is not answered.
    if !content_type.to_ascii_lowercase().starts_with(b"application/json") {
        let message = "content-type: has to be application/json; with curl: -H 'Content-Type: application/json'";
        return Err(Refused::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    }
    let waits = request.headers().contains_key(header::EXPECT);
    let patience = server.rules.patience;
    timeout(patience, collect(server, request.into_body(), waits)).await.unwrap_or_else(|_| {
        let message = format!("the request did not come within {} s; send it in one go", patience.as_secs_f64());
        Err(Refused::new(StatusCode::REQUEST_TIMEOUT, message))
    })
}

/// `waits`: the client sends nothing before it is asked to.
async fn collect(server: &Server, body: Body, waits: bool) -> Result<Held, Refused> {
    let most = server.rules.body;
    let mut body = pin!(body);
    let told = body.size_hint().exact();
    let mut is_over = told.is_some_and(|told| told > most as u64);
    if is_over && waits {
        return Err(too_long(most));
    }
    let (mut bytes, mut permit) = (Vec::new(), None);
    let mut thrown_away = 0;
    if let Some(told) = told.map(|told| told as usize).filter(|_| !is_over) {
        if told > LONG_BODY {
            permit = Some(wait(server, told).await?);
        }
        // Not twice as much.
        bytes.reserve_exact(told);
    }
    while let Some(frame) = poll_fn(|context| body.as_mut().poll_frame(context)).await {
        let broken = |error| Refused::new(StatusCode::BAD_REQUEST, format!("the request broke off: {error}"));
        // Trailers say nothing here.
        let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
        is_over = is_over || bytes.len() + data.len() > most;
        if is_over {
            (bytes, permit) = (Vec::new(), None);
            thrown_away += data.len();
            if thrown_away > THROWN_AWAY {
                break;
            }
            continue;
        }
        if permit.is_none() && bytes.len() + data.len() > LONG_BODY {
            // How much is to come was not told.
            permit = Some(wait(server, most).await?);
        }
        bytes.extend_from_slice(&data);
    }
    if is_over { Err(too_long(most)) } else { Ok(Held { bytes, permit }) }
}

/// Waits until a long body of so many bytes may be read.
async fn wait(server: &Server, bytes: usize) -> Result<OwnedSemaphorePermit, Refused> {
    let acquired = Arc::clone(&server.long_bodies).acquire_many_owned(permits(bytes));
    let acquired = timeout(server.rules.patience / 2, acquired).await.map_err(|_| {
        Refused::new(StatusCode::SERVICE_UNAVAILABLE, "other long requests are being read; ask again later")
    })?;
    acquired.map_err(|_| Refused::closing())
}

/// A permit for each KiB.
pub fn permits(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1 << 10)).unwrap_or(u32::MAX)
}

fn too_long(most: usize) -> Refused {
    let message =
        format!("the request is longer than {most} bytes; shorten it, or start the server with a larger --body-limit");
    Refused::new(StatusCode::PAYLOAD_TOO_LARGE, message)
}
