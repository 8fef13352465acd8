//! A file's lines are looked through before anything is loaded: how many there are, how long they are, and whether they are the
//! ones that were answered.

use std::io::BufRead;

use super::{input::Lines, known::Known, line::Line, prepare::Preparing};
use crate::Failure;

/// What a file holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    pub prompts: u64,
    /// Tokens that a sequence has at most, its answer included.
    pub context: usize,
    /// The most bytes that a line takes while it is read.
    pub reading: usize,
}

/// Looks through all lines. `known`: what is answered.
///
/// # Errors
/// The reader's; where the input is not the one that was answered; where `strict`, the first line that is not understood.
pub fn scan<R: BufRead>(
    mut lines: Lines<R>,
    mut known: Known,
    preparing: &Preparing,
    strict: bool,
) -> Result<Scan, Failure> {
    let (mut scan, around) = (Scan::default(), preparing.around());
    while let Some(line) = lines.next().map_err(|error| format!("cannot read it: {error}"))? {
        scan.prompts += 1;
        known.has(line.number, line.digest)?;
        let cost = preparing.cost(line.bytes.as_deref());
        scan.reading = scan.reading.max(preparing.taken(cost));
        let Line { ask, .. } = preparing.parse(line.bytes.as_deref(), cost);
        let needed = ask.and_then(|ask| {
            // To count tokens takes time. None has less than a byte, so a line may be too short to be the longest.
            let bytes = line.bytes.as_ref().map_or(0, Vec::len);
            let bound = bytes.saturating_add(around).saturating_add(ask.most().unwrap_or(preparing.most));
            if bound <= scan.context && !strict {
                return Ok(0);
            }
            preparing.job(line.number, ask, cost).map(|job| job.request.prompt.len().saturating_add(job.request.most))
        });
        match needed {
            Ok(needed) => scan.context = scan.context.max(needed),
            Err(why) if strict => return Err(format!("line {}: {}", line.number, why.message()).into()),
            Err(_) => {}
        }
    }
    known.end()?;
    scan.context = scan.context.clamp(1, preparing.max_positions);
    Ok(scan)
}
