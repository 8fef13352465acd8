//! What a client is told that went wrong, in the form of OpenAI's API.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use layer_streamer::Error;
use serde_json::{Value, json};

/// A request that is not answered, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    pub status: StatusCode,
    message: String,
    /// The field at fault, such as `messages[0].role`.
    param: Option<String>,
    /// For programs.
    code: Option<&'static str>,
}

impl Refused {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None }
    }

    /// A field of the request that cannot be taken; `cause` says what it is and what to do.
    pub fn field(name: impl Into<String>, cause: impl AsRef<str>) -> Self {
        let name = name.into();
        let message = format!("{name}: {}", cause.as_ref());
        Self { param: Some(name), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// Another model than the one that is there.
    pub fn no_model(asked: &str, there: &str) -> Self {
        let message = format!("the model {asked:?} is not here; this server has {there:?}");
        let refused = Self { param: Some("model".into()), ..Self::new(StatusCode::NOT_FOUND, message) };
        refused.with_code("model_not_found")
    }

    pub fn closing() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down: ask again when it is back")
            .with_code("shutting_down")
    }

    /// All that is set aside for requests on their way is taken.
    pub fn no_room() -> Self {
        let message = "requests and answers on their way take all the memory that is set aside for them: ask again later, or for less";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("no_room")
    }

    pub fn message(&self) -> &str {
        &self.message
    }

    /// As the error of a whole answer, or of a piece of a stream.
    pub fn json(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": self.code } })
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        match &error {
            Error::Busy { waiting } => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!("{waiting} requests wait already: ask again later, or start the server with a larger --queue"),
            )
            .with_code("queue_full"),
            Error::Setting { name, .. } => {
                let param = Some((*name).to_string());
                Self { param, ..Self::new(StatusCode::BAD_REQUEST, error.to_string()) }
            }
            _ => Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.json().to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        match self.status {
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}
