//! A hub on this machine: it lists the speller, and points for its weights to a second server, as the real one does.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use ring::digest::{SHA256, digest};
use serde_json::json;
use support::speller;

/// The commit that `main` stands for.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The files that a run needs, in the order in which they are taken.
pub const NEEDED: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];
/// What the repository has besides.
const OTHERS: [&str; 5] = ["README.md", "consolidated.safetensors", "onnx/model.onnx", "pytorch_model.bin", "q4.gguf"];

/// What was asked of whom.
#[derive(Clone, Debug)]
pub struct Asked {
    pub of_hub: bool,
    pub method: String,
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

impl Asked {
    /// Whether bytes of this file were asked for where they lie.
    pub fn is_bytes_of(&self, file: &str) -> bool {
        !self.of_hub && self.method == "GET" && self.path.split('?').next().unwrap().ends_with(file)
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What a server says.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// Of the body, what is sent before the connection ends.
    pub cut: Option<usize>,
    /// Nothing more is sent, and the connection ends when the other side ends it.
    pub holds: bool,
}

impl Answer {
    pub fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), cut: None, holds: false }
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.retain(|(known, _)| *known != name);
        self.headers.push((name, value.into()));
        self
    }
}

/// Makes of a right answer what a test wants to see.
pub type Twist = Box<dyn Fn(&Asked, Answer) -> Answer + Send + Sync>;

/// A connection as HTTP sees it: as it comes, or within TLS.
pub trait Connection: Read + Write {}

impl<T: Read + Write> Connection for T {}

type Wrap = fn(TcpStream) -> Box<dyn Connection>;

pub struct Servers {
    pub address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Servers {
    pub fn start(twist: impl Fn(&Asked, Answer) -> Answer + Send + Sync + 'static) -> Self {
        Self::behind("http://127.0.0.1", |connection| Box::new(connection), twist)
    }

    /// Servers of this origin, which is one of this machine. Connections are what `wrap` makes of them.
    pub fn behind(origin: &str, wrap: Wrap, twist: impl Fn(&Asked, Answer) -> Answer + Send + Sync + 'static) -> Self {
        let (hub, cdn) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = |of: &TcpListener| format!("{origin}:{}", of.local_addr().unwrap().port());
        let (of_hub, of_cdn) = (address(&hub), address(&cdn));
        let (asked, twist) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Box::new(twist) as Twist));
        for (listener, is_hub) in [(hub, true), (cdn, false)] {
            let (asked, twist, of_cdn) = (asked.clone(), twist.clone(), of_cdn.clone());
            thread::spawn(move || {
                for connection in listener.incoming() {
                    let (asked, twist, of_cdn) = (asked.clone(), twist.clone(), of_cdn.clone());
                    thread::spawn(move || serve(&mut *wrap(connection.unwrap()), is_hub, &of_cdn, &asked, &twist));
                }
            });
        }
        Self { address: of_hub, asked }
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

/// Answers one question.
fn serve(connection: &mut dyn Connection, of_hub: bool, cdn: &str, asked: &Mutex<Vec<Asked>>, twist: &Twist) {
    let mut lines = BufReader::new(&mut *connection).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let headers = lines.take_while(|line| !line.is_empty());
    let headers =
        headers.filter_map(|line| line.split_once(": ").map(|(name, value)| (name.to_ascii_lowercase(), value.into())));
    let question = Asked { of_hub, method, path, headers: headers.collect() };
    asked.lock().unwrap().push(question.clone());
    let right = if of_hub { hub(&question, cdn) } else { bytes(&question) };
    let answer = twist(&question, right);
    let mut text = format!("HTTP/1.1 {} So\r\nConnection: close\r\n", answer.status);
    if !answer.headers.iter().any(|(name, _)| *name == "Content-Length") {
        text.push_str(&format!("Content-Length: {}\r\n", answer.body.len()));
    }
    // An empty one says that it is not told.
    let headers = answer.headers.iter().filter(|(_, value)| !value.is_empty());
    headers.for_each(|(name, value)| text.push_str(&format!("{name}: {value}\r\n")));
    text.push_str("\r\n");
    let body = if question.method == "HEAD" { &[] } else { &answer.body[..answer.cut.unwrap_or(answer.body.len())] };
    // Whoever asked may have gone away.
    let _ = connection.write_all(text.as_bytes()).and_then(|()| connection.write_all(body));
    if answer.holds {
        let _ = connection.read(&mut [0]);
    }
}

/// What a file of the speller holds.
pub fn held(file: &str) -> Vec<u8> {
    fs::read(speller().join(file)).unwrap()
}

/// What names it: the hash of a large file, and something else for a small one.
pub fn etag(file: &str) -> String {
    let hash = digest(&SHA256, &held(file));
    let hex: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    if file.ends_with(".safetensors") { hex } else { hex[..40].to_owned() }
}

fn hub(asked: &Asked, cdn: &str) -> Answer {
    let revisions = [COMMIT, "main"].map(|revision| format!("/api/models/org/speller/revision/{revision}"));
    if revisions.contains(&asked.path) {
        let files = NEEDED.iter().chain(&OTHERS).map(|file| json!({ "rfilename": file })).collect::<Vec<_>>();
        let listing = json!({ "id": "org/speller", "sha": COMMIT, "siblings": files });
        return Answer { body: listing.to_string().into_bytes(), ..Answer::status(200) };
    }
    let file = asked.path.strip_prefix(&format!("/org/speller/resolve/{COMMIT}/"));
    let Some(file) = file.filter(|file| NEEDED.contains(file)) else { return Answer::status(404) };
    let answer = Answer::status(200).with("X-Repo-Commit", COMMIT);
    if file.ends_with(".safetensors") {
        let (etag, length) = (format!("\"{}\"", etag(file)), held(file).len().to_string());
        let location = format!("{cdn}/blobs/{file}?Signature=x/y");
        let found = Answer { status: 302, body: b"Found".to_vec(), ..answer };
        return found.with("X-Linked-Etag", etag).with("X-Linked-Size", length).with("Location", location);
    }
    Answer { body: held(file), ..answer }.with("ETag", format!("W/\"{}\"", etag(file)))
}

fn bytes(asked: &Asked) -> Answer {
    let file = asked.path.trim_start_matches("/blobs/").split('?').next().unwrap();
    let (body, answer) = (held(file), Answer::status(200).with("ETag", "\"another\""));
    let first = asked.header("range").map(|range| {
        range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-')).unwrap().parse::<usize>().unwrap()
    });
    match first {
        None => Answer { body, ..answer },
        Some(first) if first >= body.len() => {
            Answer::status(416).with("Content-Range", format!("bytes */{}", body.len()))
        }
        Some(first) => {
            let range = format!("bytes {first}-{}/{}", body.len() - 1, body.len());
            Answer { status: 206, body: body[first..].to_vec(), ..answer }.with("Content-Range", range)
        }
    }
}
