//! What a run did: the closing lines, and the same as JSON.

use std::{fmt::Write, time::Duration};

use layer_streamer::{
    kernels::Kernels,
    model::{Decoder, Sampling},
    plan::{Bandwidths, Part, Settings, Tier},
    probe::{Disagreement, Probe, Seen},
    trace::{Bound, PassStats, Stage, Stats, Verdict},
};
use serde_json::{Value, json};

use super::End;
use crate::{sampling, units};

/// What was generated, and how long that took.
#[derive(Clone)]
pub struct Run {
    pub prompt_tokens: usize,
    pub prompt_time: Duration,
    pub tokens: Vec<u32>,
    /// For tokens after the first, which the prompt's pass brings: so many passes were done.
    pub decode_passes: usize,
    /// And took so long.
    pub decode_time: Duration,
    /// From the start of the program to the first token.
    pub first_token: Option<Duration>,
    pub end: End,
    /// Of a device that has its own memory: bytes free before the model was loaded, free now, and in all.
    pub device_memory: Option<[usize; 3]>,
    /// How tokens were drawn, where they were.
    pub sampling: Option<Sampling>,
}

impl Run {
    /// Tokens per second, after the first; `None` where there is one at most.
    fn decode_rate(&self) -> Option<f64> {
        (self.decode_passes > 0).then(|| per_second(self.decode_passes, self.decode_time))
    }
}

fn per_second(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64().max(1e-9)
}

/// A run, and what the streamer counted meanwhile.
pub struct Report {
    run: Run,
    stats: Stats,
    verdict: Option<Verdict>,
    /// By unit: where it is kept.
    tiers: Vec<Tier>,
    settings: Settings,
    parts: Vec<Part>,
    device: String,
    probe: Option<Probe>,
    /// Steady passes show that the probe is wrong.
    disagreement: Option<Disagreement>,
}

impl Report {
    pub fn new<D: Kernels>(
        decoder: &mut Decoder<D>,
        settings: &Settings,
        parts: &[Part],
        probe: Option<Probe>,
        run: Run,
    ) -> Self {
        let streamer = decoder.streamer();
        let (stats, verdict) = (streamer.stats(), streamer.verdict());
        let disagreement = probe.as_ref().zip(stats.steady.zip(verdict)).and_then(|(probe, (passes, verdict))| {
            let seen = |bytes: f64, stage: Stage, bound: Bound| Seen {
                bytes: (bytes * passes.passes as f64) as u64,
                seconds: passes.stage_seconds[stage as usize][0] * passes.passes as f64,
                bound: verdict.bound == bound && verdict.is_full(),
            };
            // Reads through the page cache tell nothing of the disk.
            let disk = (passes.buffered_bytes == 0.0).then(|| seen(passes.direct_bytes, Stage::Read, Bound::Disk));
            // The host's own time of copies: a device that copies by itself is asked by its probe alone.
            let copy = seen(passes.transferred_bytes, Stage::Transfer, Bound::Transfer);
            probe.observe(disk, (!verdict.linked).then_some(copy))
        });
        Self {
            tiers: streamer.plan().tiers().collect(),
            device: streamer.device().describe(),
            settings: settings.clone(),
            parts: parts.to_vec(),
            run,
            stats,
            verdict,
            probe,
            disagreement,
        }
    }

