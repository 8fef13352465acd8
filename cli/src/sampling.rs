//! The options that draw tokens at random, and what is said of them.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
};

use clap::Args;
use layer_streamer::model::{Model, Sampling};
use serde::Serialize;

#[derive(Args, Clone, Debug, Default, PartialEq, Serialize)]
pub struct SamplingOptions {
    /// Draw tokens at random, with the values of the model's generation_config.json. Each option below does so too, and goes before
    /// that file [default: the most likely token]
    #[arg(long, help_heading = "Sampling")]
    pub sample: bool,

    /// Below 1 likely tokens become more likely, above 1 less; 0 is the most likely token
    #[arg(long, value_name = "T", help_heading = "Sampling", allow_negative_numbers = true)]
    pub temperature: Option<f64>,

    /// Keep the K most likely tokens; 0 is all
    #[arg(long, value_name = "K", help_heading = "Sampling", allow_negative_numbers = true)]
    pub top_k: Option<usize>,

    /// Keep the most likely tokens that together reach probability P
    #[arg(long, value_name = "P", help_heading = "Sampling", allow_negative_numbers = true)]
    pub top_p: Option<f64>,

    /// Keep tokens that are P times as likely as the most likely one, or more
    #[arg(long, value_name = "P", help_heading = "Sampling", allow_negative_numbers = true)]
    pub min_p: Option<f64>,

    /// Divide positive logits of tokens that are in the text, prompt included, and multiply negative ones
    #[arg(long, value_name = "R", help_heading = "Sampling", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f64>,

    /// Subtract it from the logits of tokens that were generated, from -2 to 2
    #[arg(long, value_name = "R", help_heading = "Sampling", allow_negative_numbers = true)]
    pub presence_penalty: Option<f64>,

    /// The same seed gives the same text [default: drawn, and printed with the figures]
    #[arg(long, value_name = "N", help_heading = "Sampling", allow_negative_numbers = true)]
    pub seed: Option<u64>,
}

impl SamplingOptions {
    /// How tokens are drawn; `None`: the most likely one is taken.
    pub fn chosen(&self, model: &Model) -> layer_streamer::Result<Option<Sampling>> {
        self.over(&model.config.suggested.sampling, drawn)
    }

    /// The same, over what the model suggests, and with a seed from elsewhere where none is given.
    pub fn over(
        &self,
        suggested: &Sampling,
        other_seed: impl FnOnce() -> u64,
    ) -> layer_streamer::Result<Option<Sampling>> {
        let Self { sample, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed } = *self;
        let numbers = [temperature, top_p, min_p, repetition_penalty, presence_penalty];
        let is_asked = sample || top_k.is_some() || seed.is_some() || numbers.iter().any(Option::is_some);
        if !is_asked {
            return Ok(None);
        }
        let sampling = Sampling {
            temperature: temperature.unwrap_or(suggested.temperature),
            top_k: top_k.unwrap_or(suggested.top_k),
            top_p: top_p.unwrap_or(suggested.top_p),
            min_p: min_p.unwrap_or(suggested.min_p),
            repetition_penalty: repetition_penalty.unwrap_or(suggested.repetition_penalty),
            presence_penalty: presence_penalty.unwrap_or(suggested.presence_penalty),
            seed: seed.unwrap_or_else(other_seed),
        };
        sampling.check()?;
        Ok(Some(sampling))
    }

    /// These options where `first` says nothing.
    pub fn after(&self, first: &Self) -> Self {
        Self {
            sample: first.sample || self.sample,
            temperature: first.temperature.or(self.temperature),
            top_k: first.top_k.or(self.top_k),
            top_p: first.top_p.or(self.top_p),
            min_p: first.min_p.or(self.min_p),
            repetition_penalty: first.repetition_penalty.or(self.repetition_penalty),
            presence_penalty: first.presence_penalty.or(self.presence_penalty),
            seed: first.seed.or(self.seed),
        }
    }
}

/// A seed, short enough to be typed again. The keys of the standard library's hash tables are random.
pub fn drawn() -> u64 {
    RandomState::new().build_hasher().finish() >> 32
}

/// For people: what has an effect, and how to have the same again.
pub fn describe(sampling: &Sampling) -> String {
    let Sampling { temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed } = *sampling;
    let none = Sampling::default();
    let mut text = format!("sampled: temperature {temperature}");
    for (name, value, is_on) in [
        ("top_k", top_k as f64, top_k != none.top_k),
        ("top_p", top_p, top_p != none.top_p),
        ("min_p", min_p, min_p != none.min_p),
        ("repetition_penalty", repetition_penalty, repetition_penalty != none.repetition_penalty),
        ("presence_penalty", presence_penalty, presence_penalty != none.presence_penalty),
    ] {
        if is_on {
            text += &format!(", {name} {value}");
        }
    }
    format!("{text}; --seed {seed} gives the same text again")
}
