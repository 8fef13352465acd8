//! Chromium, spoken to through pipes: commands and events are JSON, each ended by a zero byte.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, PipeWriter, Write},
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::Child,
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::run::{self, Failure};

/// How long an answer or a change of the page may take.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Window {
    pub width: u32,
    pub height: u32,
    pub scale: f64,
    pub dark: bool,
}

pub struct Browser {
    child: Child,
    log: PathBuf,
    commands: PipeWriter,
    messages: Receiver<Vec<u8>>,
    number: u64,
    session: Option<String>,
    /// What the page has reported since it was opened.
    pub events: Vec<Value>,
}

impl Browser {
    /// Starts one with an empty page. Its profile and its log go into the folder.
    pub fn start(work: &Path, window: &Window) -> Result<Self, Failure> {
        let names = ["chromium", "chromium-browser", "google-chrome"];
        let name =
            names.iter().find(|name| run::is_there(name)).ok_or("there is no Chromium; ci/tools installs one")?;
        let (read_commands, commands) = io::pipe()?;
        let (answers, write_answers) = io::pipe()?;
        let log = work.join("chromium.log");
        let mut command =
            run::command(name, &["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]);
        command.args(["--no-first-run", "--hide-scrollbars", "--disable-background-networking"]);
        command.arg(format!("--user-data-dir={}", work.join("profile").display()));
        command.stdout(File::create(&log)?).stderr(File::options().append(true).open(&log)?);
        let ends = [read_commands.as_raw_fd(), write_answers.as_raw_fd()];
        // SAFETY: the closure calls nothing but fcntl and dup2, which may be called between fork and exec, and allocates nothing.
        // Both descriptors are open until the child is spawned.
        unsafe { command.pre_exec(move || place(ends)) };
        let child = command.spawn()?;
        let (sender, messages) = mpsc::channel();
        thread::spawn(move || {
            for message in BufReader::new(answers).split(0).map_while(Result::ok) {
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Self { child, log, commands, messages, number: 0, session: None, events: Vec::new() };
        browser.attach(window)?;
        Ok(browser)
    }

    fn attach(&mut self, window: &Window) -> Result<(), Failure> {
        let target = self.call("Target.createTarget", json!({"url": "about:blank"}))?["targetId"].take();
        let session =
            self.call("Target.attachToTarget", json!({"targetId": target, "flatten": true}))?["sessionId"].take();
        self.session = Some(session.as_str().ok_or("Chromium attaches to no page")?.to_owned());
        for domain in ["Page", "Runtime", "Network", "Log"] {
            self.call(&format!("{domain}.enable"), json!({}))?;
        }
        let Window { width, height, scale, dark } = window;
        let metrics = json!({"width": width, "height": height, "deviceScaleFactor": scale, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", metrics)?;
        let scheme = if *dark { "dark" } else { "light" };
        self.call(
            "Emulation.setEmulatedMedia",
            json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]}),
        )?;
        Ok(())
    }

    /// Calls a method of the DevTools protocol; returns its result.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, Failure> {
        self.number += 1;
        let mut command = json!({"id": self.number, "method": method, "params": params});
        if let Some(session) = &self.session {
            command["sessionId"] = json!(session);
        }
        let mut bytes = serde_json::to_vec(&command)?;
        bytes.push(0);
        self.commands.write_all(&bytes)?;
        let until = Instant::now() + PATIENCE;
        loop {
            let mut message = self.message(until)?;
            if message["id"] != self.number {
                self.events.push(message);
            } else if message["error"].is_null() {
                return Ok(message["result"].take());
            } else {
                return Err(format!("{method}: {}", message["error"]).into());
            }
        }
    }

    fn message(&self, until: Instant) -> Result<Value, Failure> {
        match self.messages.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(message) => Ok(serde_json::from_slice(&message)?),
            Err(RecvTimeoutError::Timeout) => Err("Chromium does not answer".into()),
            Err(RecvTimeoutError::Disconnected) => {
                let log = fs::read_to_string(&self.log)?;
                let end =
                    log.lines().rev().take(20).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
                Err(format!("Chromium has ended:\n{end}").into())
            }
        }
    }

    /// Opens a page, and waits until an expression is true there.
    pub fn open(&mut self, address: &str, ready: &str) -> Result<(), Failure> {
        // A page of its own, not another place in the one that is there.
        self.call("Page.navigate", json!({"url": "about:blank"}))?;
        self.call("Page.navigate", json!({"url": address}))?;
        self.wait(ready, "the page is there")
    }

    /// What a JavaScript expression gives on the page.
    pub fn value(&mut self, expression: &str) -> Result<Value, Failure> {
        let params = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let mut result = self.call("Runtime.evaluate", params)?;
        match result.get("exceptionDetails") {
            Some(details) => Err(format!("{expression}: {details}").into()),
            None => Ok(result["result"]["value"].take()),
        }
    }

    /// Waits until an expression is true.
    pub fn wait(&mut self, expression: &str, what: &str) -> Result<(), Failure> {
        let until = Instant::now() + PATIENCE;
        while self.value(expression)? != true {
            if Instant::now() > until {
                let errors = self.errors();
                return Err(format!("a minute has passed and it is not so that {what}; {errors:?}").into());
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    pub fn mouse(&mut self, kind: &str, (x, y): (f64, f64), mut more: Value) -> Result<(), Failure> {
        more["type"] = json!(kind);
        (more["x"], more["y"]) = (json!(x), json!(y));
        self.call("Input.dispatchMouseEvent", more).map(drop)
    }

    pub fn drag(&mut self, start: (f64, f64), end: (f64, f64)) -> Result<(), Failure> {
        let left = || json!({"button": "left"});
        let click = || json!({"button": "left", "clickCount": 1});
        self.mouse("mousePressed", start, click())?;
        self.mouse("mouseMoved", (f64::midpoint(start.0, end.0), end.1), left())?;
        self.mouse("mouseMoved", end, left())?;
        self.mouse("mouseReleased", end, click())
    }

    pub fn key(&mut self, key: &str) -> Result<(), Failure> {
        for kind in ["keyDown", "keyUp"] {
            self.call("Input.dispatchKeyEvent", json!({"type": kind, "key": key}))?;
        }
        Ok(())
    }

    /// Puts text where the page's keys go.
    pub fn write(&mut self, text: &str) -> Result<(), Failure> {
        self.call("Input.insertText", json!({"text": text})).map(drop)
    }

    /// Presses the mouse in the middle of what a selector finds.
    pub fn click(&mut self, selector: &str) -> Result<(), Failure> {
        let place = format!(
            "(({{ left, top, width, height }}) => [left + width / 2, top + height / 2])(document.querySelector({}).getBoundingClientRect())",
            json!(selector)
        );
        let place = self.value(&place)?;
        let [x, y] = [&place[0], &place[1]].map(|side| side.as_f64().unwrap_or(f64::NAN));
        for kind in ["mousePressed", "mouseReleased"] {
            self.mouse(kind, (x, y), json!({"button": "left", "clickCount": 1}))?;
        }
        Ok(())
    }

    /// Exceptions, errors and warnings since the events were cleared.
    pub fn errors(&self) -> Vec<String> {
        let is_bad = |level: &Value| level == "error" || level == "warning" || level == "assert";
        let mut bad = Vec::new();
        for event in &self.events {
            let params = &event["params"];
            match event["method"].as_str() {
                Some("Runtime.exceptionThrown") => bad.push(params["exceptionDetails"].to_string()),
                Some("Runtime.consoleAPICalled") if is_bad(&params["type"]) => bad.push(params["args"].to_string()),
                Some("Log.entryAdded") if is_bad(&params["entry"]["level"]) => {
                    bad.push(params["entry"]["text"].to_string())
                }
                _ => {}
            }
        }
        bad
    }

    /// Addresses that were asked for, less what a page carries itself.
    pub fn requests(&self) -> Vec<String> {
        let sent = self.events.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        let urls = sent.filter_map(|event| event["params"]["request"]["url"].as_str().map(str::to_owned));
        urls.filter(|url| !url.starts_with("data:")).collect()
    }
}

/// Puts the pipes where Chromium looks for them: commands at 3, answers at 4.
fn place(ends: [i32; 2]) -> io::Result<()> {
    // Above both places first, since either may be where the other one goes.
    // SAFETY: the calls take no pointers, and the descriptors are open.
    let placed = unsafe {
        let above = ends.map(|end| libc::fcntl(end, libc::F_DUPFD_CLOEXEC, 20));
        above.iter().all(|end| *end >= 0) && libc::dup2(above[0], 3) == 3 && libc::dup2(above[1], 4) == 4
    };
    if placed { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if let Ok(id) = i32::try_from(self.child.id()) {
            // SAFETY: the call takes no pointer. The child is not yet waited for, so that the number is not another process's.
            unsafe { libc::kill(id, libc::SIGTERM) };
        }
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
