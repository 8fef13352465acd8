//! What every benchmark prints: one table with a legend and the limit beside it, or one JSON object of the same shape for all.
//!
//! A benchmark fills a [`Report`] and hands it to [`run`]:
//!
//! ```ignore
//! let mut report = Report::new("bench_trace", device.describe(), &[
//!     column("what", "what", Show::Text, ""),
//!     column("ns", "ns", Show::Spread(1), "time of one span, median and half of the range over the rounds"),
//! ]);
//! report.row([json!("span"), json!(Spread::of(&samples))]);
//! report.compare(Figure::new("with an observer", "ns", &with), Figure::new("without", "ns", &without), &ratios);
//! ```
#![allow(dead_code, unused_imports, reason = "each benchmark uses a part")]

mod options;
mod plot;
#[path = "../../../cli/src/units.rs"]
pub mod units;

use std::{
    fmt,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use indicatif::{ProgressBar, ProgressStyle};
use layer_streamer::files::NewFile;
pub use options::{Common, PlotTo, by_default, seconds};
pub use plot::{Line, Panel, Plot};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Samples of one thing, in short.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    pub samples: usize,
}

impl Spread {
    /// All zero without samples.
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(0.0);
        let count = sorted.len();
        let median = (at(count.saturating_sub(1) / 2) + at(count / 2)) / 2.0;
        let median = if count.is_multiple_of(2) { median } else { at(count / 2) };
        Self { median, min: at(0), max: at(count.saturating_sub(1)), samples: count }
    }

    /// Half of the distance between the extremes; none where there is one sample.
    fn half_range(&self) -> Option<f64> {
        (self.samples > 1).then_some((self.max - self.min) / 2.0)
    }

    /// Median and range, such as `1.63 (1.55 to 1.70)`; the median alone where there is no range.
    pub fn text(&self, number: impl Fn(f64) -> String) -> String {
        match self.samples {
            0 | 1 => number(self.median),
            _ => format!("{} ({} to {})", number(self.median), number(self.min), number(self.max)),
        }
    }
}

/// The value below which this share of the samples lies; sorts them. 0 without samples.
pub fn quantile(samples: &mut [f64], share: f64) -> f64 {
    samples.sort_unstable_by(f64::total_cmp);
    samples.get((samples.len().saturating_sub(1) as f64 * share).round() as usize).copied().unwrap_or(0.0)
}

/// How the text shows a column's values.
#[derive(Clone, Copy)]
pub enum Show {
    Text,
    Count,
    /// So many digits after the point.
    Fixed(usize),
    /// Three digits that say something.
    Significant,
    /// Such as `1e-3`.
    Power,
    Bytes,
    Seconds,
    /// A share of 1.
    Percent,
    /// A [`Spread`]: the median and half of the range, with so many digits after the point.
    Spread(usize),
    /// The same of a time in seconds.
    SpreadOfSeconds,
    /// This text where it is true.
    Mark(&'static str),
}

/// One column of the table.
#[derive(Clone, Copy)]
pub struct Column {
    /// Its name in JSON.
    key: &'static str,
    /// Its name in the table, with the unit.
    heading: &'static str,
    show: Show,
    /// What it means, where that is not evident.
    legend: &'static str,
}

pub const fn column(key: &'static str, heading: &'static str, show: Show, legend: &'static str) -> Column {
    Column { key, heading, show, legend }
}

impl Column {
    fn text(&self, value: &Value) -> String {
        let number = value.as_f64();
        let spread = Spread::deserialize(value).ok();
        let text = match self.show {
            Show::Text => value.as_str().map(str::to_owned),
            Show::Count => number.map(|count| format!("{count:.0}")),
            Show::Fixed(digits) => number.map(|number| format!("{number:.digits$}")),
            Show::Significant => number.map(units::significant),
            Show::Power => number.map(|number| if number == 0.0 { "0".into() } else { format!("{number:.0e}") }),
            Show::Bytes => value.as_u64().map(units::bytes),
            Show::Seconds => number.map(units::seconds),
            Show::Percent => number.map(|share| format!("{:.0} %", 100.0 * share)),
            Show::Mark(mark) => (value == &Value::Bool(true)).then(|| format!("← {mark}")),
            Show::Spread(digits) => spread.map(|spread| match spread.half_range() {
                Some(half) => format!("{:.digits$} ±{half:.digits$}", spread.median),
                None => format!("{:.digits$}", spread.median),
            }),
            Show::SpreadOfSeconds => spread.map(|spread| match spread.half_range() {
                Some(half) => format!("{} ±{:.0} %", units::seconds(spread.median), 100.0 * half / spread.median),
                None => units::seconds(spread.median),
            }),
        };
        text.unwrap_or_default()
    }

