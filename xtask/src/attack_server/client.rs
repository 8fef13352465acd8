//! A client, which behaves or not.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use serde_json::{Value, json};

/// Nothing that a client that behaves waits for takes so long.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Asks, and reads the answer.
    Whole,
    /// The same as a stream.
    Stream,
    /// Goes away in the middle of a stream.
    HangsUp,
    /// Goes away while it waits for a whole answer.
    Impatient,
    /// Asks for much, and reads nothing of it.
    StopsReading,
    /// Sends half of a request, and waits.
    Half,
    /// Sends what is no HTTP.
    Garbage,
    /// Sends HTTP that asks for nothing that there is.
    Nonsense,
}

impl Kind {
    pub const ALL: [Self; 8] = [
        Self::Whole,
        Self::Stream,
        Self::HangsUp,
        Self::Impatient,
        Self::StopsReading,
        Self::Half,
        Self::Garbage,
        Self::Nonsense,
    ];

    pub fn behaved(random: &mut Random) -> Self {
        Self::ALL[random.below(2) as usize]
    }

    pub fn misbehaved(random: &mut Random) -> Self {
        Self::ALL[2 + random.below(6) as usize]
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Stream => "streams",
            Self::HangsUp => "hung up",
            Self::Impatient => "did not wait",
            Self::StopsReading => "stopped reading",
            Self::Half => "sent half",
            Self::Garbage => "sent garbage",
            Self::Nonsense => "asked nonsense",
        }
    }
}

/// Random numbers (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % most
    }
}

/// The most new tokens of request `number`; as many as it has, since the model never ends an answer.
pub fn tokens(number: u64) -> u64 {
    4 + number % 29
}

/// What request `number` asks for: greedily, or drawn.
pub fn request(number: u64) -> Value {
    let temperature = if number.is_multiple_of(2) { 0.0 } else { 1.2 };
    json!({ "prompt": format!("{}=", 37 * number + 5), "temperature": temperature, "seed": number, "max_tokens": tokens(number) })
}

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

fn post(body: &str) -> String {
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

    fn connect(&self) -> io::Result<TcpStream> {
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

    /// Does what nobody should, and goes.
    pub fn misbehave(&self, kind: Kind, random: &mut Random) -> io::Result<()> {
        let mut stream = self.connect()?;
        let much = |stream: bool| {
            post(&json!({ "prompt": "4096=", "max_tokens": 4000, "stream": stream, "logprobs": 5 }).to_string())
        };
        let wait = Duration::from_millis(random.below(400));
        match kind {
            Kind::Whole | Kind::Stream => {}
            Kind::HangsUp => {
                stream.write_all(much(true).as_bytes())?;
                let mut some = vec![0; random.below(5000) as usize];
                stream.read_exact(&mut some)?;
            }
            Kind::Impatient => {
                stream.write_all(much(false).as_bytes())?;
                thread::sleep(wait);
            }
            Kind::StopsReading => {
                stream.write_all(much(true).as_bytes())?;
                // Some stay beyond the server's patience.
                thread::sleep(wait * 8);
            }
            Kind::Half => {
                let whole = much(true);
                stream.write_all(&whole.as_bytes()[..random.below(whole.len() as u64) as usize])?;
                thread::sleep(wait * 8);
            }
            Kind::Garbage => {
                let garbage: Vec<u8> = (0..random.below(3000)).map(|_| random.below(256) as u8).collect();
                stream.write_all(&garbage)?;
                thread::sleep(wait / 4);
            }
            Kind::Nonsense => {
                let bodies = [
                    r#"{"prompt": 5}"#,
                    r#"{"prompt": [[[[]]]]}"#,
                    "{",
                    "",
                    r#"{"prompt": "x", "n": 1e99}"#,
                    r#"{"messages": [{}]}"#,
                    r#"{"prompt": [9999999]}"#,
                    r#"{"prompt": "x", "odd": null, "stop": [""]}"#,
                ];
                stream.write_all(post(bodies[random.below(bodies.len() as u64) as usize]).as_bytes())?;
                stream.read_to_end(&mut Vec::new())?;
            }
        }
        Ok(())
    }
}
