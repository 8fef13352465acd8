//! What a plan moves and how long that takes, known before anything is reserved.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Cost, Plan, Sharing, Tier};
use crate::{
    layout::{StreamLayout, Tallies},
    packed,
};

/// What the links carry, in bytes per second. They decide between plans less than the bytes do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bandwidths {
    /// Disk to RAM.
    pub disk: f64,
    /// RAM to the device.
    pub copy: f64,
}

impl Default for Bandwidths {
    /// Assumed where nothing was measured: an NVMe disk, and a PCIe link or one core's `memcpy`.
    fn default() -> Self {
        Self { disk: 2e9, copy: 10e9 }
    }
}

/// What bytes go over. Prints as `disk` or `copy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BindingLink {
    /// Disk to RAM.
    Disk,
    /// RAM to the device.
    Copy,
}

impl fmt::Display for BindingLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "disk",
            Self::Copy => "copy",
        })
    }
}

/// What a pass moves once all tiers are filled, and how long the links take for that. The caller's work is not in it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Forecast {
    /// Bytes read from disk, rounded to pages as reads are.
    pub disk_bytes: usize,
    /// Bytes copied to the device.
    pub copy_bytes: usize,
    /// How long the disk is busy.
    pub disk_seconds: f64,
    /// How long the link to the device is busy (for the CPU: a core, which copies and unpacks).
    pub copy_seconds: f64,
    /// How long a pass takes: the slower of the two, and of the faster what it keeps the other waiting.
    pub pass_seconds: f64,
}

impl Forecast {
    /// For units that come to this, of which so many as the layout says are read ahead in RAM, as two busy cores showed it (copies took half of the
    /// disk's time and more): with none, reading and copying took turns, and a tenth longer than that, as the disk's queue ran
    /// empty every time. With one, at which a hiccup of either stops both, 0.84 of the disk's pace were left; with two, 0.94.
    pub(super) fn new(tallies: &Tallies, layout: &StreamLayout, bandwidths: Bandwidths) -> Self {
        let (copy_bytes, [stored, weights]) = tallies.copied();
        let disk_bytes = tallies.in_tier(Tier::Disk).sum.read;
        let disk_seconds = disk_bytes as f64 / bandwidths.disk;
        let copy_seconds = match layout.sharing {
            Sharing::Own => copy_bytes as f64 / bandwidths.copy,
            Sharing::Ram => {
                // What arrives twice counts once among the bytes that are copied.
                copy_bytes.saturating_sub(stored) as f64 / bandwidths.copy + weights as f64 / packed::core_rate()
            }
        };
        let (slower, faster) = (disk_seconds.max(copy_seconds), disk_seconds.min(copy_seconds));
        let pass_seconds = match layout.read_ahead() {
            0 => 1.1 * (slower + faster),
            1 => slower + 0.25 * faster,
            _ => slower,
        };
        Self { disk_bytes, copy_bytes, disk_seconds, copy_seconds, pass_seconds }
    }

    /// What decides between ways to run: of those that take equally long that which moves less.
    pub(crate) fn cost(&self) -> Cost {
        Cost { seconds: self.pass_seconds, burden: self.disk_seconds + self.copy_seconds }
    }

    /// The link that a pass waits for; `None` if nothing moves.
    pub fn binds(&self) -> Option<BindingLink> {
        match () {
            () if self.disk_seconds >= self.copy_seconds && self.disk_bytes > 0 => Some(BindingLink::Disk),
            () if self.copy_bytes > 0 => Some(BindingLink::Copy),
            () => None,
        }
    }
}

impl Plan {
    /// Where the units are kept, in order.
    pub fn tiers(&self) -> impl Iterator<Item = Tier> {
        self.units.iter().map(|unit| unit.tier)
    }

    /// How many units are kept there.
    pub fn count(&self, tier: Tier) -> usize {
        self.tallies.in_tier(tier).units
    }

    /// What a pass moves, and how long that takes.
    pub fn forecast(&self, bandwidths: Bandwidths) -> Forecast {
        Forecast::new(&self.tallies, &self.layout, bandwidths)
    }
}
