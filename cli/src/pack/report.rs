//! What was done: tensors by kind.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::{Value, json};

use super::header::Tensor;
use crate::units;

/// Tensors whose names differ by numbers alone.
#[derive(Default)]
struct Kind {
    tensors: usize,
    packed: usize,
    before: u64,
    after: u64,
}

impl Kind {
    fn add(&mut self, other: &Self) {
        self.tensors += other.tensors;
        self.packed += other.packed;
        self.before += other.before;
        self.after += other.after;
    }

    /// How many times less is stored of them, packed, than else.
    fn ratio(&self, packing: bool) -> f64 {
        let (unpacked, packed) = if packing { (self.before, self.after) } else { (self.after, self.before) };
        if packed == 0 { 1.0 } else { unpacked as f64 / packed as f64 }
    }
}

pub struct Report {
    kinds: BTreeMap<String, Kind>,
    packing: bool,
}

impl Report {
    pub fn new(packing: bool) -> Self {
        Self { kinds: BTreeMap::new(), packing }
    }

    /// Counts a tensor before and after.
    pub fn add(&mut self, before: &Tensor, after: &Tensor) {
        let is_number = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        let parts: Vec<_> = before.name.split('.').map(|part| if is_number(part) { "*" } else { part }).collect();
        let packed = if self.packing { after } else { before }.packed.is_some();
        let kind = Kind { tensors: 1, packed: packed.into(), before: before.stored(), after: after.stored() };
        self.kinds.entry(parts.join(".")).or_default().add(&kind);
    }

    fn total(&self) -> Kind {
        let mut total = Kind::default();
        self.kinds.values().for_each(|kind| total.add(kind));
        total
    }

    /// Bytes of all tensors as they are written.
    pub fn bytes_after(&self) -> u64 {
        self.total().after
    }

    /// A line for each kind and one for all.
    pub fn table(&self) -> String {
        let total = ("in all".to_owned(), self.total());
        let all = || self.kinds.iter().chain([(&total.0, &total.1)]);
        let width = all().map(|(name, _)| name.len()).max().unwrap_or(0);
        let mut table = String::new();
        for (name, kind) in all() {
            let (before, after) = (units::bytes(kind.before), units::bytes(kind.after));
            let (count, ratio) = (kind.tensors, kind.ratio(self.packing));
            let noun = if count == 1 { "tensor " } else { "tensors" };
            let _ = writeln!(table, "{name:width$}  {count:6} {noun}  {before:>7} → {after:>7}  {ratio:.3}");
        }
        table
    }

    pub fn json(&self) -> Value {
        let of = |name: Option<&String>, kind: &Kind| {
            let mut row = json!({
                "tensors": kind.tensors, "packed": kind.packed, "bytes_before": kind.before, "bytes_after": kind.after,
                "ratio": kind.ratio(self.packing),
            });
            if let Some(name) = name {
                row["name"] = name.as_str().into();
            }
            row
        };
        let mut all = of(None, &self.total());
        all["kinds"] = self.kinds.iter().map(|(name, kind)| of(Some(name), kind)).collect();
        all
    }
}
