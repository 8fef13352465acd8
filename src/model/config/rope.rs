//! How fast each pair of a head's elements rotates (Su et al. 2021, arXiv:2104.09864), and how that is stretched for contexts
//! longer than those a model was trained with: as `modeling_rope_utils.py` of transformers has it.

use std::{borrow::Cow, f64::consts::TAU};

use serde_json::{Map, Value};

use super::{
    families::RopeRule,
    keys::{ConfigFault, Keys, within},
};

/// A rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Rotation per position of each pair of a head's elements, in radians. Heads may have more elements, which do not rotate.
    inv_freq: Vec<f32>,
    /// What sine and cosine are multiplied by.
    pub scale: f32,
    growth: Growth,
}

/// What happens to the frequencies when a sequence is long.
#[derive(Clone, Debug, PartialEq)]
enum Growth {
    None,
    /// Others from a length on.
    Long {
        longest_short: usize,
        inv_freq: Vec<f32>,
    },
    /// Others for each length from there on.
    Dynamic {
        trained: usize,
        theta: f64,
        factor: f64,
        dims: usize,
    },
}

impl Rope {
    /// No pair rotates.
    fn none() -> Self {
        Self { inv_freq: Vec::new(), scale: 1.0, growth: Growth::None }
    }

    /// Divides the frequencies, pair by pair.
    pub(super) fn slow_by(&mut self, factors: &[f32]) -> Result<(), ConfigFault> {
        if factors.len() != self.pairs() || factors.iter().any(|factor| !(factor.is_finite() && *factor > 0.0)) {
            let cause = format!("the factors of its frequencies are not {} numbers above 0", self.pairs());
            return Err(ConfigFault::Wrong(cause));
        }
        self.inv_freq.iter_mut().zip(factors).for_each(|(frequency, factor)| *frequency /= factor);
        Ok(())
    }

    /// Where no pair rotates, all do, by nothing.
    pub(super) fn pair_all(&mut self, head_dim: usize) {
        if self.inv_freq.is_empty() {
            self.inv_freq = vec![0.0; head_dim / 2];
        }
    }

    /// How many pairs of a head's elements rotate.
    pub fn pairs(&self) -> usize {
        self.inv_freq.len()
    }

    /// The frequencies depend on how long the sequence is.
    pub fn grows(&self) -> bool {
        self.growth != Growth::None
    }

    /// A number that two lengths share if they have the same frequencies.
    pub(crate) fn regime(&self, length: usize) -> usize {
        match &self.growth {
            Growth::None => 0,
            Growth::Long { longest_short, .. } => usize::from(length > *longest_short),
            Growth::Dynamic { trained, .. } => {
                if length > *trained {
                    length
                } else {
                    0
                }
            }
        }
    }

    /// Rotation per position of each pair, in radians, in a sequence of so many tokens.
    pub fn frequencies(&self, length: usize) -> Cow<'_, [f32]> {
        match &self.growth {
            Growth::Long { inv_freq, .. } if self.regime(length) > 0 => inv_freq.into(),
            Growth::Dynamic { trained, theta, factor, dims } if self.regime(length) > 0 => {
                let stretch = factor * length as f64 / *trained as f64 - (factor - 1.0);
                let theta = theta * stretch.powf(*dims as f64 / (*dims as f64 - 2.0));
                narrow(plain(theta, *dims)).into()
            }
            _ => self.inv_freq.as_slice().into(),
        }
    }
}

/// How the model is rotated: its ropes, of which layers of a second kind take the second.
pub(super) fn ropes(rule: RopeRule, keys: &Keys<'_>, head_dim: usize) -> Result<Vec<Rope>, ConfigFault> {
    let none = Map::new();
    let empty = Keys::new(&none, &[]);
    let theta = keys.positive("rope_theta")?;
    if rule == RopeRule::ByType {
        let by_type = keys.object("rope_parameters")?.unwrap_or(empty);
        let mut full = by_type.owned("full_attention")?;
        let scaling = keys.owned("rope_scaling")?;
        // The older block is laid over what transformers assumes, which has a type: its older name for that does not count.
        if !scaling.is_empty() && full.is_empty() {
            full.insert("rope_type".into(), "default".into());
        }
        full.extend(scaling);
        let sliding = by_type.owned("sliding_attention")?;
        let local = keys.positive("rope_local_base_freq")?;
        return Ok(vec![
            rope(&Block { rule, rope: Keys::new(&full, &[]), model: *keys, theta, head_dim })?,
            rope(&Block { rule, rope: Keys::new(&sliding, &[]), model: *keys, theta: local, head_dim })?,
        ]);
    }
    let block = keys.object("rope_scaling")?.or(keys.object("rope_parameters")?).unwrap_or(empty);
    if block.given("full_attention").or(block.given("sliding_attention")).is_some() {
        return Err(ConfigFault::Unsupported("rope parameters by layer type".into()));
    }
    let rope = rope(&Block { rule, rope: block, model: *keys, theta, head_dim })?;
    Ok(if rule == RopeRule::SomeLayers { vec![rope, Rope::none()] } else { vec![rope] })
}

