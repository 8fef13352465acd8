//! Random numbers that are a function of a key and a counter: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy
//! as 1, 2, 3" (SC 2011). Nothing is kept from one draw to the next, so draws do not depend on who drew before.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What is added to the key in each round: the golden ratio, and √3 − 1.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: u32 = 10;

fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let product = |i: usize, word: u32| {
        let product = u64::from(MULTIPLIERS[i]) * u64::from(word);
        ((product >> 32) as u32, product as u32)
    };
    (0..ROUNDS).fold(counter, |[a, b, c, d], round| {
        let key = [0, 1].map(|i| key[i].wrapping_add(WEYL[i].wrapping_mul(round)));
        let ((high_a, low_a), (high_c, low_c)) = (product(0, a), product(1, c));
        [high_c ^ b ^ key[0], low_c, high_a ^ d ^ key[1], low_a]
    })
}

/// A number from 0 to below 1, one of 2^53 that are equally likely.
pub(super) fn uniform(seed: u64, sequence: u64, position: u64) -> f64 {
    let halves = |word: u64| [word as u32, (word >> 32) as u32];
    let ([a, b], [c, d]) = (halves(position), halves(sequence));
    let [low, high, ..] = philox([a, b, c, d], halves(seed));
    ((u64::from(high) << 32 | u64::from(low)) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_numbers_are_those_that_its_authors_publish() {
        // `kat_vectors` of Random123, philox4x32 with 10 rounds.
        for (counter, key, expected) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(counter, key), expected);
        }
    }

    #[test]
    fn each_of_seed_sequence_and_position_counts_with_all_its_bits() {
        let first = uniform(0, 0, 0);
        for bit in 0..64 {
            for other in [uniform(1 << bit, 0, 0), uniform(0, 1 << bit, 0), uniform(0, 0, 1 << bit)] {
                assert!((0.0..1.0).contains(&other) && other != first, "bit {bit}");
            }
        }
        let mean = (0..10_000).map(|position| uniform(5, 3, position)).sum::<f64>() / 1e4;
        assert!((mean - 0.5).abs() < 0.015, "{mean}");
    }
}
