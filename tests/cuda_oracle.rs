//! The decoder, run in every way on a GPU, real or emulated, against what was computed elsewhere for the same checkpoints. Without
//! a GPU there is nothing to test, and the tests say so.

mod common;
#[path = "common/oracle.rs"]
mod oracle;

use oracle::{OF_EACH_MODEL, REFERENCES, ROWS, hold};

/// That tokens are the same is no matter of course in BF16, but none of the roundings changes one of these: the least clear choice
/// leads by 0.05 root mean squares of its logits.
#[test]
fn every_model_gives_the_stored_logits_and_tokens_on_a_gpu() {
    if let Some(device) = common::gpu() {
        hold(&device, &REFERENCES, &ROWS[..OF_EACH_MODEL]);
    }
}

/// Emulated, all models in all ways would take more than a minute.
#[test]
fn two_models_give_them_in_every_way() {
    if let Some(device) = common::gpu() {
        let [llama3, .., speller] = REFERENCES;
        hold(&device, &[llama3, speller], &ROWS[OF_EACH_MODEL..]);
    }
}
