//! A recording as one HTML page that shows it: no server, no network, no library.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter};

use super::{Lane, Moment, RecordedSpan, RecordedUnit, Recording, Ring, series};
use crate::trace::Activity;

const PAGE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
/// In this order: each uses those before it.
const SCRIPTS: [&str; 4] = [
    include_str!("page/data.js"),
    include_str!("page/words.js"),
    include_str!("page/draw.js"),
    include_str!("page/page.js"),
];

/// Writes the page.
pub(super) fn write(mut out: impl Write, recording: &Recording) -> io::Result<()> {
    // A line of the page that is nothing but the name of a part is where that part goes.
    for line in PAGE.lines() {
        match line {
            "{style}" => out.write_all(STYLE.as_bytes())?,
            "{recording}" => embed(&mut out, recording)?,
            "{scripts}" => SCRIPTS.iter().try_for_each(|script| out.write_all(script.as_bytes()))?,
            _ => out.write_all(line.as_bytes())?,
        }
        out.write_all(b"\n")?;
    }
    Ok(())
}

/// What the scripts get.
#[derive(Serialize)]
struct Data<'a> {
    facts: &'a [(String, String)],
    units: Vec<PageUnit<'a>>,
    /// Nanoseconds from the recording's begin to its end.
    end: u64,
    lanes: Vec<Rows>,
    moments: Vec<Happened<'a>>,
    rings: Vec<Slots<'a>>,
    links: Vec<Carries<'a>>,
    verdict: &'a [String],
    dropped: u64,
    untimed: u64,
}

#[derive(Serialize)]
struct PageUnit<'a> {
    name: &'a str,
    bytes: usize,
    tier: &'a str,
}

/// A lane; the spans of a row do not overlap, and are in the order of time.
#[derive(Serialize)]
struct Rows {
    stage: &'static str,
    device: bool,
    /// What the stage waits for when it is starved.
    before: Option<&'static str>,
    rows: Vec<Columns>,
}

/// The spans of a row, field by field, which is half the size of one object for each.
#[derive(Default, Serialize)]
struct Columns {
    /// Since the span before began.
    start: Vec<u64>,
    length: Vec<u64>,
    /// Or −1: starved, −2: blocked.
    unit: Vec<i64>,
    pass: Vec<u64>,
    bytes: Vec<u64>,
}

#[derive(Serialize)]
struct Happened<'a> {
    at: u64,
    kind: &'a str,
    text: &'a str,
}

#[derive(Serialize)]
struct Slots<'a> {
    name: &'a str,
    slots: usize,
    filled_by: &'static str,
    /// From when on, and how many.
    steps: Vec<(u64, usize)>,
}

#[derive(Serialize)]
struct Carries<'a> {
    name: &'a str,
    /// Bytes a second, if it was measured.
    limit: Option<f64>,
    stage: &'static str,
    /// The number of the lane whose spans move the bytes.
    lane: Option<usize>,
}

impl<'a> Data<'a> {
    fn of(recording: &'a Recording) -> Self {
        let unit = |unit: &'a RecordedUnit| PageUnit { name: &unit.name, bytes: unit.bytes, tier: &unit.tier };
        let moment = |moment: &'a Moment| Happened { at: moment.at, kind: moment.kind, text: &moment.text };
        let ring = |ring: &'a Ring| Slots {
            name: &ring.name,
            slots: ring.slots,
            filled_by: ring.filled_by.name(),
            steps: series::slots_in_use(recording, ring),
        };
        let link = |link: &'a super::Link| Carries {
            name: &link.name,
            limit: link.limit,
            stage: link.stage.name(),
            lane: series::measured_lane(recording, link.stage),
        };
        Self {
            facts: &recording.facts,
            units: recording.units.iter().map(unit).collect(),
            end: series::end(recording),
            lanes: recording.lanes.iter().map(|lane| Rows::of(recording, lane)).collect(),
            moments: recording.moments.iter().map(moment).collect(),
            rings: recording.rings.iter().map(ring).collect(),
            links: recording.links.iter().map(link).collect(),
            verdict: &recording.verdict,
            dropped: recording.dropped,
            untimed: recording.untimed,
        }
    }
}

impl Rows {
    fn of(recording: &Recording, lane: &Lane) -> Self {
        Self {
            stage: lane.stage.name(),
            device: lane.on_device,
            before: series::stage_before(recording, lane.stage).map(|stage| stage.name()),
            rows: series::rows(&lane.events).iter().map(|row| Columns::of(row)).collect(),
        }
    }
}

