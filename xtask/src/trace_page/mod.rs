//! Pages of the timeline, opened in Chromium.

mod page;

use std::{fs, path::Path, path::PathBuf};

use clap::Args;
use serde_json::{Value, json};

use crate::{
    browser::{Browser, Window},
    run::{self, Failure, Run},
};

/// Open pages of the timeline in headless Chromium, and check what a person would.
///
/// Lanes, verdict and zoom are there; wheel, keys, ruler and pointer do what they should; no request leaves the page. Without a
/// file it makes the pages of the tests' example, of one with hostile names, of an empty one and of one of 300,000 spans. A JSON
/// trace is read by Perfetto's `trace_processor`, where that is on the PATH.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask trace-page
  cargo xtask trace-page run.html --screenshot run.png --at 0.5-0.7 --dark")]
pub struct Options {
    /// Pages and JSON traces, as `generate --trace` writes them
    #[arg(value_parser = run::absolute)]
    files: Vec<PathBuf>,
    /// Write a picture of the first page
    #[arg(long, value_name = "FILE.png", value_parser = run::absolute)]
    screenshot: Option<PathBuf>,
    /// The seconds that the picture shows
    #[arg(long, value_name = "FROM-TO", requires = "screenshot")]
    at: Option<String>,
    #[arg(long)]
    dark: bool,
    /// The window's size
    #[arg(long, value_name = "WIDTHxHEIGHT", default_value = "1400x1000", value_parser = size)]
    size: (u32, u32),
    /// Dots of the picture per pixel of the page
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
}

fn size(text: &str) -> Result<(u32, u32), String> {
    let sides = text.split_once('x').and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)));
    sides.ok_or_else(|| "a size is two numbers, as in 1400x1000".to_owned())
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let work = run::scratch("page")?;
    let files = if options.files.is_empty() { examples(work.path())? } else { options.files.clone() };
    let (pages, traces) =
        files.into_iter().partition::<Vec<_>, _>(|file| file.extension().is_some_and(|it| it == "html"));
    if let Some(first) = pages.first() {
        let (width, height) = options.size;
        let window = Window { width, height, scale: options.scale, dark: options.dark };
        let mut browser = Browser::start(work.path(), &window)?;
        for page in &pages {
            page::check_page(&mut browser, page).map_err(|failure| format!("{}: {failure}", page.display()))?;
        }
        if let Some(file) = &options.screenshot {
            let range = options.at.as_ref().map_or(String::new(), |at| format!("#t={at}"));
            page::open(&mut browser, &(page::address(first)? + &range))?;
            let picture = browser.call("Page.captureScreenshot", json!({"format": "png"}))?;
            let picture = base64::decode(picture["data"].as_str().ok_or("Chromium sends no picture")?)?;
            fs::write(file, &picture)?;
            println!("{}: {} bytes", file.display(), picture.len());
        }
    }
    let processor = ["trace_processor_shell", "trace_processor"].into_iter().find(|name| run::is_there(name));
    match processor {
        Some(processor) => traces.iter().try_for_each(|trace| check_trace(processor, work.path(), trace)),
        None if traces.is_empty() => Ok(()),
        None => {
            println!("left out: there is no trace_processor here; the unit tests read the JSON by the format's rules");
            Ok(())
        }
    }
}

/// The traces that the unit tests can write, as pages and as JSON.
fn examples(work: &Path) -> Result<Vec<PathBuf>, Failure> {
    let mut make = run::cargo("test -q --features capi --lib trace::timeline::example -- --ignored");
    make.env("TRACE_EXAMPLES", work).quiet()?;
    let names = ["example", "hostile", "empty", "large"];
    let files = names.iter().flat_map(|name| ["html", "json"].map(|kind| work.join(format!("{name}.{kind}"))));
    let files = files.collect::<Vec<_>>();
    match files.iter().find(|file| !file.exists()) {
        Some(file) => Err(format!("the unit tests have not written {}", file.display()).into()),
        None => Ok(files),
    }
}

/// Perfetto finds as many spans as the file has.
fn check_trace(processor: &str, work: &Path, trace: &Path) -> Result<(), Failure> {
    let recorded: Value = serde_json::from_str(&fs::read_to_string(trace)?)?;
    let events = recorded["traceEvents"].as_array().ok_or_else(|| format!("{} has no traceEvents", trace.display()))?;
    let spans = events.iter().filter(|event| event["ph"] == "X").count().to_string();
    let query = work.join("query.sql");
    fs::write(&query, "select count(*) as spans from slice where dur >= 0 and category != 'mark';\n")?;
    let said = run::command(processor, &["-q"]).args([&query, trace]).read()?;
    match said.split_whitespace().any(|word| word == spans) {
        true => Ok(()),
        false => Err(format!("{}: Perfetto does not read {spans} spans: {said}", trace.display()).into()),
    }
}
