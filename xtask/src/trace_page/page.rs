//! What a person would check of a page.

use std::path::Path;

use serde_json::{Value, json};

use crate::{browser::Browser, run::Failure};

const PROBES: &str = include_str!("probes.js");
const WHOLE_RUN: &str = "probes.rangeText().includes('the whole run')";

fn check(so: bool, what: &str) -> Result<(), Failure> {
    if so { Ok(()) } else { Err(format!("FAILED: {what}").into()) }
}

/// The address of a file.
pub fn address(path: &Path) -> Result<String, Failure> {
    let path = std::path::absolute(path)?;
    let text = path.to_str().ok_or_else(|| format!("{} is not UTF-8", path.display()))?;
    // What a path may have and an address may not.
    let escaped = text.replace('%', "%25").replace('#', "%23").replace('?', "%3F").replace(' ', "%20");
    Ok(format!("file://{escaped}"))
}

/// Opens a page, with the probes, and waits until it is drawn.
pub fn open(browser: &mut Browser, address: &str) -> Result<(), Failure> {
    browser.open(address, "document.documentElement?.dataset.ready !== undefined")?;
    browser.value(&format!("{PROBES}; null")).map(drop)
}

/// Lanes, verdict, charts and zoom are there, and no request leaves the page.
pub fn check_page(browser: &mut Browser, path: &Path) -> Result<(), Failure> {
    let address = address(path)?;
    browser.events.clear();
    open(browser, &address)?;
    let carried = browser.value("JSON.parse(document.getElementById('recording').textContent)")?;
    let lanes = carried["lanes"].as_array().ok_or("the recording has no lanes")?.clone();
    let whole = carried["end"].as_f64().ok_or("the recording has no end")?.max(1.0) / 1e9;
    contents(browser, &carried, &lanes)?;
    let paint = browser.value("probes.paintMilliseconds()")?.as_f64().unwrap_or(f64::NAN);

    // A range in the address.
    let (begin, end) = (whole * 0.25, whole * 0.5);
    open(browser, &format!("{address}#t={begin:.9}-{end:.9}"))?;
    let opened = range(browser)?;
    let same = |one: f64, other: f64| (one - other).abs() < 1e-6 * whole + 1e-8;
    let opens = same(opened.0, begin) && same(opened.1, end) || whole < 1e-6;
    check(opens, &format!("the page opens the range in its address: {opened:?}"))?;
    if !lanes.is_empty() {
        check(browser.value(WHOLE_RUN)? == false, "the range is in the text")?;
        let table = browser.value("document.getElementById('stages-range').textContent.includes('from')")?;
        check(table == true, "the table is of the range")?;
        use_page(browser, whole)?;
    }
    let errors = browser.errors();
    check(errors.is_empty(), &format!("no error and no warning: {errors:?}"))?;
    let others =
        browser.requests().into_iter().filter(|url| url.split('#').next() != Some(&address)).collect::<Vec<_>>();
    check(others.is_empty(), &format!("no request leaves the page: {others:?}"))?;
    // The policy is in force: what a script asks of another place is refused before it is sent.
    let refused = browser.value("probes.refusedConnection()")?;
    check(refused == "connect-src", &format!("the policy refuses connections, not {refused}"))?;

    let rows = lanes.iter().flat_map(|lane| lane["rows"].as_array().into_iter().flatten());
    let spans: usize = rows.map(|row| row["start"].as_array().map_or(0, Vec::len)).sum();
    let (name, lanes) = (path.file_name().unwrap_or_default().display(), lanes.len());
    println!("{name}: {lanes} lanes, {spans} spans, painted in {paint:.0} ms; no request but for the page itself");
    Ok(())
}

/// All that the recording has is on the page.
fn contents(browser: &mut Browser, carried: &Value, lanes: &[Value]) -> Result<(), Failure> {
    let found =
        browser.value("[...document.querySelectorAll('[data-track=lane]')].map((lane) => lane.dataset.stage)")?;
    let stages = lanes.iter().map(|lane| lane["stage"].clone()).collect::<Value>();
    check(found == stages, &format!("there is a lane for each of {}: {found}", lanes.len()))?;
    let verdict = browser.value("probes.texts('#verdict p')")?;
    check(verdict == carried["verdict"], &format!("the verdict is there: {verdict}"))?;
    for (kind, wanted) in [("link", &carried["links"]), ("ring", &carried["rings"])] {
        let names = browser.value(&format!("probes.texts('[data-track={kind}] b')"))?;
        let wanted = wanted.as_array().into_iter().flatten().map(|one| one["name"].clone()).collect::<Value>();
        check(names == wanted, &format!("there is a chart for each {kind}: {names}"))?;
    }
    let lost = browser.value("probes.lost()")?;
    let lost = lost.as_str().unwrap_or_default();
    for name in ["dropped", "untimed"] {
        let count = carried[name].as_u64().ok_or_else(|| format!("the recording has no {name}"))?;
        check(count == 0 || lost.contains(&with_commas(count)), &format!("what was lost is said: {lost}"))?;
    }
    let painted = browser.value("probes.painted()")?;
    let has_rows = |lane: &Value| json!(lane["rows"].as_array().is_some_and(|rows| !rows.is_empty()));
    check(painted == lanes.iter().map(has_rows).collect::<Value>(), &format!("every lane is painted: {painted}"))?;
    let fits = browser.value("document.documentElement.scrollWidth <= innerWidth")?;
    check(fits == true, "the page is no wider than the window")
}

