//! One line of `bench_kernels`: a kernel with a shape, what it took, and what was possible in the same rounds.

use serde_json::{Value, json};

use crate::{
    processors::Limits,
    report::{Column, Show, Spread, column},
};

pub const COLUMNS: [Column; 11] = [
    column("kernel", "kernel", Show::Text, ""),
    column("shape", "shape", Show::Text, ""),
    column(
        "off",
        "off",
        Show::Power,
        "‖kernel - twin‖ / ‖twin‖ where this row was checked; the twin is the same kernel on the CPU",
    ),
    column("seconds", "time", Show::SpreadOfSeconds, "of one launch, ± half of the range over the rounds"),
    column("bytes", "bytes", Show::Bytes, "that must move, each read or written once"),
    column("gb_s", "GB/s", Show::Significant, "those bytes over the time"),
    column(
        "weights_gb_s",
        "of weights",
        Show::Significant,
        "GB/s of weights alone as they become, where packed or quantised ones are decoded",
    ),
    column("of_copy", "of copy", Show::Spread(2), "GB/s over those of a copy within the device, round by round"),
    column(
        "of_read",
        "of read",
        Show::Spread(2),
        "GB/s over those of threads that only read memory, round by round; CPU only",
    ),
    column(
        "tflop_s",
        "TFLOP/s",
        Show::Significant,
        "a multiplication and an addition each, of pairs that the causal mask lets through",
    ),
    column("of_peak", "of peak", Show::Spread(2), "TFLOP/s over those of threads that only multiply and add; CPU only"),
];

/// One line of the table.
pub struct Row {
    pub kernel: &'static str,
    pub shape: String,
    /// From the twin, where this line was checked.
    pub off: Option<f64>,
    /// Round by round.
    pub seconds: Vec<f64>,
    /// GB/s of a copy in the same round.
    pub copies: Vec<f64>,
    /// Of the processors in the same round, on the CPU.
    pub limits: Vec<Limits>,
    pub bytes: usize,
    pub operations: f64,
    /// Bytes of weights that are decoded.
    pub weights: usize,
    /// Of attention without a soft cap, for the plot: tokens that are there already, and new ones.
    pub tokens: Option<(usize, usize)>,
}

impl Row {
    /// A kernel that only moves so many bytes, or hardly more.
    pub fn new(kernel: &'static str, shape: String, off: Option<f64>, bytes: usize) -> Self {
        let (seconds, copies, limits) = (Vec::new(), Vec::new(), Vec::new());
        Self { kernel, shape, off, seconds, copies, limits, bytes, operations: 0.0, weights: 0, tokens: None }
    }

    /// A copy is its limit.
    pub fn moves(&self) -> bool {
        self.operations == 0.0 && !["argmax", "expand", "dequantise", "unpack"].contains(&self.kernel)
    }

    pub fn time(&self) -> f64 {
        Spread::of(&self.seconds).median
    }

    pub fn rates(&self) -> Vec<f64> {
        self.seconds.iter().map(|seconds| self.bytes as f64 / seconds / 1e9).collect()
    }

    pub fn of_copy(&self) -> Vec<f64> {
        self.rates().iter().zip(&self.copies).map(|(rate, copy)| rate / copy).collect()
    }

    pub fn tera(&self) -> Vec<f64> {
        self.seconds.iter().map(|seconds| self.operations / seconds / 1e12).collect()
    }

    /// Shares of what the processors can do.
    fn shares(&self, values: &[f64], limit: fn(&Limits) -> f64) -> Option<Spread> {
        let shares: Vec<_> = values.iter().zip(&self.limits).map(|(value, limits)| value / limit(limits)).collect();
        (!shares.is_empty()).then(|| Spread::of(&shares))
    }

    pub fn cells(&self) -> [Value; 11] {
        [
            json!(self.kernel),
            json!(self.shape),
            json!(self.off),
            json!(Spread::of(&self.seconds)),
            json!(self.bytes),
            json!(self.bytes as f64 / self.time() / 1e9),
            json!((self.weights > 0).then(|| self.weights as f64 / self.time() / 1e9)),
            json!(Spread::of(&self.of_copy())),
            json!(self.shares(&self.rates(), |limits| limits.read_gb_s)),
            json!((self.operations > 0.0).then(|| self.operations / self.time() / 1e12)),
            json!(self.shares(&self.tera(), |limits| limits.tflop_s).filter(|_| self.operations > 0.0)),
        ]
    }
}