impl Columns {
    fn of(row: &[RecordedSpan]) -> Self {
        let mut columns = Self::default();
        let mut before = 0;
        for event in row {
            let (unit, pass) = match event.activity {
                Activity::Unit { unit, pass } => (unit as i64, pass),
                Activity::Starved => (-1, 0),
                Activity::Blocked => (-2, 0),
            };
            columns.start.push(event.start - before);
            columns.length.push(event.end - event.start);
            columns.unit.push(unit);
            columns.pass.push(pass);
            columns.bytes.push(event.bytes);
            before = event.start;
        }
        columns
    }
}

/// Writes the data as JSON that stands in a script element: no text of it can end that element, or begin a comment.
fn embed(out: impl Write, recording: &Recording) -> io::Result<()> {
    let mut json = serde_json::Serializer::with_formatter(out, InScript(CompactFormatter));
    Ok(Data::of(recording).serialize(&mut json)?)
}

/// Writes `<` as an escape. In JSON it only stands in strings.
struct InScript(CompactFormatter);

impl Formatter for InScript {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        for (number, part) in fragment.split('<').enumerate() {
            if number > 0 {
                writer.write_all(b"\\u003c")?;
            }
            self.0.write_string_fragment(writer, part)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::trace::timeline::example;

    fn page(recording: &Recording) -> String {
        let mut text = Vec::new();
        write(&mut text, recording).unwrap();
        String::from_utf8(text).unwrap()
    }

    fn embedded(page: &str) -> Value {
        let begin = r#"<script type="application/json" id="recording">"#;
        let text = page.split(begin).nth(1).unwrap().split("</script>").next().unwrap();
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_page_holds_every_span() {
        let recording = example::example();
        let data = embedded(&page(&recording));
        for (lane, found) in recording.lanes.iter().zip(data["lanes"].as_array().unwrap()) {
            assert_eq!((&found["stage"], &found["device"]), (&lane.stage.name().into(), &lane.on_device.into()));
            let mut spans = Vec::new();
            for row in found["rows"].as_array().unwrap() {
                let column = |name: &str| -> Vec<i64> { serde_json::from_value(row[name].clone()).unwrap() };
                let mut start = 0;
                let [starts, lengths, units, passes, bytes] = ["start", "length", "unit", "pass", "bytes"].map(column);
                for index in 0..starts.len() {
                    start += starts[index];
                    let activity = match units[index] {
                        -1 => Activity::Starved,
                        -2 => Activity::Blocked,
                        unit => Activity::Unit { unit: unit as usize, pass: passes[index] as u64 },
                    };
                    let (start, end) = (start as u64, (start + lengths[index]) as u64);
                    spans.push(RecordedSpan { start, end, activity, bytes: bytes[index] as u64 });
                }
            }
            spans.sort_by_key(|event| (event.end, event.start));
            let mut wanted = lane.events.clone();
            wanted.sort_by_key(|event| (event.end, event.start));
            assert_eq!(spans, wanted);
        }
        assert_eq!(data["end"], series::end(&recording));
        assert_eq!(data["facts"][0][1], example::MODEL);
        assert_eq!(data["links"][1]["lane"], 2);
    }

    #[test]
    fn no_text_of_the_recording_ends_the_script_or_begins_a_comment() {
        let (page, plain) = (page(&example::hostile()), page(&Recording::default()));
        for token in ["<script", "</script", "<!--", "<"] {
            assert_eq!(page.matches(token).count(), plain.matches(token).count(), "{token}");
        }
        let data = embedded(&page);
        for text in [&data["units"][0]["name"], &data["moments"][0]["text"], &data["rings"][0]["name"]] {
            assert_eq!(text, example::HOSTILE);
        }
    }

    #[test]
    fn the_page_names_no_other_place_and_may_not_ask_one() {
        let page = page(&example::example());
        for token in ["http:", "https:", "//www", "@import", "url(", "src=", "href=", "fetch(", "XMLHttpRequest"] {
            assert!(!page.contains(token), "{token}");
        }
        let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:";
        assert!(page.contains(policy));
        for part in ["{style}", "{recording}", "{scripts}"] {
            assert!(!page.contains(part), "{part}");
        }
    }

    #[test]
    fn a_large_recording_is_written_in_seconds() {
        let recording = example::large(300_000);
        let began = support::processor_time();
        let length = page(&recording).len();
        assert!(length < 300_000 * 60, "{length} bytes");
        let took = support::processor_time() - began;
        assert!(took.as_secs() < 30, "{took:?}");
    }
}