    /// The closing lines.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |line: String| text += &(line + "\n");
        let Run { prompt_tokens, prompt_time, tokens, first_token, .. } = &self.run;
        let first =
            first_token.map_or_else(String::new, |at| format!("; the first {:.2} s after the start", at.as_secs_f64()));
        let rate = self.run.decode_rate().map_or_else(String::new, |rate| format!(" at {rate:.2} tokens/s"));
        line(format!(
            "{prompt_tokens} tokens in at {:.2} tokens/s, {} out{rate}{first}",
            per_second(*prompt_tokens, *prompt_time),
            tokens.len(),
        ));
        if let Some(used) = &self.run.sampling {
            line(sampling::describe(used));
        }
        if let Some(table) = self.passes() {
            line(table);
        }
        if let Some(verdict) = self.verdict {
            line(verdict.to_string());
        }
        let Stats { reader, reader_reason, buffered_files, .. } = &self.stats;
        let reason = if reader_reason.is_empty() { String::new() } else { format!(" ({reader_reason})") };
        line(format!("read by {reader}{reason}"));
        for (path, reason) in buffered_files {
            line(format!("{} was read through the page cache: {reason}", path.display()));
        }
        if let Some(disagreement) = &self.disagreement {
            line(disagreement.to_string());
        }
        if let Some([before, free, all]) = self.run.device_memory {
            line(format!(
                "device memory in use: {} of {}, {} of it before the model was loaded",
                units::bytes((all - free) as u64),
                units::bytes(all as u64),
                units::bytes(all.saturating_sub(before) as u64),
            ));
        }
        text.truncate(text.trim_end().len());
        text
    }

    /// A table of what moved over each link, in the first pass and in steady ones.
    fn passes(&self) -> Option<String> {
        let (stats, first) = (&self.stats, self.stats.first?);
        let limits = self.probe.as_ref().map(Probe::bandwidths);
        let (to_pack, given_up) = (stats.packed.to_pack(), stats.packed.given_up);
        // Those that are not packed are read in every pass.
        let kept = self.tiers.iter().filter(|tier| **tier != Tier::Disk).count() - to_pack - given_up;
        let mut text = format!("{:14} {:>22}  {:>22}", "", "first pass", "steady pass");
        let _ = write!(
            text,
            "  {:>11}   kept: {kept} of {} units{}{}",
            match stats.passes {
                1 => "1 pass".into(),
                passes => format!("{passes} passes"),
            },
            self.tiers.len(),
            if to_pack > 0 { format!(", {to_pack} yet to be packed") } else { String::new() },
            if given_up > 0 { format!(", {given_up} could not be packed") } else { String::new() }
        );
        let time =
            |passes: Option<PassStats>| passes.map_or_else(|| "none".into(), |passes| units::seconds(passes.seconds));
        let _ = write!(text, "\n{:14} {:>22}  {:>22}", "time", time(Some(first)), time(stats.steady));
        for (name, all, of, limit) in self.links(limits) {
            if all == 0 {
                continue;
            }
            let cell = |passes: Option<PassStats>| {
                passes.map_or_else(String::new, |passes| {
                    let moved = of(&passes);
                    let rate = moved / 1e9 / passes.seconds.max(1e-9);
                    if moved > 0.0 {
                        format!("{} {rate:>6.2} GB/s", units::bytes(moved as u64))
                    } else {
                        "nothing".into()
                    }
                })
            };
            let _ = write!(
                text,
                "\n{name:14} {:>22}  {:>22}  {:>11}",
                cell(Some(first)),
                cell(stats.steady),
                units::bytes(all)
            );
            if let Some((limit, passes)) =
                limit.zip(stats.steady.or(Some(first))).filter(|(_, passes)| of(passes) > 0.0)
            {
                let share = 100.0 * of(&passes) / passes.seconds.max(1e-9) / limit;
                let age = self.probe.as_ref().map(Probe::age).unwrap_or_default();
                let _ = write!(text, "   {share:.0} % of {:.2} GB/s, measured {age}", limit / 1e9);
            }
        }
        Some(text)
    }

    /// Each link: its name, all bytes, those of a pass, and what it was measured to carry.
    fn links(&self, limits: Option<Bandwidths>) -> [Link; 5] {
        let stats = &self.stats;
        [
            ("disk", stats.direct_bytes, |passes| passes.direct_bytes, limits.map(|of| of.disk)),
            ("page cache", stats.buffered_bytes, |passes| passes.buffered_bytes, None),
            ("mapped files", stats.mapped_bytes, |passes| passes.mapped_bytes, None),
            ("to pinned RAM", stats.stage(Stage::Pin).bytes, |passes| passes.pinned_bytes, None),
            (
                "to the device",
                stats.stage(Stage::Transfer).bytes,
                |passes| passes.transferred_bytes,
                limits.map(|of| of.copy),
            ),
        ]
    }

    /// The same for programs.
    pub fn json(&self, text: Option<&str>) -> Value {
        let Run { prompt_tokens, prompt_time, tokens, decode_passes, decode_time, first_token, end, .. } = &self.run;
        let limits = self.probe.as_ref().map(Probe::bandwidths);
        let links = self.links(limits).map(|(name, all, of, limit)| {
            let pass = |passes: &PassStats| json!({ "bytes": of(passes), "gb_s": of(passes) / 1e9 / passes.seconds.max(1e-9) });
            json!({
                "link": name, "bytes": all, "first_pass": self.stats.first.as_ref().map(pass),
                "steady_pass": self.stats.steady.as_ref().map(pass), "limit_gb_s": limit.map(|limit| limit / 1e9),
            })
        });
        let verdict = self.verdict.map(|verdict| {
            json!({
                "bound": verdict.bound, "busy": verdict.busy, "moves": verdict.moves, "linked": verdict.linked,
                "fills": verdict.fills, "advice": verdict.advice(), "text": verdict.to_string(), "waits": self.stats.waits(),
            })
        });
        json!({
            "text": text, "tokens": tokens, "interrupted": *end == End::Interrupt, "end": end.name(), "device": self.device,
            "sampling": self.run.sampling,
            "prompt_tokens": prompt_tokens, "prompt_seconds": prompt_time.as_secs_f64(),
            "decode_passes": decode_passes, "decode_seconds": decode_time.as_secs_f64(),
            "first_token_seconds": first_token.map(|at| at.as_secs_f64()), "tokens_per_second": self.run.decode_rate(),
            "passes": self.stats.passes, "first_pass": self.stats.first, "steady_pass": self.stats.steady,
            "links": links, "stages": Stage::ALL.map(|stage| json!({ "stage": stage.name(), "totals": self.stats.stage(stage) })),
            "placement": {
                "settings": self.settings,
                "tiers": self.tiers.iter().map(Tier::to_string).collect::<Vec<_>>(),
                "memory": crate::plan::memory(&self.parts),
            },
            "device_memory": self.run.device_memory.map(|[before, free, all]| json!({
                "free_before_bytes": before, "free_bytes": free, "bytes": all,
            })),
            "buffered_files": self.stats.buffered_files.iter()
                .map(|(path, reason)| json!({ "file": path, "reason": reason })).collect::<Vec<_>>(),
            "verdict": verdict, "reader": self.stats.reader.to_string(), "reader_reason": self.stats.reader_reason,
            "probe": self.probe.as_ref().map(|probe| json!({
                "disk_gb_s": probe.bandwidths().disk / 1e9, "copy_gb_s": probe.bandwidths().copy / 1e9,
                "age": probe.age(), "disturbed": probe.disturbed(),
                "disagreement": self.disagreement.as_ref().map(ToString::to_string),
            })),
        })
    }
}

type Link = (&'static str, u64, fn(&PassStats) -> f64, Option<f64>);
