//! Pipelines that take turns, each window of one between two of its limit.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use layer_streamer::{device::Device, plan::Plan};

use super::{Disk, Link, MappedTensors, Moved, Pipeline, PlainCopy, Used, Way, mapped::summed};
use crate::report::Failure;

/// What is measured as a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Raw reads past the page cache.
    Direct,
    /// Raw reads through it.
    Buffered,
    /// Plain copies to the device.
    Copy,
    /// A sum of all bytes where the page cache has them.
    Mapped,
}

impl Kind {
    pub fn link(self) -> &'static str {
        match self {
            Self::Direct => "disk",
            Self::Buffered => "page cache",
            Self::Copy => "copy to the device",
            Self::Mapped => "mapped files",
        }
    }

    pub fn doing(self) -> &'static str {
        match self {
            Self::Direct => "from disk",
            Self::Buffered => "through the page cache",
            Self::Copy => "copying to the device",
            Self::Mapped => "summed in the page cache",
        }
    }
}

/// A pipeline, and what was measured of it.
pub struct Lane<D: Device> {
    /// The value that is tried, in a sweep.
    pub value: usize,
    pub plan: Plan,
    pub pipeline: Pipeline<D>,
    /// What it is measured beside; none where nothing moves.
    pub kind: Option<Kind>,
    pub windows: Vec<Used>,
    /// GB/s of the limit about each window: the mean of the windows before and after.
    pub limits: Vec<f64>,
    /// Seconds of each pass, where passes were timed or nothing moves.
    pub passes: Vec<f64>,
}

impl<D: Device> Lane<D> {
    /// After `find_out`.
    pub fn new(value: usize, plan: Plan, pipeline: Pipeline<D>, moves: bool) -> Self {
        let read = pipeline.per_pass;
        let kind = match () {
            () if !moves && read.mapped == plan.bytes_per_pass() as u64 => Some(Kind::Mapped),
            () if !moves => None,
            () if !pipeline.reads => Some(Kind::Copy),
            // The raw reader reads as the pipeline does for the most part.
            () if read.direct >= read.buffered => Some(Kind::Direct),
            () => Some(Kind::Buffered),
        };
        Self { value, plan, pipeline, kind, windows: Vec::new(), limits: Vec::new(), passes: Vec::new() }
    }

    /// Bytes a pass over the link that it is measured beside.
    pub fn pass_bytes(&self) -> u64 {
        let per_pass = self.pipeline.per_pass;
        match self.kind {
            Some(Kind::Mapped) => per_pass.mapped,
            _ if self.pipeline.reads => per_pass.read(),
            _ => per_pass.transfer,
        }
    }

    /// GB/s over that link, window by window or pass by pass.
    pub fn rates(&self) -> Vec<f64> {
        match self.passes.is_empty() {
            true => self.windows.iter().map(|used| used.moved.rate()).collect(),
            false => self.passes.iter().map(|seconds| self.pass_bytes() as f64 / 1e9 / seconds).collect(),
        }
    }

    /// Seconds of a pass, likewise.
    pub fn pass_seconds(&self) -> Vec<f64> {
        match self.passes.is_empty() {
            true => self.rates().iter().map(|rate| self.pass_bytes() as f64 / 1e9 / rate).collect(),
            false => self.passes.clone(),
        }
    }

    /// Each rate over that of the limit about it.
    pub fn ratios(&self) -> Vec<f64> {
        let limits = self.limits.iter().cycle();
        self.rates().iter().zip(limits).map(|(rate, limit)| rate / limit).collect()
    }

    /// All windows together.
    pub fn used(&self) -> Used {
        let mut sum = Used::default();
        self.windows.iter().for_each(|used| sum.add(*used));
        sum
    }

    /// How long a pass takes in which nothing moves.
    pub fn time_still_passes(&mut self, rounds: u32) -> Result<(), Failure> {
        for _ in 0..rounds {
            let start = Instant::now();
            (0..100).try_for_each(|_| self.pipeline.pass())?;
            self.passes.push(start.elapsed().as_secs_f64() / 100.0);
        }
        Ok(())
    }

    /// The same where all layers are used from the page cache: passes that sum their bytes, each before the same sum without a pipeline.
    pub fn sum_passes(&mut self, tensors: &MappedTensors, rounds: u32) -> Result<(), Failure> {
        for _ in 0..rounds {
            let [pass, plain] = summed(&mut self.pipeline, tensors)?;
            self.passes.push(pass);
            self.limits.push(self.pass_bytes() as f64 / 1e9 / plain);
        }
        Ok(())
    }
}

/// The links by themselves.
pub struct Limits<'a, D: Device> {
    pub disk: &'a Disk,
    /// The fastest way past the page cache, and through it, as far as they are measured.
    pub ways: [Option<Way>; 2],
    /// To a device with memory of its own.
    pub link: Option<Link<D>>,
    /// To any other.
    pub copy: PlainCopy,
    /// CPU time of the windows of each.
    pub moved: [Moved; 3],
    pub window: Duration,
    /// Asked before each window: an error ends the run.
    pub go_on: &'a dyn Fn() -> Result<(), Failure>,
}

