//! The times as a picture: the fastest candidates as bars, and below, for each setting that varied, every candidate
//! as a dot over its value, or a triangle where it was stopped, and the best of each value as a line.

use layer_streamer::{
    Settings,
    tuner::{Outcome, Ranking, Trial},
};
use plotters::{
    element::DashedPathElement,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::show::{short, time};
use crate::Failure;

const WIDTH: u32 = 1000;
const MARGIN: i32 = 24;
const ROW: i32 = 26;
const LABELS: i32 = 190;
const PANEL: u32 = 300;

/// How many bars there are at most.
const BARS: usize = 12;

const BEST: RGBColor = RGBColor(0x1a, 0x7f, 0x4b);
const OTHER: RGBColor = RGBColor(0x8f, 0xa8, 0xc8);
const FAINT: RGBColor = RGBColor(0xb0, 0xb0, 0xb0);
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);

/// A setting's name, and where its value is.
type Setting = (&'static str, fn(&Settings) -> usize);

const SETTINGS: [Setting; 6] = [
    ("n_gpu", |settings| settings.n_gpu),
    ("n_cpu_pinned", |settings| settings.n_cpu_pinned),
    ("n_cpu", |settings| settings.n_cpu),
    ("batch_gpu", |settings| settings.batch_gpu),
    ("batch_cpu_pinned", |settings| settings.batch_cpu_pinned),
    ("batch_cpu", |settings| settings.batch_cpu),
];

/// The SVG.
pub fn draw(title: &str, ranking: &Ranking) -> Result<String, Failure> {
    let timed: Vec<_> = ranking.trials.iter().filter_map(|trial| Some((trial, trial.seconds()?))).collect();
    let points: Vec<_> = ranking.trials.iter().filter_map(Point::of).collect();
    let panels: Vec<_> = SETTINGS.into_iter().filter(|(_, value)| values(&points, *value).len() > 1).collect();
    let bars = timed.len().min(BARS);
    let top = 2 * MARGIN + 30;
    let rows = panels.len().div_ceil(3) as u32;
    let height = (top + bars as i32 * ROW + 2 * MARGIN) as u32 + rows * PANEL;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let say = |text: &str, at: (i32, i32), size: i32, color: &RGBColor, side: HPos| {
            let style = ("sans-serif", size).into_font().color(color).pos(Pos::new(side, VPos::Center));
            root.draw_text(text, &style, at)
        };
        say(&format!("Time a token: {title}"), (MARGIN, MARGIN), 22, &INK, HPos::Left)?;
        let count = |is: fn(&Outcome) -> bool| ranking.trials.iter().filter(|trial| is(&trial.outcome)).count();
        let stopped = count(|outcome| matches!(outcome, Outcome::Stopped { .. }));
        let refused = count(|outcome| matches!(outcome, Outcome::Refused { .. }));
        let about = format!(
            "{} of {} candidates measured, {stopped} stopped as clearly slower, {refused} refused.{}",
            timed.len(),
            ranking.candidates,
            if bars > 0 { format!(" The fastest {bars}, by n_gpu / n_cpu_pinned / n_cpu:") } else { String::new() }
        );
        say(&about, (MARGIN, MARGIN + 26), 15, &INK, HPos::Left)?;

        let longest = timed.iter().take(bars).flat_map(|(trial, _)| trial.measured()).copied().fold(0.0, f64::max);
        let across = f64::from(WIDTH as i32 - 2 * MARGIN - LABELS - 90) / longest.max(1e-12);
        for (row, (trial, seconds)) in timed.iter().take(bars).enumerate() {
            let (left, y) = (MARGIN + LABELS, top + row as i32 * ROW + ROW / 2);
            let color = if row == 0 { BEST } else { OTHER };
            let x = |seconds: f64| left + (seconds * across) as i32;
            say(&short(&trial.placement), (left - 10, y), 16, if row == 0 { &BEST } else { &INK }, HPos::Right)?;
            root.draw(&Rectangle::new([(left, y - 9), (x(*seconds), y + 9)], color.filled()))?;
            let [least, most] = trial.extremes().unwrap_or_default();
            root.draw(&PathElement::new([(x(least), y), (x(most), y)], INK.stroke_width(1)))?;
            let label =
                if row == 0 { time(*seconds) } else { format!("+{:.0} %", 100.0 * (seconds / timed[0].1 - 1.0)) };
            say(&label, (x(most.max(*seconds)) + 8, y), 15, if row == 0 { &BEST } else { &INK }, HPos::Left)?;
        }

        let below = top + bars as i32 * ROW + MARGIN;
        if rows > 0 {
            let key = "Setting by setting: a dot is a candidate, a triangle one that was stopped at that time and takes \
                       longer; the line joins the best of each value.";
            say(key, (MARGIN, below), 15, &INK, HPos::Left)?;
        }
        let area = root.margin(below + MARGIN / 2, 0, MARGIN / 2, MARGIN / 2);
        let areas = area.split_evenly((rows.max(1) as usize, panels.len().clamp(1, 3)));
        let highest = points.iter().map(|point| point.seconds).fold(0.0, f64::max) * 1.08;
        for ((name, value), area) in panels.iter().zip(&areas) {
            panel(area, name, *value, &points, highest)?;
        }
        root.present()?;
    }
    Ok(svg)
}

