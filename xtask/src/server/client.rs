//! A client that behaves.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use serde_json::Value;

/// Nothing that it waits for takes so long.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why a client that behaves has no answer.
pub enum Failed {
    /// The server has too many to answer, and says so.
    Busy,
    Other(String),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy => f.write_str("the queue is full"),
            Self::Other(cause) => f.write_str(cause),
        }
    }
}

impl fmt::Debug for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Failed {}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Other(format!("a client that behaves met: {error}"))
    }
}

pub struct Client {
    address: SocketAddr,
}

/// A request for a completion.
pub fn post(body: &str) -> String {
    let length = body.len();
    format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )
}

impl Client {
    pub fn of(address: SocketAddr) -> Self {
        Self { address }
    }

    pub fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Asks for a completion, whose answer is left to be read.
    pub fn send(&self, body: &str) -> io::Result<TcpStream> {
        let mut stream = self.connect()?;
        stream.write_all(post(body).as_bytes())?;
        Ok(stream)
    }

    /// Sends a request, and returns what it is answered: without the head, chunks joined.
    fn ask(&self, request: &str) -> Result<String, Failed> {
        let mut stream = self.connect()?;
        stream.write_all(request.as_bytes())?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply)?;
        let (head, body) =
            reply.split_once("\r\n\r\n").ok_or_else(|| Failed::Other(format!("an answer is cut off: {reply:?}")))?;
        match head.split(' ').nth(1) {
            Some("200") => {}
            Some("429") => return Err(Failed::Busy),
            _ => return Err(Failed::Other(format!("not answered: {reply}"))),
        }
        if !head.contains("transfer-encoding: chunked") {
            return Ok(body.to_owned());
        }
        let (mut joined, mut rest) = (String::new(), body);
        while let Some((length, after)) = rest.split_once("\r\n") {
            let length =
                usize::from_str_radix(length, 16).map_err(|_| Failed::Other(format!("an odd chunk: {rest}")))?;
            joined += after.get(..length).ok_or_else(|| Failed::Other("a chunk is cut off".into()))?;
            rest = after.get(length + 2..).unwrap_or_default();
        }
        Ok(joined)
    }

    pub fn get(&self, path: &str) -> Result<String, Failed> {
        self.ask(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
    }

    /// The text of an answer that comes whole.
    pub fn whole(&self, body: &Value) -> Result<String, Failed> {
        let reply = self.ask(&post(&body.to_string()))?;
        let json: Value = serde_json::from_str(&reply).map_err(|error| Failed::Other(format!("{error}: {reply}")))?;
        Ok(json["choices"][0]["text"].as_str().unwrap_or_default().to_owned())
    }

    /// The text of an answer that is streamed.
    pub fn stream(&self, body: &Value) -> Result<String, Failed> {
        let mut body = body.clone();
        body["stream"] = true.into();
        let reply = self.ask(&post(&body.to_string()))?;
        let events = reply
            .strip_suffix("data: [DONE]\n\n")
            .ok_or_else(|| Failed::Other(format!("a stream is cut off: {reply}")))?;
        let text = |event: &str| {
            let json: Value = serde_json::from_str(event.strip_prefix("data: ")?).ok()?;
            Some(json["choices"][0]["text"].as_str()?.to_owned())
        };
        let texts = events.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
        texts.map(|event| text(event).ok_or_else(|| Failed::Other(format!("an odd event: {event}")))).collect()
    }
}