/// The tokens that the model was made for: any number, where its frequencies follow the length.
pub(super) fn max_positions(ropes: &[Rope], trained: usize) -> usize {
    let follows = ropes.iter().any(|rope| matches!(rope.growth, Growth::Dynamic { .. }));
    if follows { u32::MAX as usize } else { trained }
}

/// What is said of a rope.
struct Block<'a> {
    rule: RopeRule,
    rope: Keys<'a>,
    model: Keys<'a>,
    /// Where the rope's own keys do not say.
    theta: Option<f64>,
    head_dim: usize,
}

impl Block<'_> {
    fn lacks(&self, kind: &str, key: &str) -> ConfigFault {
        ConfigFault::Wrong(format!("the {kind} rope scaling lacks {key}"))
    }

    fn wrong(&self, kind: &str, key: &str, value: impl std::fmt::Display) -> ConfigFault {
        ConfigFault::Wrong(format!("{key} of the {kind} rope scaling is {value}"))
    }

    /// A number above 0 that must be there.
    fn needed(&self, kind: &str, key: &str) -> Result<f64, ConfigFault> {
        let number = self.rope.number(key)?.ok_or_else(|| self.lacks(kind, key))?;
        if number > 0.0 { Ok(number) } else { Err(self.wrong(kind, key, number)) }
    }

    /// The tokens that the model was trained with before it was stretched: the model's own key counts first.
    fn original(&self) -> Result<f64, ConfigFault> {
        const KEY: &str = "original_max_position_embeddings";
        let said = self.model.positive(KEY)?.or(self.rope.positive(KEY)?);
        Ok(said.unwrap_or(self.model.size("max_position_embeddings")? as f64))
    }

    /// How many times as long the context is: its own key, or what the lengths say.
    fn factor(&self) -> Result<f64, ConfigFault> {
        let by_length = self.model.size("max_position_embeddings")? as f64 / self.original()?;
        Ok(self.rope.positive("factor")?.unwrap_or(by_length))
    }

    /// Elements of a head that rotate.
    fn dims(&self) -> Result<usize, ConfigFault> {
        const KEY: &str = "partial_rotary_factor";
        let part = self.rope.positive(KEY)?.or(self.model.positive(KEY)?).unwrap_or(1.0);
        if part != 1.0 && self.rule != RopeRule::Partial {
            return Err(ConfigFault::Unsupported(format!("{KEY} {part}")));
        }
        let dims = (self.head_dim as f64 * part) as usize;
        if dims.next_multiple_of(2) > self.head_dim {
            return Err(ConfigFault::Wrong(format!(
                "{KEY} is {part}, more than there is of heads of {}",
                self.head_dim
            )));
        }
        Ok(dims)
    }
}

/// Radians per position: pair `i` of so many elements turns by `theta^(-2i / dims)`. An odd element has a partner beyond them.
fn plain(theta: f64, dims: usize) -> Vec<f64> {
    (0..dims.div_ceil(2)).map(|i| theta.powf(-2.0 * i as f64 / dims as f64)).collect()
}

fn narrow(frequencies: Vec<f64>) -> Vec<f32> {
    frequencies.into_iter().map(|frequency| frequency as f32).collect()
}

fn rope(block: &Block<'_>) -> Result<Rope, ConfigFault> {
    let theta = block.rope.positive("rope_theta")?.or(block.theta);
    let theta = theta.ok_or_else(|| ConfigFault::Wrong("rope_theta is null".into()))?;
    let (dims, named) = (block.dims()?, block.rope.word("rope_type")?.or(block.rope.word("type")?));
    let kind = match named.unwrap_or("default") {
        "su" | "yarn" if block.rule == RopeRule::Partial => "longrope",
        kind => kind,
    };
    let plain = plain(theta, dims);
    let fixed = |frequencies: Vec<f64>| Rope { inv_freq: narrow(frequencies), ..Rope::none() };
    match kind {
        "default" => Ok(fixed(plain)),
        "linear" => {
            let factor = block.needed(kind, "factor")?;
            Ok(fixed(plain.into_iter().map(|frequency| frequency / factor).collect()))
        }
        "dynamic" => {
            let (factor, trained) = (block.needed(kind, "factor")?, block.model.size("max_position_embeddings")?);
            if dims < 4 || factor < 1.0 {
                return Err(block.wrong(kind, "factor", format!("{factor}, for {dims} elements of a head")));
            }
            Ok(Rope { growth: Growth::Dynamic { trained, theta, factor, dims }, ..fixed(plain) })
        }
        "llama3" => llama3(block, plain).map(fixed),
        "yarn" => yarn(block, theta, plain),
        "longrope" => longrope(block, plain),
        other => Err(ConfigFault::Unsupported(format!("rope scaling {other:?}"))),
    }
}