    fn left(&self) -> bool {
        matches!(self.show, Show::Text | Show::Mark(_))
    }
}

/// One figure that a benchmark is about.
#[derive(Clone)]
pub struct Figure {
    what: String,
    unit: &'static str,
    pub spread: Spread,
}

impl Figure {
    pub fn new(what: impl Into<String>, unit: &'static str, samples: &[f64]) -> Self {
        Self { what: what.into(), unit, spread: Spread::of(samples) }
    }

    fn json(&self) -> Value {
        let Spread { median, min, max, samples } = self.spread;
        json!({"what": self.what, "unit": self.unit, "median": median, "min": min, "max": max, "samples": samples})
    }

    fn text(&self) -> String {
        let (number, unit): (fn(f64) -> String, _) = match self.unit {
            "s" => (units::seconds, ""),
            unit => (units::significant, unit),
        };
        let space = if unit.is_empty() { "" } else { " " };
        format!("{}{space}{unit}: {}", self.spread.text(number), self.what)
    }
}

/// What a benchmark found.
pub struct Report {
    bench: &'static str,
    device: String,
    columns: Vec<Column>,
    rows: Vec<Vec<Value>>,
    measured: Option<Figure>,
    limit: Option<Figure>,
    ratio: Option<(&'static str, Spread)>,
    lines: Vec<(&'static str, String)>,
    notes: Vec<String>,
    fields: Map<String, Value>,
    /// The curves, drawn where `--plot` asks for them.
    pub plot: Option<Plot>,
    /// Why it ends with an error all the same, such as a check that did not hold.
    pub failed: Option<String>,
}

impl Report {
    pub fn new(bench: &'static str, device: impl Into<String>, columns: &[Column]) -> Self {
        Self {
            bench,
            device: device.into(),
            columns: columns.to_vec(),
            rows: Vec::new(),
            measured: None,
            limit: None,
            ratio: None,
            lines: Vec::new(),
            notes: Vec::new(),
            fields: Map::new(),
            plot: None,
            failed: None,
        }
    }

    /// A row: a value for each column, null for none.
    pub fn row(&mut self, values: impl IntoIterator<Item = Value>) {
        let row: Vec<_> = values.into_iter().collect();
        assert_eq!(row.len(), self.columns.len(), "a value for each column");
        self.rows.push(row);
    }

    /// What was measured where no limit is known.
    pub fn measured(&mut self, measured: Figure) {
        self.measured = Some(measured);
    }

    /// What nothing can beat, where nothing stands beside it.
    pub fn limit(&mut self, limit: Figure) {
        self.limit = Some(limit);
    }

    /// What was measured beside its limit, and their ratio round by round. `of`: what is divided by what.
    pub fn compare(&mut self, measured: Figure, limit: Figure, of: &'static str, ratios: &[f64]) {
        (self.measured, self.limit, self.ratio) = (Some(measured), Some(limit), Some((of, Spread::of(ratios))));
    }

    /// A line of text below the table. Scripts get fields.
    pub fn line(&mut self, label: &'static str, text: impl Into<String>) {
        self.lines.push((label, text.into()));
    }

    /// Something that the reader should know about this run.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// A field of the JSON object that only this benchmark has.
    pub fn field(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.fields.insert(key.into(), value.into());
    }

    fn json(&self) -> Value {
        let row = |row: &Vec<Value>| -> Value {
            self.columns.iter().zip(row).map(|(column, value)| (column.key.to_owned(), value.clone())).collect()
        };
        let mut object = json!({
            "bench": self.bench,
            "device": self.device,
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "measured": self.measured.as_ref().map(Figure::json),
            "limit": self.limit.as_ref().map(Figure::json),
            "ratio": self.ratio.map(|(of, Spread { median, min, max, samples })| {
                json!({"of": of, "median": median, "min": min, "max": max, "samples": samples})
            }),
            "notes": self.notes,
        });
        object.as_object_mut().expect("it was made as one").extend(self.fields.clone());
        object
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.device)?;
        if !self.rows.is_empty() {
            writeln!(f)?;
            self.table(f)?;
        }
        let mut lines = self.lines.clone();
        lines.extend(self.measured.as_ref().map(|measured| ("measured", measured.text())));
        lines.extend(self.limit.as_ref().map(|limit| ("limit", limit.text())));
        if let Some((of, ratio)) = &self.ratio {
            lines.push(("ratio", format!("{}: {of}", ratio.text(|ratio| format!("{ratio:.3}")))));
        }
        lines.extend(self.notes.iter().map(|note| ("note", note.clone())));
        let width = lines.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
        if !lines.is_empty() {
            writeln!(f)?;
        }
        lines.iter().try_for_each(|(label, text)| writeln!(f, "{label:width$}  {text}"))
    }
}

impl Report {
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: Vec<Vec<String>> = (self.rows.iter())
            .map(|row| self.columns.iter().zip(row).map(|(column, value)| column.text(value)).collect())
            .collect();
        // A column in which nothing is shown is left out.
        let used: Vec<usize> =
            (0..self.columns.len()).filter(|&index| shown.iter().any(|row| !row[index].is_empty())).collect();
        let width = |index: usize| {
            let cells = shown.iter().map(|row| row[index].chars().count());
            cells.chain([self.columns[index].heading.chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut line = |cells: &dyn Fn(usize) -> String| {
            let padded = used.iter().map(|&index| match self.columns[index].left() {
                true => format!("{:1$}", cells(index), widths[index]),
                false => format!("{:>1$}", cells(index), widths[index]),
            });
            writeln!(f, "{}", padded.collect::<Vec<_>>().join("  ").trim_end())
        };
        line(&|index| self.columns[index].heading.to_owned())?;
        shown.iter().try_for_each(|row| line(&|index| row[index].clone()))?;
        let legends: Vec<_> =
            used.iter().map(|&index| self.columns[index]).filter(|column| !column.legend.is_empty()).collect();
        let width = legends.iter().map(|column| column.heading.chars().count()).max().unwrap_or(0);
        if !legends.is_empty() {
            writeln!(f)?;
        }
        legends.iter().try_for_each(|column| writeln!(f, "  {:width$}  {}", column.heading, column.legend))
    }
}

/// Runs a benchmark and prints what it found. A plot that cannot be written is refused before.
pub fn run(common: &Common, plot: Option<&PlotTo>, bench: impl FnOnce() -> Result<Report, Failure>) -> ExitCode {
    let outcome = || -> Result<Option<String>, Failure> {
        let unwritable = |path: &Path, error: io::Error| format!("--plot: cannot write {}: {error}", path.display());
        let place = |path: &PathBuf| NewFile::create(path).map_err(|error| unwritable(path, error));
        let file = plot.and_then(|to| to.plot.as_ref()).map(place).transpose()?;
        let report = bench()?;
        let text = if common.json { format!("{}\n", report.json()) } else { report.to_string() };
        match io::stdout().write_all(text.as_bytes()) {
            // Whoever reads it may have gone away.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error.into()),
            _ => {}
        }
        // After the figures, so that a disk that is full costs the picture alone.
        if let (Some(file), Some(plot)) = (file, &report.plot) {
            let (path, svg) = (file.path().to_owned(), plot.draw(&report.device)?);
            let written = file.file().write_all(svg.as_bytes()).and_then(|()| file.keep());
            written.map_err(|error| unwritable(&path, error))?;
        }
        Ok(report.failed)
    };
    let error = match outcome() {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(failed)) => failed,
        Err(error) => error.to_string(),
    };
    let _ = writeln!(io::stderr(), "error: {error}");
    ExitCode::FAILURE
}

/// A bar on stderr for a number of windows; none where the output is for a program.
pub fn progress(windows: u64, common: &Common) -> Result<ProgressBar, Failure> {
    let bar = if common.json { ProgressBar::hidden() } else { ProgressBar::new(windows) };
    bar.set_style(ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len} windows, {eta} left")?);
    Ok(bar)
}
