//! Any bits in, the same bits out, in every way of decoding; what is no packed tensor is refused, and no byte beside it is read.

use std::{array, iter};

use proptest::prelude::*;

use super::*;

fn table_of(weights: &[u16]) -> Table {
    let mut counts = [0; 256];
    count(weights, &mut counts);
    Table::new(&counts)
}

fn supported() -> impl Iterator<Item = Decoding> {
    Decoding::ALL.into_iter().filter(|decoding| decoding.is_supported())
}

/// As a tensor of one dimension, in parts of so many weights.
fn packed(weights: &[u16], part: usize) -> (Description, Vec<u8>) {
    let table = table_of(weights);
    let parts: Vec<_> = weights.chunks(part).map(|weights| Encoder::new(table).part(weights)).collect();
    let lengths = parts.iter().map(|part| part.len() as u32).collect();
    (Description { shape: vec![weights.len()], table, checksum: 0x0123, part, lengths }, parts.concat())
}

/// By every way of decoding, which agree.
fn decoded(table: Table, weights: usize, bytes: &[u8]) -> Result<Vec<u16>, Corrupt> {
    let all = supported().map(|decoding| {
        // A way that reads further than the bytes go meets the end of an allocation.
        let bytes: Box<[u8]> = bytes.into();
        let mut out = vec![0x1234; weights];
        Packed::new(table, weights, &bytes)?.decoded_by(decoding).decode(&mut out)?;
        Ok(out)
    });
    let all: Vec<_> = all.collect();
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "ways of decoding disagree");
    all.into_iter().next().unwrap()
}

fn assert_returns(table: Table, weights: &[u16]) {
    let bytes = Encoder::new(table).part(weights);
    assert!(decoded(table, weights.len(), &bytes).unwrap() == weights, "{} weights", weights.len());
}

/// Weights whose exponents are met about as often as in a trained model: the middle one of ten mostly.
fn like_a_model(count: usize, seed: u64) -> Vec<u16> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let normal = |rng: &mut fastrand::Rng| (0..12).map(|_| rng.f32()).sum::<f32>() - 6.0;
    iter::repeat_with(|| (normal(&mut rng).to_bits() >> 16) as u16).take(count).collect()
}

#[test]
fn every_length_about_a_block_returns() {
    let lengths = [0, 1, 2, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097, 8191, 8192, 8193, 12_345];
    for length in lengths {
        let weights = like_a_model(length, length as u64);
        assert_returns(table_of(&weights), &weights);
    }
}

#[test]
fn every_number_returns_whatever_the_table() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    for first in [0, 100, 243] {
        assert_returns(Table(array::from_fn(|rank| first + rank as u8)), &all);
    }
    // Exponents side by side, and each of them alone.
    let turned: Vec<u16> = all.iter().map(|number| number.rotate_left(9)).collect();
    assert_returns(table_of(&turned), &turned);
    for exponent in 0..=255u8 {
        let weights: Vec<u16> = (0..5000u32).map(|at| weight(exponent, ((at * 7919) >> 3) as u8)).collect();
        assert_returns(table_of(&weights), &weights);
        // None of them has a code.
        let other = Table(array::from_fn(|rank| exponent.wrapping_add(1 + rank as u8)));
        assert_returns(other, &weights);
    }
}

#[test]
fn each_kind_of_code_fills_a_block() {
    let table = Table(array::from_fn(|rank| 120 + rank as u8));
    for rank in 0..14 {
        let weights: Vec<u16> = (0..BLOCK).map(|at| weight(120 + rank, at as u8)).collect();
        assert_returns(table, &weights);
        // At one place of the block alone.
        for at in [0, 7, 8, 31, 32, 63, 64, 2047, 4095] {
            let mut weights = vec![weight(120, 0x81); BLOCK];
            weights[at] = weight(120 + rank, 0x7f);
            assert_returns(table, &weights);
        }
    }
}

