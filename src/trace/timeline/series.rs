//! What both kinds of trace file work out of a recording: spans that overlap laid side by side, slots in use, throughput.

use std::collections::HashMap;

use super::{Lane, RecordedSpan, Recording, Ring};
use crate::trace::{Activity, Stage};

/// When the last thing ended, in nanoseconds since the recording began.
pub(super) fn end(recording: &Recording) -> u64 {
    let spans = recording.lanes.iter().flat_map(|lane| &lane.events).map(|event| event.end.max(event.start));
    spans.chain(recording.moments.iter().map(|moment| moment.at)).max().unwrap_or(0)
}

/// The lane whose time counts for a stage: the device's own where there is one.
pub(super) fn measured_lane(recording: &Recording, stage: Stage) -> Option<usize> {
    let of_stage =
        |on_device: bool| recording.lanes.iter().position(|lane| lane.stage == stage && lane.on_device == on_device);
    of_stage(true).or_else(|| of_stage(false))
}

/// The stage that another one waits for when it is starved: the last before it that has a lane.
pub(super) fn stage_before(recording: &Recording, stage: Stage) -> Option<Stage> {
    recording.lanes.iter().map(|lane| lane.stage).filter(|&other| other < stage).max()
}

/// The spans in as few rows as it takes for none to overlap within a row, each row in the order of time.
pub(super) fn rows(events: &[RecordedSpan]) -> Vec<Vec<RecordedSpan>> {
    let mut ordered: Vec<RecordedSpan> =
        events.iter().map(|event| RecordedSpan { end: event.end.max(event.start), ..*event }).collect();
    ordered.sort_by_key(|event| (event.start, event.end));
    let mut rows: Vec<Vec<RecordedSpan>> = Vec::new();
    for event in ordered {
        match rows.iter_mut().find(|row| row.last().is_none_or(|last| last.end <= event.start)) {
            Some(row) => row.push(event),
            None => rows.push(vec![event]),
        }
    }
    rows
}

/// How many slots of a ring are in use from when on. A unit that is given up holds its slot until the pipeline goes back to
/// the first unit.
pub(super) fn slots_in_use(recording: &Recording, ring: &Ring) -> Vec<(u64, usize)> {
    let thread = recording.lanes.iter().find(|lane| lane.stage == ring.filled_by && !lane.on_device);
    let Some(filling) = thread.or_else(|| recording.lanes.iter().find(|lane| lane.stage == ring.filled_by)) else {
        return Vec::new();
    };
    let emptying = measured_lane(recording, ring.emptied_by).map(|lane| recording.lanes[lane].events.as_slice());
    let emptied: HashMap<(u64, usize), u64> =
        emptying.unwrap_or_default().iter().filter_map(|event| Some((of_pass(event)?, event.end))).collect();
    // What was begun before the emptying lane remembers anything was emptied before, too: those events have made way.
    let remembers = match (recording.dropped, recording.untimed) {
        (0, 0) => 0,
        _ => emptied.values().copied().min().unwrap_or(0),
    };
    let given_up: Vec<u64> = recording.moments.iter().filter(|m| gives_up(m.kind)).map(|m| m.at).collect();
    let until = end(recording);

    let mut changes: Vec<(u64, isize)> = Vec::new();
    for event in &filling.events {
        let Some((pass, unit)) = of_pass(event) else { continue };
        if event.bytes == 0 || passes_by(recording, ring, unit) {
            continue;
        }
        if event.start < remembers && !emptied.contains_key(&(pass, unit)) {
            continue;
        }
        let released = emptied.get(&(pass, unit)).copied().or_else(|| {
            let next = given_up.partition_point(|&at| at < event.start);
            given_up.get(next).copied()
        });
        changes.push((event.start, 1));
        changes.push((released.unwrap_or(until).max(event.start), -1));
    }
    // Where one is emptied as another is begun, it is the same slot.
    changes.sort_unstable();
    let mut steps: Vec<(u64, usize)> = Vec::new();
    let mut in_use = 0isize;
    for (at, change) in changes {
        in_use += change;
        let shown = (in_use.max(0) as usize).min(ring.slots);
        match steps.last_mut() {
            Some(last) if last.0 == at => last.1 = shown,
            _ => steps.push((at, shown)),
        }
    }
    steps.dedup_by_key(|step| step.1);
    steps
}

fn of_pass(event: &RecordedSpan) -> Option<(u64, usize)> {
    match event.activity {
        Activity::Unit { unit, pass } => Some((pass, unit)),
        Activity::Starved | Activity::Blocked => None,
    }
}

fn gives_up(kind: &str) -> bool {
    ["rewind", "cancelled", "failed"].contains(&kind)
}

