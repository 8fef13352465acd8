//! `--vram` and `--ram`, as this program and the benchmarks take them, and the table of a plan.

use std::{fmt::Display, str::FromStr};

use layer_streamer::{
    Settings,
    device::Device,
    kernels::Kernels,
    model::{Decoder, Fit, Model, Tables},
    plan::{Bandwidths, Budget, Part, Plan, Tier},
    probe::Probe,
};

use crate::units;

/// An amount of memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// What is free, less a reserve.
    Auto,
    Bytes(usize),
}

impl FromStr for Amount {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const UNITS: [(&str, f64); 7] = [
            ("KiB", 1024.0),
            ("MiB", 1048576.0),
            ("GiB", 1073741824.0),
            ("kB", 1e3),
            ("MB", 1e6),
            ("GB", 1e9),
            ("", 1.0),
        ];
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let parsed = UNITS
            .iter()
            .find_map(|(unit, scale)| Some(scale * text.strip_suffix(unit)?.trim_end().parse::<f64>().ok()?));
        let bytes = parsed.filter(|bytes| (0.0..=isize::MAX as f64).contains(bytes));
        bytes.map(|bytes| Self::Bytes(bytes as usize)).ok_or("give an amount such as 4GiB or 16GB, or auto")
    }
}

/// The budget that was asked for; what was not is what is free.
pub fn budget<D: Device>(
    device: &D,
    vram: Option<Amount>,
    ram: Option<Amount>,
) -> Result<Budget, Box<dyn std::error::Error + Send + Sync>> {
    let given = |amount: Option<Amount>| match amount {
        Some(Amount::Bytes(bytes)) => Some(bytes),
        _ => None,
    };
    if device.memory_is_ram() && vram.is_some() {
        return Err(format!("--vram: {} computes in RAM; give --ram alone", device.describe()).into());
    }
    Ok(Budget::given_or_free(device, given(vram), given(ram))?)
}

/// Whether what the links carry is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// It is assumed.
    Never,
    /// Not now: what is kept will do, or be assumed.
    Before,
    /// Where a pass waits for disk or link, and not lately.
    IfItCounts,
    /// Where not lately.
    Always,
    /// Whatever is kept.
    Anew,
}

/// What the links carry, if it is asked for.
pub fn probe<D: Device>(device: &D, model: &Model, measure: Measure) -> layer_streamer::Result<Option<Probe>> {
    match measure {
        Measure::Never => Ok(None),
        Measure::Before => Ok(Probe::kept(device, &model.checkpoint)),
        Measure::IfItCounts | Measure::Always => Probe::recent(device, &model.checkpoint),
        Measure::Anew => Probe::measure(device, &model.checkpoint),
    }
}

/// The settings with which the model runs fastest within the budget, for which its layers get tiers and its tables their place;
/// and what the links carry, where that was measured.
pub fn fastest<D: Kernels>(
    fit: Fit<'_, D>,
    model: &mut Model,
    measure: Measure,
) -> layer_streamer::Result<(Settings, Option<Probe>)> {
    let settings = fit.fastest(model)?;
    let forecast = Decoder::plan(fit.device, model, &settings)?.forecast(fit.bandwidths);
    let is_linked = !fit.device.memory_is_ram();
    let counts = forecast.disk_bytes > 0 || is_linked && forecast.copy_bytes > 0;
    if measure == Measure::IfItCounts && !counts {
        return Ok((settings, None));
    }
    match probe(fit.device, model, measure)? {
        Some(probe) => Ok((Fit { bandwidths: probe.bandwidths(), ..fit }.fastest(model)?, Some(probe))),
        None => Ok((settings, None)),
    }
}

/// A budget for people.
pub fn describe(budget: Budget) -> String {
    let host = units::bytes(budget.host_bytes as u64);
    match budget.device_bytes {
        Some(device) => format!("{} of GPU memory and {host} of RAM", units::bytes(device as u64)),
        None => format!("{host} of RAM"),
    }
}