/// The scaling of Llama 3.1: long wavelengths are stretched by `factor`, short ones stay, those between are blended.
fn llama3(block: &Block<'_>, mut inv_freq: Vec<f64>) -> Result<Vec<f64>, ConfigFault> {
    let needed = |key| block.needed("llama3", key);
    let factor = needed("factor")?;
    let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
    let original = block.original()?;
    if low >= high {
        return Err(ConfigFault::Wrong(format!(
            "low_freq_factor {low} of the llama3 rope scaling is not below high_freq_factor {high}"
        )));
    }
    for frequency in &mut inv_freq {
        let wavelengths = original * *frequency / TAU;
        let blend = ((wavelengths - low) / (high - low)).clamp(0.0, 1.0);
        *frequency *= blend + (1.0 - blend) / factor;
    }
    Ok(inv_freq)
}

/// YaRN (Peng et al. 2023, arXiv:2309.00071): pairs that turn less than `beta_slow` times within the trained context are
/// stretched, those that turn more than `beta_fast` times stay, those between are blended.
fn yarn(block: &Block<'_>, theta: f64, plain: Vec<f64>) -> Result<Rope, ConfigFault> {
    let (rope, dims, original) = (&block.rope, block.dims()?, block.original()?);
    let factor = block.factor()?;
    let (fast, slow) = (rope.positive("beta_fast")?.unwrap_or(32.0), rope.positive("beta_slow")?.unwrap_or(1.0));
    let scale = match rope.positive("attention_factor")? {
        Some(scale) => scale,
        None => {
            let length = |weight: f64| if factor > 1.0 { 0.1 * weight * factor.ln() + 1.0 } else { 1.0 };
            let weight = |key| Ok(rope.number(key)?.filter(|&weight| weight != 0.0));
            match (weight("mscale")?, weight("mscale_all_dim")?) {
                (Some(of_scores), Some(of_all)) => length(of_scores) / length(of_all),
                _ => length(1.0),
            }
        }
    };
    within("attention_factor", scale, true)?;
    if theta == 1.0 {
        return Err(ConfigFault::Wrong("rope_theta of the yarn rope scaling is 1".into()));
    }
    let turns_so_often = |turns: f64| dims as f64 * (original / (turns * TAU)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (turns_so_often(fast), turns_so_often(slow));
    // Of ropes by layer type transformers does not look for it.
    if block.rule == RopeRule::ByType || rope.given("truncate").is_none() || rope.flag("truncate")? {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dims as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    let stretched = |(i, frequency): (usize, f64)| {
        let share = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        frequency * (share / factor + 1.0 - share)
    };
    let inv_freq = narrow(plain.into_iter().enumerate().map(stretched).collect());
    Ok(Rope { inv_freq, scale: scale as f32, growth: Growth::None })
}

/// LongRoPE (Ding et al. 2024, arXiv:2402.13753): each pair has a factor, and another in sequences longer than those that the
/// model was trained with.
fn longrope(block: &Block<'_>, plain: Vec<f64>) -> Result<Rope, ConfigFault> {
    let (original, factor) = (block.original()?, block.factor()?);
    let stretched = |key: &str| {
        let factors = block.rope.list(key)?.ok_or_else(|| block.lacks("longrope", key))?;
        // One factor is for all pairs.
        if factors.len() != plain.len() && factors.len() != 1 {
            let cause = format!("{key} has {} numbers for {} pairs of a head's elements", factors.len(), plain.len());
            return Err(ConfigFault::Wrong(cause));
        }
        Ok(narrow(plain.iter().zip(factors.iter().cycle()).map(|(frequency, factor)| frequency / factor).collect()))
    };
    let scale = match block.rope.positive("attention_factor")? {
        Some(scale) => scale,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / original.ln()).sqrt(),
    };
    within("attention_factor", scale, true)?;
    let growth = Growth::Long { longest_short: original as usize, inv_freq: stretched("long_factor")? };
    Ok(Rope { inv_freq: stretched("short_factor")?, scale: scale as f32, growth })
}

impl Keys<'_> {
    /// A copy of an object; an empty one if it is not there.
    fn owned(&self, key: &str) -> Result<Map<String, Value>, ConfigFault> {
        self.object(key)?;
        Ok(self.given(key).and_then(Value::as_object).cloned().unwrap_or_default())
    }
}
