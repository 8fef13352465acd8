//! What `bench_stream` says: a row for each link of one pipeline, or for each value of a sweep.

use layer_streamer::{
    device::Device,
    plan::{Bandwidths, Tier},
    trace::Stage,
};
use serde_json::json;

use crate::{
    Found, Sweep,
    bench::{self, Kind, Lane, Limits},
    report::{Column, Figure, Line, Panel, Plot, Report, Show, Spread, column, units},
    slots,
};

const LINKS: [Column; 7] = [
    column("link", "link", Show::Text, ""),
    column("pass_bytes", "a pass", Show::Bytes, "bytes that a steady pass moves over this link"),
    column(
        "gb_s",
        "GB/s",
        Show::Spread(2),
        "those over the time of the whole pass, waits included, ± half of the range",
    ),
    column("limit_gb_s", "limit", Show::Spread(2), "GB/s of the link by itself, measured in the same run"),
    column(
        "ratio",
        "ratio",
        Show::Spread(3),
        "GB/s over the limit: the link that comes near 1 is what a pass waits for",
    ),
    column("cpu_s_per_gb", "CPU s/GB", Show::Fixed(3), "of the pipeline's threads that serve this link"),
    column("limit_cpu_s_per_gb", "limit's", Show::Fixed(3), "the same of the limit"),
];

/// The report on one pipeline: a row for each link.
pub fn one<D: Device>(device: String, lane: &Lane<D>, limits: &Limits<'_, D>, found: &Found) -> Report {
    let mut report = Report::new("bench_stream", device, &LINKS);
    let Lane { plan, pipeline, .. } = lane;
    let (whole, kept) = (plan.bytes_per_pass(), plan.units() - plan.count(Tier::Disk));
    let places = [Tier::Gpu, Tier::GpuPacked, Tier::Pinned, Tier::PinnedPacked, Tier::Ram, Tier::Disk]
        .map(|tier| (plan.count(tier), tier));
    let places = places.iter().filter(|(count, _)| *count > 0).map(|(count, tier)| format!("{count} {tier}"));
    let places = places.collect::<Vec<_>>().join(", ");
    let [stored, arriving] = [whole, plan.weight_bytes()].map(|bytes| units::bytes(bytes as u64));
    let packed = if whole < plan.weight_bytes() { format!(" packed, {arriving} of weights") } else { String::new() };
    report.line("model", format!("{} layers, {stored}{packed}: {places}", plan.units()));
    let passes = Spread::of(&lane.pass_seconds());
    let weights = plan.weight_bytes() as f64 / 1e9 / passes.median;
    // Those that do not move are used all the same.
    let used = match lane.kind {
        Some(Kind::Mapped) => format!("; weights used at {weights:.2} GB/s"),
        Some(_) if whole as u64 > pipeline.per_pass.transfer => {
            format!("; weights used at {weights:.2} GB/s, those included that stay on the device")
        }
        Some(_) if whole < plan.weight_bytes() => {
            let times = weights / Spread::of(&lane.limits).median;
            format!("; weights used at {weights:.2} GB/s, {times:.3} times the link")
        }
        _ => String::new(),
    };
    report.line("pass", passes.text(units::seconds) + &used);
    report.field("pass_seconds", json!(passes));
    report.field("weights_used_gb_s", json!(lane.kind.map(|_| weights)));
    let planned = plan.forecast(Bandwidths::default()).disk_bytes;
    for (key, value) in [
        ("unit_bytes", whole as u64),
        ("weight_bytes", plan.weight_bytes() as u64),
        ("slot_bytes", slots(plan) as u64),
        ("units", plan.units() as u64),
        ("kept", kept as u64),
        ("read_bytes_per_pass", pipeline.per_pass.read()),
        ("planned_bytes_per_pass", planned as u64),
    ] {
        report.field(key, value);
    }
    let Some(kind) = lane.kind else {
        report.line("moves", "nothing: all layers stay on the device");
        report.measured(Figure::new("a pass in which nothing moves", "s", &lane.passes));
        return report;
    };
    link_rows(&mut report, lane, kind, limits, found);
    let limit = Figure::new(limits.name(kind), "GB/s", &lane.limits);
    if kind == Kind::Mapped {
        let measured = Figure::new(format!("the pipeline, {} by one thread", kind.doing()), "GB/s", &lane.rates());
        report.compare(measured, limit, "pipeline / limit, in turn", &lane.ratios());
        return report;
    }
    costs(&mut report, lane, found);
    let limit_rate = Spread::of(&lane.limits).median * 1e9;
    let copy = Spread::of(&found.copies).median * 1e9;
    let forecast = plan.forecast(match kind {
        Kind::Copy => Bandwidths { copy: limit_rate, ..Bandwidths::default() },
        _ => Bandwidths { disk: limit_rate, copy },
    });
    report.field("planned_pass_seconds", forecast.pass_seconds);
    if kept > 0 {
        let (seconds, read) = (units::seconds(forecast.pass_seconds), units::bytes(planned as u64));
        report.line("plan", format!("{seconds} a pass at the limits of this run, {read} read; {kept} layers kept"));
    }
    let reader = pipeline.stats().reader.to_string();
    let by = if pipeline.reads { format!(", read by {reader}") } else { String::new() };
    report.field("reader", reader);
    let what = format!("the pipeline, {}{by}", kind.doing());
    report.compare(Figure::new(what, "GB/s", &lane.rates()), limit, "pipeline / limit, in turn", &lane.ratios());
    report
}

