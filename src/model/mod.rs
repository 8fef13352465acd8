//! Decoder-only models on top of the streamer and the kernels.
//!
//! A [`Model`] is what a folder says, checked; a [`Decoder`] holds the memory and computes; [`Decoder::generate`] decodes,
//! greedily or by a [`Sampler`]. Families of models differ by a row of a table in `config/families.rs`.

mod batch;
mod buffers;
mod config;
mod decoder;
mod embedding;
mod exchange;
mod extras;
mod fit;
mod forward;
mod generate;
mod head;
mod layer;
mod logits;
mod pages;
mod renewal;
mod sampling;
mod tables;
mod weights;
mod workspace;

pub use batch::Sequence;
pub use buffers::Cache;
pub use config::{ModelConfig, Multipliers, Rope, SoftCaps, SuggestedSampling};
pub use decoder::Decoder;
pub use fit::Fit;
pub use generate::Choice;
pub use sampling::{Sampler, Sampling};
pub use tables::Tables;
pub use weights::Model;