impl<D: Device> Limits<'_, D> {
    pub fn name(&self, kind: Kind) -> String {
        match (kind, &self.link) {
            (Kind::Copy, Some(link)) => link.name(),
            (Kind::Copy, None) => self.copy.name(),
            (Kind::Mapped, _) => "the same sum over the files mapped plainly, by one thread".into(),
            (kind, _) => self.ways[kind as usize].map_or(String::new(), |way| way.to_string()),
        }
    }

    /// Finds the fastest way of reading, if it is not known.
    pub fn warm_up(&mut self, kind: Kind, time: Duration) -> Result<(), Failure> {
        if kind != Kind::Copy && self.ways[kind as usize].is_none() {
            self.ways[kind as usize] = Some(self.disk.fastest(kind == Kind::Direct, time, self.go_on)?);
        }
        Ok(())
    }

    /// GB/s of a copy, without any pipeline about.
    pub fn plain_window(&mut self, window: Duration) -> Result<f64, Failure> {
        let moved = match &mut self.link {
            Some(link) => link.window(window)?,
            None => self.copy.window(window),
        };
        self.moved[Kind::Copy as usize].add(moved);
        Ok(moved.rate())
    }

    /// GB/s of the limit. While it begins `settle` comes to rest, and before it ends `empty` gives up what it has read ahead.
    pub fn window(
        &mut self,
        kind: Kind,
        settle: Option<&Pipeline<D>>,
        empty: Option<&Pipeline<D>>,
    ) -> Result<f64, Failure> {
        (self.go_on)()?;
        let settle = || {
            settle.into_iter().for_each(Pipeline::settle);
            Ok(())
        };
        let empty = || empty.map_or(Ok(()), Pipeline::empty);
        let Some(way) = self.ways.get(kind as usize).copied().flatten() else {
            settle()?;
            let rate = self.plain_window(self.window)?;
            empty()?;
            return Ok(rate);
        };
        let moved = self.disk.window_between(way, self.window, settle, empty)?.0;
        self.moved[kind as usize].add(moved);
        Ok(moved.rate())
    }
}

/// Windows of each lane, in an order that turns round from round to round, each between two of its limit.
pub fn take_turns<D: Device>(
    lanes: &mut [Lane<D>],
    limits: &mut Limits<'_, D>,
    rounds: u32,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let moves = |lane: &Lane<D>| lane.kind.is_some_and(|kind| kind != Kind::Mapped);
    let moving: Vec<usize> = (0..lanes.len()).filter(|&lane| moves(&lanes[lane])).collect();
    let turns: Vec<usize> = (0..rounds)
        .flat_map(|round| {
            let mut order = moving.clone();
            if round % 2 == 1 {
                order.reverse();
            }
            order
        })
        .collect();
    let mut before = None;
    for (number, &turn) in turns.iter().enumerate() {
        let Some(kind) = lanes[turn].kind else { continue };
        let first = match before.take() {
            Some(rate) => rate,
            None => limits.window(kind, Some(&lanes[turn].pipeline), Some(&lanes[turn].pipeline))?,
        };
        let used = lanes[turn].pipeline.window(limits.window)?;
        // The window of the limit after this one is that before the next, if it has the same.
        let next = turns.get(number + 1).map(|&next| &lanes[next]).filter(|next| next.kind == Some(kind));
        let after = limits.window(kind, Some(&lanes[turn].pipeline), next.map(|next| &next.pipeline))?;
        before = next.is_some().then_some(after);
        lanes[turn].windows.push(used);
        lanes[turn].limits.push((first + after) / 2.0);
        bar.inc(1);
    }
    Ok(())
}

/// Whole passes, back to back, between two windows of the limit.
pub fn time_passes<D: Device>(lane: &mut Lane<D>, limits: &mut Limits<'_, D>, count: u32) -> Result<(), Failure> {
    let Some(kind) = lane.kind else { return Ok(()) };
    let first = limits.window(kind, Some(&lane.pipeline), Some(&lane.pipeline))?;
    // From here on pass follows pass, and each begins and ends with as much in the slots as the one before.
    lane.pipeline.finish_pass()?;
    let passes = &mut lane.passes;
    passes.reserve(count as usize);
    let used = lane.pipeline.measure(|pipeline| {
        (0..count).try_for_each(|_| {
            (limits.go_on)()?;
            let start = Instant::now();
            pipeline.pass()?;
            passes.push(start.elapsed().as_secs_f64());
            Ok(())
        })
    })?;
    let after = limits.window(kind, Some(&lane.pipeline), None)?;
    lane.windows.push(used);
    lane.limits.push((first + after) / 2.0);
    Ok(())
}
