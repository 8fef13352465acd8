//! The same promise on a GPU: a sequence's logits are the same bits alone and in any company.

mod common;
#[path = "common/company.rs"]
mod company;

use company::{check_companies, check_company};
use support::cases;

#[test]
fn on_a_gpu_a_sequence_has_the_same_bits_alone_and_in_any_company() {
    let Some(device) = common::gpu() else { return };
    check_companies(&device, cases(20), 90);
}

#[test]
fn on_a_gpu_so_has_one_with_a_context_of_several_parts() {
    let Some(device) = common::gpu() else { return };
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    check_company(&device, "qwen2-tied", 3, 700, &mut fastrand::Rng::with_seed(seed));
}