fn link_rows<D: Device>(report: &mut Report, lane: &Lane<D>, kind: Kind, limits: &Limits<'_, D>, found: &Found) {
    let (per_pass, used) = (lane.pipeline.per_pass, lane.used());
    let other_reads = found.other_reads.as_ref().map(|(kind, rates)| (*kind, &rates[..]));
    let reads =
        |of: Kind| if of == kind { Some(&lane.limits[..]) } else { Some(other_reads.filter(|it| it.0 == of)?.1) };
    let cpu = |of: Kind| Some(limits.moved[of as usize]).filter(|moved| moved.bytes > 0).map(bench::Moved::cpu_per_gb);
    let (copies, memcpy) = (Some(&found.copies[..]), Some(&found.memcpy_rates[..]));
    let copies = if kind == Kind::Copy { Some(&lane.limits[..]) } else { copies };
    type Bytes = fn(&bench::PerPass) -> u64;
    let rows: [(_, Bytes, _, _, _); 5] = [
        (Kind::Direct.link(), |bytes| bytes.direct, Stage::Read, reads(Kind::Direct), cpu(Kind::Direct)),
        (Kind::Buffered.link(), |bytes| bytes.buffered, Stage::Read, reads(Kind::Buffered), cpu(Kind::Buffered)),
        (Kind::Mapped.link(), |bytes| bytes.mapped, Stage::Read, reads(Kind::Mapped), None),
        ("copy to pinned RAM", |bytes| bytes.pin, Stage::Pin, memcpy, Some(found.memcpy.cpu_per_gb())),
        (Kind::Copy.link(), |bytes| bytes.transfer, Stage::Transfer, copies, cpu(Kind::Copy)),
    ];
    for (name, bytes, stage, limit, limit_cpu) in rows.into_iter().filter(|row| row.1(&per_pass) > 0) {
        let rates: Vec<f64> = match lane.passes.is_empty() {
            true => lane.windows.iter().map(|used| bytes(&used.links) as f64 / 1e9 / used.moved.seconds).collect(),
            false => lane.passes.iter().map(|seconds| bytes(&per_pass) as f64 / 1e9 / seconds).collect(),
        };
        let limit = limit.map(Spread::of);
        let ratios = limit.map(|limit| match kind.link() == name && !(per_pass.direct > 0 && per_pass.buffered > 0) {
            true => lane.ratios(),
            false => rates.iter().map(|rate| rate / limit.median).collect(),
        });
        report.row([
            json!(name),
            json!(bytes(&per_pass)),
            json!(Spread::of(&rates)),
            json!(limit),
            json!(ratios.map(|ratios| Spread::of(&ratios))),
            json!(used.cpu_per_gb(stage)),
            json!(limit_cpu),
        ]);
    }
}