/// Wheel, keys, ruler and pointer.
fn use_page(browser: &mut Browser, whole: f64) -> Result<(), Failure> {
    let near = |one: f64, other: f64| (one - other).abs() < 2e-3 * whole;
    let zoomed = format!("!{WHOLE_RUN}");
    browser.key("0")?;
    browser.wait(WHOLE_RUN, "key 0 shows the whole run")?;
    check(near(range(browser)?.1, whole), "the whole run is in view")?;
    browser.wait("location.hash === ''", "the address of the whole run has no range")?;

    let lane = place(browser, "[data-track=lane] canvas")?;
    browser.mouse("mouseWheel", lane.centre, json!({"deltaX": 0, "deltaY": -300}))?;
    browser.wait(&zoomed, "the wheel zooms")?;
    browser.wait("location.hash.startsWith('#t=')", "the address keeps the range")?;
    let (begin, end) = range(browser)?;
    check(near(f64::midpoint(begin, end), whole / 2.0), "what is under the pointer stays there")?;
    let (x, y) = lane.centre;
    let left_of = begin - (end - begin) / 20.0;
    browser.drag((x, y), (x + lane.width / 10.0, y))?;
    browser.wait(&format!("probes.range()[0] < {left_of}"), "a lane that is dragged moves")?;
    browser.key("ArrowRight")?;
    browser.wait(&format!("probes.range()[0] > {left_of}"), "an arrow key moves")?;
    browser.key("0")?;
    browser.wait(WHOLE_RUN, "key 0 shows the whole run")?;

    let (_, y) = place(browser, "[data-track=ruler] canvas")?.centre;
    browser.drag((lane.left + lane.width / 4.0, y), (lane.left + lane.width / 2.0, y))?;
    browser.wait(&zoomed, "a drag along the ruler zooms")?;
    let (begin, end) = range(browser)?;
    let dragged = near(begin, whole / 4.0) && near(end, whole / 2.0);
    check(dragged, &format!("to what was dragged over: {begin} to {end}"))?;

    let unit = browser.value("probes.showLongestUnit()")?;
    browser.wait(&format!("Math.abs(probes.range()[0] - {}) < 1e-6", unit[0]), "a unit can be shown")?;
    browser.mouse("mouseMoved", (x, lane.top + 16.0), json!({}))?;
    browser.wait("!document.getElementById('tip').hidden", "the pointer is told what is under it")?;
    let tip = browser.value("document.querySelector('#tip b').textContent")?;
    check(tip == unit[2], &format!("it is the unit: {tip}"))?;
    browser.value("document.querySelector('#zoom [data-key=\"0\"]').click()")?;
    browser.wait(WHOLE_RUN, "the button shows the whole run")
}

/// Where something is on the page.
struct Place {
    left: f64,
    top: f64,
    width: f64,
    centre: (f64, f64),
}

fn place(browser: &mut Browser, selector: &str) -> Result<Place, Failure> {
    let [left, top, width, height] = numbers(&browser.value(&format!("probes.box({})", json!(selector)))?)?;
    Ok(Place { left, top, width, centre: (left + width / 2.0, top + height / 2.0) })
}

/// What is in view, in seconds.
fn range(browser: &mut Browser) -> Result<(f64, f64), Failure> {
    let [from, to] = numbers(&browser.value("probes.range()")?)?;
    Ok((from, to))
}

fn numbers<const N: usize>(value: &Value) -> Result<[f64; N], Failure> {
    let found = value.as_array().into_iter().flatten().filter_map(Value::as_f64).collect::<Vec<_>>();
    found.try_into().map_err(|_| format!("{value} is not {N} numbers").into())
}

/// As the page writes counts: 12,345.
fn with_commas(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_written_as_on_the_page() {
        assert_eq!([0, 999, 1000, 1_234_567].map(with_commas), ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn a_path_becomes_an_address() {
        assert_eq!(address(Path::new("/a b/50%#1.html")).unwrap(), "file:///a%20b/50%25%231.html");
    }
}
