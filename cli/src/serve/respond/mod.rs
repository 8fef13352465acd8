//! Answers as clients get them: whole, or as a stream of events.

mod form;
mod stream;

use std::{future::poll_fn, sync::Arc};

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use form::{Head, Part};
use hyper::body::Bytes;
use serde_json::{Value, json};
use stream::Stream;

use super::{
    choices::{Choices, Delta, Spoken},
    error::Refused,
    request::Asked,
    room::Sent,
    server::Server,
};

/// Answers a request whose sequences have begun.
pub async fn respond(server: &Arc<Server>, asked: &Outline, choices: Choices) -> Result<Response, Refused> {
    let head = Head::new(asked, server);
    if asked.stream {
        let mut response = Response::new(Body::new(Stream::new(head, choices, asked.usage)));
        for (name, value) in [
            (header::CONTENT_TYPE, "text/event-stream"),
            (header::CACHE_CONTROL, "no-cache"),
            // Proxies such as nginx would hold it back.
            (header::HeaderName::from_static("x-accel-buffering"), "no"),
        ] {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        return Ok(response);
    }
    let kept = choices.kept();
    let text = whole(&head, choices).await?;
    Ok(json(Bytes::from_owner(Sent::new(text, kept))))
}

/// What is left of a request when its sequences have begun.
pub struct Outline {
    form: super::request::Form,
    stream: bool,
    usage: bool,
    logprobs: bool,
}

impl Outline {
    pub fn of(asked: &Asked) -> Self {
        Self { form: asked.form, stream: asked.stream, usage: asked.usage, logprobs: asked.logprobs.is_some() }
    }
}

/// An answer's JSON.
pub fn json(text: impl Into<Body>) -> Response {
    let mut response = Response::new(text.into());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// One answer, all of it.
#[derive(Default)]
struct Whole {
    text: String,
    tokens: Vec<Spoken>,
    end: Option<&'static str>,
}

/// Waits for all answers.
async fn whole(head: &Head, mut choices: Choices) -> Result<String, Refused> {
    let mut all: Vec<Whole> = (0..choices.count()).map(|_| Whole::default()).collect();
    while let Some(delta) = poll_fn(|context| choices.poll(context)).await {
        let Delta { choice, text, tokens, end } = delta?;
        let whole = &mut all[choice];
        whole.text += &text;
        whole.tokens.extend(tokens);
        whole.end = end;
    }
    let parts = all.iter().enumerate();
    let parts = parts.map(|(index, Whole { text, tokens, end })| Part { index, text, tokens, end: *end });
    Ok(head.whole(&parts.collect::<Vec<_>>(), choices.usage()))
}

/// The models that there are: one.
pub fn models(server: &Server) -> String {
    json!({ "object": "list", "data": [described(server)] }).to_string()
}

pub fn model(server: &Server) -> String {
    described(server).to_string()
}

fn described(server: &Server) -> Value {
    json!({
        "id": server.name, "object": "model", "created": server.begun, "owned_by": "layer-streamer",
        "context_length": server.context, "has_chat_template": server.template.is_some(),
    })
}
