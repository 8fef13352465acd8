//! Curves as a picture: one panel or several side by side, a line for each series with its name at its end, the range of each
//! point as a bar, and the limit as a dashed line.

use std::ops::Range;

use plotters::{
    coord::{
        Shift,
        ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter},
    },
    element::DashedPathElement,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{Failure, Spread, units};

const PANEL: (u32, u32) = (760, 460);
const HEAD: i32 = 64;
const MARGIN: i32 = 28;
/// Room for a character of the names at the ends of lines.
const NAME_CHARACTER: i32 = 8;
/// Least distance between two names.
const NAME: i32 = 18;

const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const SOFT: RGBColor = RGBColor(0x70, 0x70, 0x70);
const GRID: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);

/// Told apart also by those who see fewer colours (Okabe and Ito's, without yellow).
const COLORS: [RGBColor; 6] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0xa0, 0x70, 0x00),
];

/// A series.
pub struct Line {
    pub name: String,
    /// Over x.
    pub points: Vec<(f64, Spread)>,
}

/// A pair of axes.
pub struct Panel {
    pub x: &'static str,
    pub y: &'static str,
    /// How a value of x is written.
    pub format: fn(f64) -> String,
    pub lines: Vec<Line>,
    /// Its name, and where it lies.
    pub limit: Option<(String, f64)>,
}

pub struct Plot {
    pub title: String,
    pub panels: Vec<Panel>,
}

impl Plot {
    /// The SVG. `about` goes below the title.
    pub fn draw(&self, about: &str) -> Result<String, Failure> {
        let mut svg = String::new();
        {
            let size = (PANEL.0 * self.panels.len().max(1) as u32, PANEL.1 + HEAD as u32);
            let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
            root.fill(&WHITE)?;
            let text = |size: i32, color: &RGBColor| ("sans-serif", size).into_font().color(color);
            root.draw_text(&self.title, &text(22, &INK), (MARGIN, 18))?;
            root.draw_text(about, &text(14, &SOFT), (MARGIN, 46))?;
            let (_, below) = root.split_vertically(HEAD);
            for (panel, area) in self.panels.iter().zip(below.split_evenly((1, self.panels.len().max(1)))) {
                panel.draw(&area)?;
            }
            root.present()?;
        }
        Ok(svg)
    }
}

impl Panel {
    /// The values of x, in order.
    fn values(&self) -> Vec<f64> {
        let mut values: Vec<_> = self.lines.iter().flat_map(|line| &line.points).map(|(x, _)| *x).collect();
        values.sort_unstable_by(f64::total_cmp);
        values.dedup();
        values
    }

    fn draw(&self, area: &DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), Failure> {
        let values = self.values();
        if values.is_empty() {
            return Ok(());
        }
        let axis = Axis::new(values, self.format);
        let (left, right) = (axis.range().start, axis.range().end);
        let tops = self.lines.iter().flat_map(|line| &line.points).map(|(_, y)| y.max);
        let highest = tops.chain(self.limit.as_ref().map(|limit| limit.1)).fold(0.0, f64::max).max(1e-9) * 1.06;
        // Enough to tell five labels apart.
        let digits = (-(highest / 5.0).log10().floor()).clamp(0.0, 9.0) as usize;
        let names = self.lines.iter().map(|line| &line.name).chain(self.limit.as_ref().map(|limit| &limit.0));
        let longest = names.map(|name| name.chars().count()).max().unwrap_or(0) as i32;
        let mut chart = ChartBuilder::on(area)
            .margin(MARGIN)
            .margin_top(6)
            .margin_right(24 + NAME_CHARACTER * longest)
            .x_label_area_size(46)
            .y_label_area_size(58)
            .build_cartesian_2d(axis, 0.0..highest)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .x_desc(self.x)
            .y_desc(self.y)
            .y_labels(6)
            .y_label_formatter(&|y| format!("{y:.digits$}"))
            .label_style(("sans-serif", 14).into_font().color(&INK))
            .axis_desc_style(("sans-serif", 15).into_font().color(&SOFT))
            .axis_style(SOFT)
            .draw()?;
        let mut names = Vec::new();
        if let Some((name, at)) = &self.limit {
            let all = [(left, *at), (right, *at)];
            chart.draw_series([DashedPathElement::new(all, 6, 4, INK.stroke_width(1))])?;
            names.push((chart.backend_coord(&(right, *at)).1, name.as_str(), INK));
        }
        // Both in pixels of the whole picture; the area draws from its own corner.
        let corner = area.get_base_pixel();
        for (number, (line, color)) in self.lines.iter().zip(COLORS.into_iter().cycle()).enumerate() {
            let mut points = line.points.clone();
            points.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
            // Ranges stand beside one another.
            let aside = 5 * number as i32 - 5 * (self.lines.len() as i32 - 1) / 2;
            for (x, y) in points.iter().filter(|(_, y)| y.samples > 1) {
                let ends = [y.min, y.max].map(|y| chart.backend_coord(&(*x, y)));
                let ends = ends.map(|(x, y)| (x + aside - corner.0, y - corner.1));
                area.draw(&PathElement::new(ends, color.mix(0.4).stroke_width(4)))?;
            }
            chart.draw_series(LineSeries::new(points.iter().map(|(x, y)| (*x, y.median)), color.stroke_width(2)))?;
            chart.draw_series(points.iter().map(|(x, y)| Circle::new((*x, y.median), 3, color.filled())))?;
            if let Some((x, y)) = points.last() {
                names.push((chart.backend_coord(&(*x, y.median)).1, &line.name, color));
            }
        }
        let end = chart.backend_coord(&(right, 0.0)).0 + 8;
        for (y, name, color) in apart(names) {
            let style = ("sans-serif", 14).into_font().color(&color).pos(Pos::new(HPos::Left, VPos::Center));
            area.draw_text(name, &style, (end - corner.0, y - corner.1))?;
        }
        Ok(())
    }
}

/// The axis of x: labels at the values that there are, doublings at equal distances where there are several.
struct Axis {
    values: Vec<f64>,
    log: bool,
    range: Range<f64>,
    format: fn(f64) -> String,
}

impl Axis {
    /// For one value or more, in order.
    fn new(values: Vec<f64>, format: fn(f64) -> String) -> Self {
        let (least, most) = (values[0], values[values.len() - 1]);
        let log = least > 0.0 && most >= 8.0 * least;
        let edge = if log { (most / least).powf(0.04) } else { 0.04 * (most - least).max(1.0) };
        let range = if log { least / edge..most * edge } else { least - edge..most + edge };
        Self { values, log, range, format }
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let [value, start, end] =
            [*value, self.range.start, self.range.end].map(|x| if self.log { x.log2() } else { x });
        from + (f64::from(to - from) * (value - start) / (end - start)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.values.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        (self.format)(*value)
    }
}

/// Names moved apart as little as it takes for none to lie on another.
fn apart(mut names: Vec<(i32, &str, RGBColor)>) -> Vec<(i32, &str, RGBColor)> {
    names.sort_by_key(|(y, ..)| *y);
    for _ in 0..200 {
        for first in 1..names.len() {
            let overlap = NAME - (names[first].0 - names[first - 1].0);
            if overlap > 0 {
                names[first - 1].0 -= (overlap + 1) / 2;
                names[first].0 += (overlap + 1) / 2;
            }
        }
    }
    names
}