#[test]
fn normal_weights_take_no_more_than_the_bound_says() {
    let weights = like_a_model(1 << 20, 1);
    let bytes = packed(&weights, PART).1;
    let ratio = (2 * weights.len()) as f64 / bytes.len() as f64;
    assert!(ratio > 1.49, "{ratio:.4}");
}

#[test]
fn what_is_expected_holds_weights_packed_or_as_they_are() {
    // Of a norm, of one that fills no block, and of matrices.
    for count in [1, 128, 2048, 4096, 5000, 10_000, PART + 1, 1 << 20] {
        let bytes = packed(&like_a_model(count, count as u64), PART).1.len();
        assert!(bytes.min(2 * count) <= expected_bytes(count).min(2 * count), "{bytes} bytes for {count} weights");
    }
}

#[test]
fn how_many_bytes_it_takes_is_known_from_its_exponents_but_for_rounding() {
    let narrow: Vec<u16> = (0..20_000).map(|at| weight(100 + (at % 5) as u8, at as u8)).collect();
    let all: Vec<u16> = (0..=u16::MAX).map(|number| number.wrapping_mul(40_503)).collect();
    for weights in [like_a_model(1, 1), like_a_model(3 * BLOCK + 5, 2), like_a_model(2 * PART, 3), narrow, all] {
        let mut counts = [0; 256];
        count(&weights, &mut counts);
        let (description, bytes) = packed(&weights, PART);
        let parts = description.lengths.len();
        let most = Encoder::new(description.table).most_bytes(&counts, parts) as usize;
        let rounding = weights.len().div_ceil(BLOCK) * 18 + parts * ALIGN + 2;
        assert!((bytes.len()..=bytes.len() + rounding).contains(&most), "{most} for {}", bytes.len());
    }
}

proptest! {
    #[test]
    fn any_bits_return_with_any_table(
        exponents in prop::array::uniform13(any::<u8>()),
        weights in prop::collection::vec(any::<u16>(), 0..9000),
        narrow in 0u32..8,
    ) {
        // From all exponents to two of them.
        let weights: Vec<_> = weights.iter().map(|x| weight(exponent(*x) >> narrow, rest(*x))).collect();
        assert_returns(table_of(&weights), &weights);
        assert_returns(Table(exponents), &weights);
    }

    #[test]
    fn bytes_that_changed_or_were_cut_off_give_weights_or_an_error_and_nothing_else(
        seed in any::<u64>(),
        length in 1usize..9000,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
        in_index in any::<bool>(),
        cut in any::<prop::sample::Index>(),
        cuts in any::<bool>(),
    ) {
        let weights = like_a_model(length, seed);
        let table = table_of(&weights);
        let mut bytes = Encoder::new(table).part(&weights);
        let among = if in_index { index_bytes(length) } else { bytes.len() };
        for (at, byte) in changes {
            bytes[at.index(among)] = byte;
        }
        if cuts {
            bytes.truncate(cut.index(bytes.len()));
        }
        // Each way is held against the others in there.
        let _ = decoded(table, length, &bytes);
    }
}

#[test]
fn an_index_that_disagrees_with_its_blocks_is_refused() {
    let weights = like_a_model(3 * BLOCK, 7);
    let table = table_of(&weights);
    let whole = Encoder::new(table).part(&weights);
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        decoded(table, weights.len(), &bytes).expect_err("it was refused")
    };
    // Where the second block begins, and its two numbers of escapes.
    assert_eq!(refused(&|bytes| bytes[8..12].fill(0)).block, 0);
    assert_eq!(refused(&|bytes| bytes[12] ^= 1).block, 1);
    assert_eq!(refused(&|bytes| bytes[14] ^= 1).block, 1);
    assert_eq!(refused(&|bytes| bytes.truncate(index_bytes(weights.len()) - 1)).block, 3);
    assert_eq!(refused(&|bytes| bytes.truncate(bytes.len() - 16)).block, 2);
    // A first code that becomes an escape.
    let codes = index_bytes(weights.len()) + BLOCK;
    assert_eq!(refused(&|bytes| bytes[codes] = 0xff).block, 0);
}