/// A plan for people: what takes memory (`own`: the device has its own), where layers and output head are kept, what a pass moves and
/// how long that takes, by a probe or by assumed figures.
pub fn table(device: &str, own: bool, model: &Model, parts: &[Part], plan: &Plan, probe: Option<&Probe>) -> String {
    let bandwidths = probe.map_or_else(Bandwidths::default, Probe::bandwidths);
    let forecast = plan.forecast(bandwidths);
    let bytes = |bytes: usize| units::bytes(bytes as u64);
    let mut text = format!("device: {device}\n");
    let width = parts.iter().map(|part| part.purpose.to_string().chars().count()).max().unwrap_or(0);
    let [on_device, in_ram] = Part::totals(parts);
    if own {
        let mut row = |what: &str, device: String, host: String| {
            text += format!("  {what:width$}  {device:>10}  {host:>10}").trim_end();
            text.push('\n');
        };
        row("memory", "GPU".into(), "RAM".into());
        for part in parts {
            let ([here, there], what) = ([bytes(part.bytes), String::new()], part.purpose.to_string());
            if part.is_on_device() { row(&what, here, there) } else { row(&what, there, here) }
        }
        row("total", bytes(on_device), bytes(in_ram));
    } else {
        let mut row = |what: &dyn Display, count: usize| text += &format!("  {what:width$}  {:>10}\n", bytes(count));
        parts.iter().for_each(|part| row(&part.purpose, part.bytes));
        row(&"total", on_device.saturating_add(in_ram));
    }
    let tiers: Vec<_> = plan.tiers().collect();
    let (layers, head) = tiers.split_at(model.config.layers);
    for (what, tiers) in [("layers", layers), ("output head, in parts", head)] {
        if !tiers.is_empty() {
            text += &format!("  {what}\n");
        }
        for tier in [Tier::Gpu, Tier::GpuPacked, Tier::Pinned, Tier::PinnedPacked, Tier::Ram, Tier::Disk] {
            let (count, list) = (tiers.iter().filter(|found| **found == tier).count(), ranges(tiers, tier));
            if count > 0 {
                text += &format!("  {count:>5} {tier}: {list}\n");
            }
        }
    }
    if model.tables != Tables::OnDevice {
        text += "  embedding: each pass reads its tokens' rows from the file\n";
    }
    let (stored, weights) = (plan.bytes_per_pass(), plan.weight_bytes());
    if stored < weights {
        let ratio = weights as f64 / stored as f64;
        text += &format!("  stored: {} of weights in {}, {ratio:.2} times less\n", bytes(weights), bytes(stored));
    }
    // Elsewhere the device unpacks, beside the link.
    let unpacks = !own && (stored < weights || tiers.contains(&Tier::PinnedPacked));
    let copies = if unpacks { "copies and unpacks" } else { "copies" };
    let links = [
        ("reads", forecast.disk_bytes, forecast.disk_seconds, bandwidths.disk),
        (copies, forecast.copy_bytes, forecast.copy_seconds, bandwidths.copy),
    ];
    // Where all that is read is used in place, the disk is the only link.
    let links = if forecast.disk_bytes > 0 && forecast.copy_bytes == 0 { &links[..1] } else { &links };
    let moves = |&(does, count, seconds, _): &_| format!("{does} {} in {seconds:.3} s", bytes(count));
    let moves: Vec<_> = links.iter().map(moves).collect();
    let rates: Vec<_> = links.iter().map(|(.., rate)| format!("{:.2}", rate / 1e9)).collect();
    let when = probe.map_or_else(|| "assumed".into(), when);
    text += &format!("  a pass {} ({} GB/s, {when})\n", moves.join(" and "), rates.join(" and "));
    text += &match forecast.binds() {
        None => "  nothing moves: a pass takes as long as its computation\n".to_owned(),
        Some(link) => format!("  {:.3} s a pass beside its computation, bound by {link}\n", forecast.pass_seconds),
    };
    text
}

/// How old a probe is, and whether it was disturbed.
fn when(probe: &Probe) -> String {
    format!("measured {}{}", probe.age(), if probe.disturbed().is_some() { " while disturbed" } else { "" })
}

/// What a probe found and how far to trust it, in one line.
pub fn measured(probe: &Probe) -> String {
    let Bandwidths { disk, copy } = probe.bandwidths();
    let found = format!("disk and link: {:.2} and {:.2} GB/s, {}", disk / 1e9, copy / 1e9, when(probe));
    match probe.disturbed() {
        Some(cause) => format!("{found}: {cause}; --probe measures anew"),
        None => found,
    }
}

/// The numbers of those that are kept there, such as 0-3,7.
fn ranges(tiers: &[Tier], tier: Tier) -> String {
    let mut found = Vec::<(usize, usize)>::new();
    for (number, _) in tiers.iter().enumerate().filter(|(_, found)| **found == tier) {
        match found.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => found.push((number, number)),
        }
    }
    let text =
        |&(first, last): &(usize, usize)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    found.iter().map(text).collect::<Vec<_>>().join(",")
}
