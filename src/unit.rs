//! What is streamed: units of tensors, how the tensors arrive, and where a unit is kept between passes.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    dtype::DType,
    error::{Error, Result},
    quantised::Scheme,
};

/// What becomes of a tensor on its way to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ArrivalOp {
    /// It arrives as it is stored.
    Keep,
    /// It is converted to this type on the device (see [`DType::converts_to`]).
    To(DType),
    /// The tensors of a [`Scheme`], in its order, become a matrix.
    Dequantise {
        /// How they are stored.
        scheme: Scheme,
        /// Rows and columns of the matrix.
        shape: [usize; 2],
        /// F32 or BF16; `None`: the type of blocks that holds the same numbers, for a CPU, or F32 where none does.
        to: Option<DType>,
    },
}

/// One tensor as a layer function sees it, and what it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The name under which the layer function finds it, unique within the unit.
    pub output: String,
    /// The stored tensors it is made of: one, but for [`ArrivalOp::Dequantise`].
    pub inputs: Vec<String>,
    /// How it is made.
    pub op: ArrivalOp,
}

/// Tensors that travel together and are handed over as one "layer". Units need not be alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unit {
    name: String,
    arrivals: Vec<Arrival>,
    pub(crate) tier: Tier,
}

impl Unit {
    /// A unit without tensors yet. The name appears in messages.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Adds the stored tensor `input`, to be found as `output`, unchanged.
    pub fn keep(&mut self, output: impl Into<String>, input: impl Into<String>) -> &mut Self {
        self.add(Arrival { output: output.into(), inputs: vec![input.into()], op: ArrivalOp::Keep })
    }

    /// Adds a tensor however it is made.
    pub fn add(&mut self, arrival: Arrival) -> &mut Self {
        self.arrivals.push(arrival);
        self
    }

    /// Has every tensor added so far that arrives as it is stored, or as blocks, converted to `dtype`, where that is another type.
    pub fn convert(&mut self, dtype: DType) -> &mut Self {
        for arrival in &mut self.arrivals {
            match &mut arrival.op {
                op @ ArrivalOp::Keep => *op = ArrivalOp::To(dtype),
                ArrivalOp::Dequantise { to: to @ None, .. } => *to = Some(dtype),
                _ => {}
            }
        }
        self
    }

    /// Says where the unit is kept between passes.
    pub fn set_tier(&mut self, tier: Tier) -> &mut Self {
        self.tier = tier;
        self
    }

    /// Where the unit is kept between passes.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// The unit's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The unit's tensors in the order they were added.
    pub fn arrivals(&self) -> &[Arrival] {
        &self.arrivals
    }
}

/// Where a unit is kept between passes. A unit may be read twice if its memory is not yet faulted in when the first pass reaches
/// it: that pass does not wait where a slot can take the unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// On disk: read in every pass.
    #[default]
    Disk,
    /// In pageable RAM: read once, pinned and transferred in every pass.
    Ram,
    /// In pinned RAM: read once, transferred in every pass.
    Pinned,
    /// On the device: read and transferred once.
    Gpu,
    /// On the device, with packed and quantised tensors as they are stored: read and transferred once, unpacked into a slot in every pass.
    GpuPacked,
    /// In pinned RAM, packed there by threads of their own while it is stored plain: until that is done it is read in every pass, then
    /// transferred in every pass. A unit for which no room is left, since others packed worse than expected, stays on disk.
    PinnedPacked,
}

impl fmt::Display for Tier {
    /// Where: `on disk`, `in RAM`, `in pinned RAM`, `on the device`,
    /// `packed on the device` or `packed in pinned RAM`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disk => "on disk",
            Self::Ram => "in RAM",
            Self::Pinned => "in pinned RAM",
            Self::Gpu => "on the device",
            Self::GpuPacked => "packed on the device",
            Self::PinnedPacked => "packed in pinned RAM",
        })
    }
}

impl Tier {
    /// Gives units their tiers from a text such as `0-7=pinned,8-11=gpu,12=ram`; units not named keep theirs.
    ///
    /// # Errors
    /// [`Error::Setting`] for a text of another form, or a unit that there is not.
    pub fn parse(text: &str, units: &mut [Unit]) -> Result<()> {
        Self::assign(text, units, |unit, tier| _ = unit.set_tier(tier))
    }

    /// The same for whatever stands for the units: `give` gives one its tier.
    pub(crate) fn assign<U>(text: &str, units: &mut [U], give: impl Fn(&mut U, Self)) -> Result<()> {
        let wrong = |part: &str, cause: String| Error::setting("tier", format!("{part:?}: {cause}"));
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let parsed = part.split_once('=').and_then(|(range, tier)| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                let tier = Self::ALL.into_iter().find(|known| known.word() == tier)?;
                Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?, tier))
            });
            let Some((first, last, tier)) = parsed else {
                return Err(wrong(
                    part,
                    "expected UNIT=TIER or FIRST-LAST=TIER, TIER being disk, ram, pinned, gpu, gpu-packed or pinned-packed".into(),
                ));
            };
            let count = units.len();
            let Some(named) = units.get_mut(first..last.saturating_add(1)).filter(|named| !named.is_empty()) else {
                return Err(wrong(part, format!("there are {count} units, 0 to {}", count.saturating_sub(1))));
            };
            named.iter_mut().for_each(|unit| give(unit, tier));
        }
        Ok(())
    }

    pub(crate) const ALL: [Self; 6] =
        [Self::Disk, Self::Ram, Self::Pinned, Self::Gpu, Self::GpuPacked, Self::PinnedPacked];

    /// Those whose units are not read in every pass.
    pub(crate) const KEPT: [Self; 5] = [Self::Ram, Self::Pinned, Self::Gpu, Self::GpuPacked, Self::PinnedPacked];

    /// Whether units are kept in the device's memory.
    pub(crate) fn is_on_device(self) -> bool {
        matches!(self, Self::Gpu | Self::GpuPacked)
    }

    /// As [`parse`](Self::parse) takes it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Ram => "ram",
            Self::Pinned => "pinned",
            Self::Gpu => "gpu",
            Self::GpuPacked => "gpu-packed",
            Self::PinnedPacked => "pinned-packed",
        }
    }
}