#[test]
fn blocks_lie_one_behind_the_other_to_the_end_of_their_part() {
    let weights = like_a_model(3 * BLOCK + 5, 3);
    let table = table_of(&weights);
    let bytes = Encoder::new(table).part(&weights);
    let part = Packed::new(table, weights.len(), &bytes).unwrap();
    let end = (0..4).fold(index_bytes(weights.len()), |end, number| end + part.block(number).unwrap().0.len());
    assert_eq!(end, bytes.len());
}

#[test]
fn a_tensor_returns_from_its_description_and_its_bytes() {
    let weights = like_a_model(3 * PART + 12_345, 9);
    let (description, mut bytes) = packed(&weights, PART / 2);
    let description =
        Description::from_json(&description.to_json()).inspect(|same| assert_eq!(*same, description)).unwrap();
    assert_eq!((description.lengths.len(), description.bytes()), (7, bytes.len()));
    let mut out = vec![0; weights.len()];
    description.parts().decode(&bytes, &mut out).unwrap();
    assert!(out == weights);
    // The third block of the second part.
    let entry = description.lengths[0] as usize + 2 * ENTRY;
    bytes[entry + 4] ^= 1;
    assert_eq!(description.parts().decode(&bytes, &mut out).unwrap_err().block, 32 + 2);
}

#[test]
fn parts_are_whole_rows_where_these_fill_whole_blocks() {
    for (shape, part) in [
        (&[3584, 3584][..], 72 * 3584),
        (&[49_152, 576], 448 * 576),
        (&[100, 28_672], 9 * 28_672),
        (&[10, 4096, 64], PART),
        // No number of rows of 4095 weights that is small enough fills whole blocks.
        (&[5000, 4095], PART),
        (&[3, 1 << 20], PART),
        (&[1_000_000], PART),
        (&[], PART),
    ] {
        assert_eq!(Description::part_of(shape), part, "{shape:?}");
    }
}

#[test]
fn a_description_that_its_tensor_cannot_have_is_refused() {
    let (good, _) = packed(&like_a_model(3 * BLOCK, 5), 2 * BLOCK);
    let refused = |from: &str, to: &str, cause: &str| {
        let text = good.to_json().replacen(from, to, 1);
        assert_ne!(text, good.to_json());
        let said = Description::from_json(&text).expect_err(&text);
        assert!(said.contains(cause), "{said}");
    };
    refused("BF16", "F32", "F32 is no type");
    refused("[12288]", "[]", "2 parts for 1 weights");
    refused("[12288]", "[0]", "shape [0] is not packed");
    refused("[12288]", "[4294967296,4294967296]", "is not packed");
    refused("[12288]", "[12288,2]", "2 parts for 24576 weights, which have 3");
    refused("\"part\":8192", "\"part\":8191", "a multiple of 4096");
    refused("\"part\":8192", "\"part\":0", "a multiple of 4096");
    refused("\"part\":8192", "\"part\":524288", "262144 at most");
    refused("0123", "012", "no checksum");
    refused("000123", "+00123", "no checksum");
    refused("\"part\"", "\"parts\"", "unknown field");
    let [first, second] = good.lengths[..] else { panic!("two parts") };
    refused(&second.to_string(), &(second + 1).to_string(), "part 1 of 4096 weights cannot be");
    refused(&second.to_string(), "5120", "part 1 of 4096 weights cannot be 5120");
    refused(&first.to_string(), "23600", "part 0 of 8192 weights cannot be 23600");
    let exponents = format!("{:?}", good.table.0).replace(' ', "");
    refused(&exponents, "[1,2,3]", "invalid length 3");
}
