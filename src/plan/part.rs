//! What memory is taken for, as programs and people read it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Plan, Tier};
use crate::layout::Staging;

/// What memory is taken for. Prints as a row of a table, such as `3 pinned slots`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "purpose", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Purpose {
    /// Slots that units pass through.
    Slots {
        /// The memory they are in: [`Tier::Ram`], [`Tier::Pinned`] or [`Tier::Gpu`].
        tier: Tier,
        /// How many.
        count: usize,
    },
    /// Units that are kept between passes.
    Kept {
        /// Where.
        tier: Tier,
        /// How many.
        units: usize,
    },
    /// Blocks through which tensors pass that are converted on arrival.
    Staging,
    /// Tensors that stay on the device.
    Statics,
    /// The KV cache of a decoder.
    KvCache {
        /// How many sequences have room of their own in it; 1 where all of them share it.
        sequences: usize,
        /// How many tokens of each. There is room for whole pages.
        tokens: usize,
    },
    /// What a decoder computes with.
    Activations,
    /// What kernels compute with.
    Scratch,
    /// Tokens on their way to the device and back.
    Tokens,
    /// Rows of an embedding table that stays in its file, on their way to the device.
    EmbeddingRows,
    /// Events for a picture of the run.
    Trace,
    /// A host's tokenizer.
    Tokenizer,
    /// What tokens are drawn at random with.
    Sampler,
    /// A host's requests and their answers, until they are taken.
    Requests,
}

impl Purpose {
    /// Whether it is in the device's memory; else in RAM. To the CPU device both are one.
    pub fn is_on_device(&self) -> bool {
        match self {
            Self::Slots { tier, .. } | Self::Kept { tier, .. } => tier.is_on_device(),
            Self::Staging | Self::Statics | Self::KvCache { .. } | Self::Activations | Self::Scratch => true,
            Self::Tokens | Self::EmbeddingRows | Self::Trace | Self::Tokenizer | Self::Sampler | Self::Requests => {
                false
            }
        }
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        let text = match *self {
            Self::Slots { tier, count } => {
                let kind = match tier {
                    Tier::Ram => "RAM",
                    Tier::Pinned | Tier::PinnedPacked => "pinned",
                    Tier::Gpu | Tier::GpuPacked => "device",
                    Tier::Disk => "disk",
                };
                format!("{count} {kind} slot{}", plural(count))
            }
            Self::Kept { tier, units } => format!("{units} unit{} kept {tier}", plural(units)),
            Self::Staging => format!("{} staging blocks", Staging::BLOCKS),
            Self::Statics => "static tensors".into(),
            Self::KvCache { sequences: 1, tokens } => format!("KV cache of {tokens} tokens"),
            Self::KvCache { sequences, tokens } => format!("KV cache of {sequences} × {tokens} tokens"),
            Self::Activations => "activations".into(),
            Self::Scratch => "kernels' scratch".into(),
            Self::Tokens => "tokens on their way".into(),
            Self::EmbeddingRows => "embedding rows on their way".into(),
            Self::Trace => "the trace".into(),
            Self::Tokenizer => "tokenizer".into(),
            Self::Sampler => "drawing tokens".into(),
            Self::Requests => "requests on their way".into(),
        };
        f.pad(&text)
    }
}

/// One thing that memory is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it is.
    #[serde(flatten)]
    pub purpose: Purpose,
    /// How much it takes.
    pub bytes: usize,
}

impl Part {
    /// Whether it is in the device's memory; else in RAM. To the CPU device both are one.
    pub fn is_on_device(&self) -> bool {
        self.purpose.is_on_device()
    }

    /// What those of the parts take that are on the device, and the others in RAM: `[device, host]`, in bytes.
    pub fn totals<'a>(parts: impl IntoIterator<Item = &'a Self>) -> [usize; 2] {
        parts.into_iter().fold([0usize; 2], |[device, host], part| match part.is_on_device() {
            true => [device.saturating_add(part.bytes), host],
            false => [device, host.saturating_add(part.bytes)],
        })
    }
}

impl Plan {
    /// What the streamer will reserve.
    pub fn memory(&self) -> Vec<Part> {
        let stages = [self.layout.ram.as_ref(), self.layout.pinned.as_ref(), Some(&self.layout.gpu)];
        let slots = [Tier::Ram, Tier::Pinned, Tier::Gpu].into_iter().zip(stages).filter_map(|(tier, stage)| {
            let (count, bytes) = (stage?.slots, stage?.bytes());
            (bytes > 0).then_some(Part { purpose: Purpose::Slots { tier, count }, bytes })
        });
        let kept = Tier::KEPT.into_iter().filter_map(|tier| {
            let (units, bytes) = (self.count(tier), self.layout.kept(tier));
            (units > 0).then_some(Part { purpose: Purpose::Kept { tier, units }, bytes })
        });
        let staging = Part { purpose: Purpose::Staging, bytes: self.layout.staging.bytes() };
        slots.chain(kept).chain((staging.bytes > 0).then_some(staging)).collect()
    }
}