/// Whether the unit is kept in memory of its own where others take one of the ring's slots.
fn passes_by(recording: &Recording, ring: &Ring, unit: usize) -> bool {
    let tier = recording.units.get(unit).map_or("", |unit| unit.tier.as_str());
    match ring.filled_by {
        Stage::Read => ["in RAM", "in pinned RAM"].contains(&tier),
        Stage::Pin => tier == "in pinned RAM",
        Stage::Transfer | Stage::Compute => tier == "on the device",
    }
}

/// GB/s in each of `bins` stretches of `width` nanoseconds. The bytes of a span are spread evenly over its time.
pub(super) fn throughput(lane: &Lane, width: u64, bins: usize) -> Vec<f64> {
    let mut bytes = vec![0.0; bins];
    let width = width.max(1);
    for event in lane.events.iter().filter(|event| event.bytes > 0) {
        let (start, end) = (event.start, event.end.max(event.start.saturating_add(1)));
        let rate = event.bytes as f64 / (end - start).max(1) as f64;
        for (bin, sum) in bytes.iter_mut().enumerate().skip((start / width) as usize) {
            let begins = (bin as u64).saturating_mul(width);
            if begins >= end {
                break;
            }
            *sum += rate * (end.min(begins.saturating_add(width)) - start.max(begins)) as f64;
        }
    }
    bytes.into_iter().map(|sum| sum / width as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::timeline::{Moment, RecordedUnit, example::example};

    fn unit(unit: usize, start: u64, end: u64) -> RecordedSpan {
        RecordedSpan { start, end, activity: Activity::Unit { unit, pass: 0 }, bytes: 1000 }
    }

    fn recording(reads: Vec<RecordedSpan>, copies: Vec<RecordedSpan>) -> (Recording, Ring) {
        let lane = |stage, events| Lane { stage, on_device: false, events };
        let units = vec![RecordedUnit { tier: "on disk".into(), ..RecordedUnit::default() }; 4];
        let ring = Ring { name: "slots".into(), slots: 3, filled_by: Stage::Read, emptied_by: Stage::Transfer };
        let lanes = vec![lane(Stage::Read, reads), lane(Stage::Transfer, copies)];
        (Recording { units, lanes, ..Recording::default() }, ring)
    }

    #[test]
    fn no_spans_of_a_row_overlap_and_none_is_lost() {
        for lane in &example().lanes {
            let rows = rows(&lane.events);
            assert_eq!(rows.iter().map(Vec::len).sum::<usize>(), lane.events.len());
            for pair in rows.iter().flat_map(|row| row.windows(2)) {
                assert!(pair[0].end <= pair[1].start, "{pair:?}");
            }
        }
        assert_eq!(rows(&[unit(0, 0, 9), unit(1, 3, 12), unit(2, 9, 10)]).len(), 2);
    }

    #[test]
    fn a_slot_is_in_use_from_the_first_byte_in_to_the_last_one_out() {
        let (recording, ring) =
            recording(vec![unit(0, 0, 9), unit(1, 3, 12), unit(2, 20, 25)], vec![unit(0, 9, 14), unit(1, 14, 20)]);
        // One is emptied at 20 as the next is begun; the last is never emptied, and holds its slot to the end.
        assert_eq!(slots_in_use(&recording, &ring), [(0, 1), (3, 2), (14, 1), (25, 0)]);
    }

    #[test]
    fn a_unit_that_is_given_up_returns_its_slot_when_the_pipeline_goes_back() {
        let (mut recording, ring) = recording(vec![unit(0, 0, 9), unit(1, 30, 40)], vec![unit(1, 40, 50)]);
        recording.moments.push(Moment { at: 12, kind: "rewind", text: String::new() });
        assert_eq!(slots_in_use(&recording, &ring), [(0, 1), (12, 0), (30, 1), (50, 0)]);
    }

    #[test]
    fn a_unit_that_is_kept_holds_no_slot_on_its_way_to_its_place() {
        let (mut recording, ring) = recording(vec![unit(0, 0, 9), unit(1, 10, 20)], vec![]);
        recording.units[0].tier = "in pinned RAM".into();
        assert_eq!(slots_in_use(&recording, &ring)[0], (10, 1));
    }

    #[test]
    fn throughput_is_spread_over_a_spans_time() {
        let (recording, _) = recording(vec![unit(0, 50, 250)], vec![]);
        assert_eq!(throughput(&recording.lanes[0], 100, 4), [2.5, 5.0, 2.5, 0.0]);
    }

    #[test]
    fn numbers_at_the_end_of_what_there_is_are_no_bugs() {
        let last = u64::MAX;
        let (mut recording, mut ring) = recording(vec![unit(0, 5, last), unit(1, last, last)], vec![]);
        ring.slots = usize::MAX;
        (recording.dropped, recording.untimed) = (last, last);
        assert_eq!(slots_in_use(&recording, &ring), [(5, 1), (last, 0)]);
        let width = last / 2000;
        let found = throughput(&recording.lanes[0], width, last.div_ceil(width) as usize);
        assert!(found.iter().all(|rate| rate.is_finite()) && found[1000] > 0.0);
    }
}
