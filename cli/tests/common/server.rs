//! A server of the program's, and clients that speak plain HTTP to it.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Mutex,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

/// Nothing that is waited for takes so long.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Server {
    child: Child,
    pub address: SocketAddr,
    /// What it says on stderr, from where it listens on.
    said: Mutex<Receiver<String>>,
}

impl Server {
    /// Starts `serve` with this model on any port, and waits until it listens.
    pub fn start(model: &Path, options: &[&str]) -> Self {
        let mut command = super::common::program("serve");
        command.args(["--device", "cpu", "--no-probe", "--port", "0", "--model"]).arg(model).args(options);
        Self::run(&mut command)
    }

    pub fn run(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, said) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let mut lines = Vec::new();
        let address = loop {
            let line = said.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("it does not listen: {lines:?}"));
            if let Some(address) = line.strip_prefix("listening on http://") {
                break address.parse().unwrap();
            }
            lines.push(line);
        };
        Self { child, address, said: Mutex::new(said) }
    }

    /// Waits until it says a line with this on stderr.
    pub fn expect(&self, part: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        while let Ok(line) = self.said.lock().unwrap().recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            if line.contains(part) {
                return line;
            }
        }
        panic!("it never says {part:?}");
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request with this JSON, whose answer is not waited for.
    pub fn send(&self, path: &str, body: &Value) -> TcpStream {
        let mut stream = self.connect();
        stream.write_all(request("POST", path, &[], &body.to_string()).as_bytes()).unwrap();
        stream
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        Reply::read(self.send(path, body))
    }

    pub fn get(&self, path: &str) -> Reply {
        self.ask("GET", path, &[], "")
    }

    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
        let mut stream = self.connect();
        // One that refuses early may not read it all.
        let _ = stream.write_all(request(method, path, headers, body).as_bytes());
        Reply::read(stream)
    }

    /// The first answer's text, of a request that is answered.
    pub fn completed(&self, body: &Value) -> String {
        let reply = self.post("/v1/completions", body);
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.json()["choices"][0]["text"].as_str().unwrap().to_owned()
    }

    /// A figure of `/metrics`.
    pub fn figure(&self, name: &str) -> u64 {
        let text = self.get("/metrics").text();
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("layer_streamer_{name} ")));
        value.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    /// Waits until a figure is this one.
    pub fn wait_for(&self, name: &str, value: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.figure(name) != value {
            assert!(Instant::now() < deadline, "{name} is {} for long, not {value}", self.figure(name));
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn signal(&self, number: libc::c_int) {
        // SAFETY: no memory is involved; the child has not been waited for, so that the number is its own.
        assert_eq!(unsafe { libc::kill(self.child.id() as libc::pid_t, number) }, 0);
    }

    /// Waits until it has ended.
    pub fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    /// A test that failed leaves nothing running.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A request as it goes over the wire, after which the connection closes.
pub fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> String {
    let mut text = format!("{method} {path} HTTP/1.1\r\n");
    let given = |name: &str| headers.iter().any(|(given, _)| given.eq_ignore_ascii_case(name));
    for (name, value) in [
        ("Host", "localhost"),
        ("Connection", "close"),
        ("Content-Type", "application/json"),
        ("Content-Length", &body.len().to_string()),
    ] {
        if !given(name) {
            text += &format!("{name}: {value}\r\n");
        }
    }
    headers.iter().for_each(|(name, value)| text += &format!("{name}: {value}\r\n"));
    format!("{text}\r\n{body}")
}

/// What a server answers.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Reply {
    /// Reads all that comes until the connection closes.
    pub fn read(mut stream: impl Read) -> Self {
        let mut bytes = Vec::new();
        // A server that closes early may reset the connection after its answer.
        let _ = stream.read_to_end(&mut bytes);
        let at = bytes.windows(4).position(|four| four == b"\r\n\r\n");
        let at = at.unwrap_or_else(|| panic!("no answer: {:?}", String::from_utf8_lossy(&bytes)));
        let head = String::from_utf8(bytes[..at].to_vec()).unwrap();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let header = |line: &str| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
        let headers: BTreeMap<_, _> = lines.filter_map(header).collect();
        let body = bytes.split_off(at + 4);
        let is_chunked = headers.get("transfer-encoding").is_some_and(|how| how == "chunked");
        Self { status, headers, body: if is_chunked { joined(&body) } else { body } }
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The events of a stream, without the last, which has to be `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        let text = self.text();
        let mut events: Vec<_> = text.split_terminator("\n\n").filter(|event| !event.starts_with(':')).collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{text}");
        events.iter().map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }
}

/// The bytes of a chunked body, of which the end may be missing.
fn joined(mut body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(at) = body.windows(2).position(|two| two == b"\r\n") {
        let length = usize::from_str_radix(std::str::from_utf8(&body[..at]).unwrap(), 16).unwrap();
        let end = (at + 2 + length).min(body.len());
        bytes.extend_from_slice(&body[at + 2..end]);
        body = body.get(end + 2..).unwrap_or_default();
        if length == 0 {
            break;
        }
    }
    bytes
}
