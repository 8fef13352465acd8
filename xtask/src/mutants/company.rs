//! Mutants of what keeps a sequence's bits the same in any company: how sums are cut, in which order and how they are added up, and that
//! algorithms of cuBLAS are tried.

use regex::Regex;

use super::{Built, Change, Mutant, judge, kernels, pick, replace, with_switch};
use crate::run::Failure;

const ON_CPU: &[Change] = &[
    // Stretches of keys are added up from the last to the first where threads take one each.
    (
        "src/kernels/cpu/split.rs",
        "(*partials.state(query, slot), partials.values(query, slot))",
        "(*partials.state(query, stretches.len() - 1 - slot), partials.values(query, stretches.len() - 1 - slot))",
    ),
    // Where threads take a stretch each, some come twice and others not at all.
    ("src/kernels/cpu/split.rs", "start + slot", "start + slot / 2"),
    // A page is known by the first of its tokens.
    ("src/model/pages.rs", "tokens.try_into().expect(\"a page's tokens\")", "[tokens[0]; PAGE]"),
];

const ON_GPU: &[Change] = &[
    ("src/kernels/product.rs", "differ != 0", "false"),
    // The same numbers, rounded elsewhere: by the kernel for few tokens, then by that for many.
    ("cuda/attention_decode.cu", "add_sum(sum, now[i], shares)", "fmaf(sum, shares.before, now[i] * shares.later)"),
    (
        "cuda/attention_prefill.cu",
        "add_sum(before[n].x, sums[0], shares[0])",
        "fmaf(before[n].x, shares[0].before, sums[0] * shares[0].later)",
    ),
    // Tiles begin where a query's window does, and no longer at fixed places.
    ("cuda/attention.cuh", "(tile.past + 1 - call.window) / kKeys<D> * kKeys<D>", "(tile.past + 1 - call.window)"),
];

pub fn run(pattern: &Regex) -> Result<(), Failure> {
    let on = |changes, arguments, name, environment: &[(&str, &str)]| {
        let tree = super::copy_tree()?;
        let mut mutants = Vec::new();
        replace(&tree, changes, &mut mutants)?;
        with_switch(&tree)?;
        kernels::with_switch(&tree)?;
        let mutants = pick(mutants, pattern);
        if mutants.is_empty() {
            return Ok(());
        }
        let built = Built::new(&tree, arguments, name, environment)?;
        built.passes(&[""])?;
        judge(&mutants, |mutant: &Mutant| built.failure(&[""], mutant.number))
    };
    on(ON_CPU, "--test invariance", "invariance", &[])?;
    on(ON_GPU, "--features cuda --test cuda_invariance", "cuda_invariance", &[("LAYER_STREAMER_CUDA", "emulated")])
}
