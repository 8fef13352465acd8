//! `layer-streamer serve` as a process, and clients of it.

pub mod client;

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use client::Client;

use crate::run::{self, Failure};

pub struct Server {
    child: Child,
    pub address: SocketAddr,
}

impl Server {
    /// Serves a model on the CPU, at a port that is free, with further options.
    pub fn start(program: &Path, model: &Path, options: &str) -> Result<Self, Failure> {
        let mut command = run::command(program, &["serve", "--device", "cpu", "--no-probe", "--port", "0", "--model"]);
        command.arg(model).args(options.split_whitespace());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stderr.take().ok_or("stderr is a pipe")?).lines().map_while(Result::ok);
        let mut said = Vec::new();
        let address = lines.by_ref().find_map(|line| {
            let address = line.strip_prefix("listening on http://").and_then(|address| address.parse().ok());
            said.push(line);
            address
        });
        // What it says from now on is passed on, so that it never waits for us.
        thread::spawn(move || lines.for_each(|line| eprintln!("server: {line}")));
        match address {
            Some(address) => Ok(Self { child, address }),
            None => {
                let _ = child.kill();
                let (ended, said) = (child.wait()?, said.join("\n"));
                Err(format!("the server does not listen; it ended with {ended}: {said}").into())
            }
        }
    }

    pub fn client(&self) -> Client {
        Client::of(self.address)
    }

    /// A figure of `/metrics`.
    pub fn figure(&self, name: &str) -> Result<u64, Failure> {
        let text = self.client().get("/metrics")?;
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("layer_streamer_{name} ")));
        Ok(value.ok_or_else(|| format!("/metrics has no {name}"))?.parse()?)
    }

    /// What it says that it takes of memory, by purpose, in bytes.
    pub fn said(&self) -> Result<Vec<(String, u64)>, Failure> {
        let text = self.client().get("/metrics")?;
        let of = |line: &str| {
            let (labels, bytes) = line.strip_prefix("layer_streamer_memory_bytes{purpose=\"")?.split_once("\"} ")?;
            let (purpose, _) = labels.split_once("\",memory=\"")?;
            Some((purpose.to_owned(), bytes.parse().ok()?))
        };
        Ok(text.lines().filter_map(of).collect())
    }

    /// Waits until nothing runs or waits, and ours is the only connection.
    pub fn wait_until_quiet(&self, patience: Duration) -> Result<(), Failure> {
        let begun = Instant::now();
        loop {
            let names = ["requests_running", "requests_waiting", "connections"];
            let [running, waiting, connections] = names.map(|name| self.figure(name));
            let left = [running?, waiting?, connections?];
            if left == [0, 0, 1] {
                return Ok(());
            }
            if begun.elapsed() > patience {
                let [running, waiting, connections] = left;
                return Err(format!("{running} sequences run, {waiting} wait and {connections} connections are open long after the last client left").into());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// How many files it has open: a second after our last connection, unless there are no more than so many before.
    pub fn files_left(&self, most: usize) -> Result<usize, Failure> {
        let begun = Instant::now();
        loop {
            let files = fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count();
            if files <= most || begun.elapsed() > Duration::from_secs(1) {
                return Ok(files);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// A line of its status, in bytes.
    pub fn memory(&self, name: &str) -> Result<u64, Failure> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        let kilobytes = line.ok_or_else(|| format!("no {name} in its status"))?.trim().trim_end_matches(" kB");
        Ok(kilobytes.parse::<u64>()? * 1024)
    }

    /// Tells it to end, and waits.
    pub fn end(&mut self) -> Result<(), Failure> {
        // SAFETY: no memory is involved; the child has not been waited for, so that the number is its own.
        unsafe { libc::kill(libc::pid_t::try_from(self.child.id())?, libc::SIGTERM) };
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(20) {
            if let Some(status) = self.child.try_wait()? {
                return if status.success() { Ok(()) } else { Err(format!("the server ended with {status}").into()) };
            }
            thread::sleep(Duration::from_millis(10));
        }
        Err("the server does not end when told to".into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