/// A candidate in the panels, fastest first.
struct Point<'a> {
    settings: &'a Settings,
    seconds: f64,
    /// It takes longer than that.
    stopped: bool,
}

impl<'a> Point<'a> {
    fn of(trial: &'a Trial) -> Option<Self> {
        let (seconds, stopped) = match trial.outcome {
            Outcome::Done => (trial.seconds()?, false),
            Outcome::Stopped { limit } => (limit, true),
            Outcome::Refused { .. } => return None,
        };
        Some(Self { settings: &trial.placement.settings, seconds, stopped })
    }
}

/// The values that a setting had, in order.
fn values(points: &[Point<'_>], value: fn(&Settings) -> usize) -> Vec<usize> {
    let mut found: Vec<_> = points.iter().map(|point| value(point.settings)).collect();
    found.sort_unstable();
    found.dedup();
    found
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Time over the values of one setting.
fn panel(
    area: &Area<'_>,
    name: &str,
    value: fn(&Settings) -> usize,
    points: &[Point<'_>],
    highest: f64,
) -> Result<(), Failure> {
    let values = values(points, value);
    let place = |of: usize| values.iter().position(|value| *value == of).unwrap_or(0) as f64;
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .caption(name, ("sans-serif", 18).into_font().color(&INK))
        .x_label_area_size(26)
        .y_label_area_size(62)
        .build_cartesian_2d(-0.5..values.len() as f64 - 0.5, 0.0..highest)?;
    let label = |at: &f64| match values.get(at.round() as usize) {
        Some(value) if (at - at.round()).abs() < 0.01 && *at > -0.01 => value.to_string(),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(2 * values.len() + 1)
        .x_label_formatter(&label)
        .y_labels(5)
        .y_label_formatter(&|seconds| if *seconds > 0.0 { time(*seconds) } else { "0".into() })
        .label_style(("sans-serif", 14))
        .axis_style(FAINT)
        .draw()?;
    let mut best = vec![f64::INFINITY; values.len()];
    for Point { settings, seconds, stopped } in points {
        let at = place(value(settings));
        if *stopped {
            chart.draw_series([TriangleMarker::new((at, *seconds), 4, FAINT.filled())])?;
        } else {
            best[at as usize] = best[at as usize].min(*seconds);
            chart.draw_series([Circle::new((at, *seconds), 3, OTHER.mix(0.7).filled())])?;
        }
    }
    // A value with which all were stopped has no best.
    let line = best.iter().enumerate().map(|(at, seconds)| (at as f64, *seconds)).filter(|(_, best)| best.is_finite());
    chart.draw_series(LineSeries::new(line, BEST.stroke_width(2)))?;
    if let Some(fastest) = points.first().filter(|point| !point.stopped) {
        chart.draw_series([Circle::new((place(value(fastest.settings)), fastest.seconds), 6, BEST.filled())])?;
        let all = [(-0.5, fastest.seconds), (values.len() as f64 - 0.5, fastest.seconds)];
        chart.draw_series([DashedPathElement::new(all, 4, 4, BEST.mix(0.6))])?;
    }
    Ok(())
}
