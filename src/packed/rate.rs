//! How fast a core of this machine unpacks weights.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use super::{Encoder, PART, Packed, Table, count};

/// What a core unpacks, in bytes of weights per second: the best of a few tries of a part of a model's distribution, which take some
/// milliseconds once in a process.
pub(crate) fn core_rate() -> f64 {
    static RATE: OnceLock<f64> = OnceLock::new();
    *RATE.get_or_init(|| {
        // Exponents as normally distributed weights have them: each magnitude half as often as the one above, about.
        let weights: Vec<u16> = (0..PART as u32)
            .map(|at| {
                let bits = at.wrapping_mul(0x9e37_79b9);
                (0x7d - (bits >> 8 | 1 << 16).trailing_zeros() as u16) << 7 | (bits >> 25) as u16
            })
            .collect();
        let mut counts = [0; 256];
        count(&weights, &mut counts);
        let table = Table::new(&counts);
        let bytes = Encoder::new(table).part(&weights);
        let mut out = vec![0; weights.len()];
        let mut best = Duration::MAX;
        for _ in 0..8 {
            let begun = Instant::now();
            Packed::new(table, out.len(), &bytes).and_then(|part| part.decode(&mut out)).expect("it was just encoded");
            best = best.min(begun.elapsed());
        }
        size_of_val(&out[..]) as f64 / best.as_secs_f64().max(1e-9)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_unpacks_at_some_rate() {
        let rate = core_rate();
        assert!((1e7..1e12).contains(&rate), "{rate}");
    }
}
