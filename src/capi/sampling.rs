//! How a model's tokens are drawn.

use std::mem;

use super::ffi::{Grows, ffi, ls_status, write_options};
use crate::model::Sampling;

/// How tokens are drawn. Fill it with ls_sampling_init, whose values have no effect, or with ls_model_suggested_sampling, then change
/// what should differ. Both penalties come first, then the others in the order of the fields.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ls_sampling {
    /// sizeof(ls_sampling).
    pub size: usize,
    /// By which logits are divided; 0: the most likely token. By default 1.
    pub temperature: f64,
    /// Keeps the so many most likely tokens, and those as likely as the last of them; 0, the default: all.
    pub top_k: usize,
    /// Keeps the most likely tokens that together reach this probability, and at least one. From 0 to 1, by default 1.
    pub top_p: f64,
    /// Keeps tokens whose probability is so many times the largest one, or more. From 0, the default, to 1.
    pub min_p: f64,
    /// Positive logits of tokens that the sequence has are divided by it, others multiplied. Above 0, by default 1.
    pub repetition_penalty: f64,
    /// Subtracted from the logits of tokens that this call has chosen for the sequence. From -2 to 2, by default 0.
    pub presence_penalty: f64,
    /// The same seed gives the same tokens, whatever else is in the batch. By default 0.
    pub seed: u64,
}

// SAFETY: `repr(C)`, all fields of eight bytes and valid whatever their bits, the first of them the size.
unsafe impl Grows for ls_sampling {
    const FIRST: usize = mem::offset_of!(ls_sampling, seed) + size_of::<u64>();
}

impl From<Sampling> for ls_sampling {
    fn from(sampling: Sampling) -> Self {
        let Sampling { temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed } = sampling;
        let size = size_of::<Self>();
        Self { size, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed }
    }
}

impl From<ls_sampling> for Sampling {
    fn from(sampling: ls_sampling) -> Self {
        let ls_sampling { temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed, .. } = sampling;
        Self { temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed }
    }
}

/// Fills `sampling`, which is `size` bytes long (sizeof(ls_sampling)), with values that have no effect.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ls_sampling_init(sampling: *mut ls_sampling, size: usize) -> ls_status {
    // SAFETY: the caller says that so many bytes may be written.
    ffi(|| unsafe { write_options(sampling, size, "sampling", Sampling::default().into()) })
}