/// What it costs beside time.
fn costs<D: Device>(report: &mut Report, lane: &Lane<D>, found: &Found) {
    let used = lane.used();
    let whole = format!("{:.3} s/GB in all; a plain memcpy {:.3}", used.moved.cpu_per_gb(), found.memcpy.cpu_per_gb());
    report.line("CPU", whole);
    report.line("stalled", format!("{:.2} % of a core, all the pipeline's threads together", found.stalled * 100.0));
    let (count, busiest) = (used.allocations, used.bottleneck());
    report.line("busiest", format!("{busiest}; {count} allocations while the pipeline was measured"));
    report.field("cpu_seconds_per_gb", used.moved.cpu_per_gb());
    for stage in Stage::ALL {
        report.field(format!("{stage}_cpu_seconds_per_gb"), json!(used.cpu_per_gb(stage)));
    }
    report.field("memcpy_cpu_seconds_per_gb", found.memcpy.cpu_per_gb());
    report.field("memcpy_gb_s", Spread::of(&found.copies).median);
    report.field("stalled_cpu_share", found.stalled);
    report.field("allocations", used.allocations);
    report.field("bottleneck", used.bottleneck().name());
}

const VALUES: [Column; 8] = [
    column("value", "value", Show::Count, ""),
    column("memory_bytes", "memory", Show::Bytes, "slots, and layers that are kept"),
    column("kept", "kept", Show::Count, "layers that are not read again"),
    column("pass_seconds", "a pass", Show::SpreadOfSeconds, "± half of the range over the rounds"),
    column("link", "link", Show::Text, "what it is measured beside; nothing moves where there is none"),
    column("gb_s", "GB/s", Show::Spread(2), "over that link, waits included"),
    column("limit_gb_s", "limit", Show::Spread(2), "GB/s of the link by itself, about each window"),
    column("ratio", "ratio", Show::Spread(3), "GB/s over the limit, window by window"),
];

/// The report on a sweep: a row for each value.
pub fn swept<D: Device>(device: String, sweep: &Sweep, lanes: &[Lane<D>], limits: &Limits<'_, D>) -> Report {
    let mut report = Report::new("bench_stream", device, &VALUES);
    let Sweep { setting, values } = sweep;
    report.line("sweep", format!("value: {setting}{}", if *setting == "keep" { ", percent" } else { "" }));
    report.field("sweep", json!({"setting": setting, "values": values}));
    for lane in lanes {
        let moving = |samples: Vec<f64>| lane.kind.map(|_| Spread::of(&samples));
        report.row([
            json!(lane.value),
            json!(lane.plan.memory().iter().map(|part| part.bytes).sum::<usize>()),
            json!(lane.plan.units() - lane.plan.count(Tier::Disk)),
            json!(Spread::of(&lane.pass_seconds())),
            json!(lane.kind.map(Kind::link)),
            json!(moving(lane.rates())),
            json!(moving(lane.limits.clone())),
            json!(moving(lane.ratios())),
        ]);
    }
    let time = |lane: &Lane<D>| Spread::of(&lane.pass_seconds()).median;
    if let Some(best) = lanes.iter().min_by(|a, b| time(a).total_cmp(&time(b))) {
        let what = format!("{setting}={}, the fastest in the median", best.value);
        match best.kind {
            None => report.measured(Figure::new(format!("a pass with {what}"), "s", &best.passes)),
            Some(kind) => report.compare(
                Figure::new(format!("the pipeline, {}, with {what}", kind.doing()), "GB/s", &best.rates()),
                Figure::new(limits.name(kind), "GB/s", &best.limits),
                "pipeline / limit, in turn",
                &best.ratios(),
            ),
        }
    }
    let points = |samples: fn(&Lane<D>) -> Vec<f64>| -> Vec<_> {
        let shown = lanes.iter().map(|lane| (lane.value as f64, samples(lane)));
        shown.filter(|(_, samples)| !samples.is_empty()).map(|(x, samples)| (x, Spread::of(&samples))).collect()
    };
    let line = |name: &str, points| Line { name: name.to_owned(), points };
    let panel = |y, lines| Panel { x: setting, y, format: |x| format!("{x}"), lines, limit: None };
    let rates = |lane: &Lane<D>| if lane.kind.is_some() { lane.rates() } else { Vec::new() };
    report.plot = Some(Plot {
        title: format!("Streaming by {setting}"),
        panels: vec![
            panel("seconds a pass", vec![line("a pass", points(Lane::pass_seconds))]),
            panel("GB/s", vec![line("pipeline", points(rates)), line("limit", points(|lane| lane.limits.clone()))]),
        ],
    });
    report
}
