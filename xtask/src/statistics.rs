//! Medians and quartiles.

/// The middle value, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    quartiles(values)[1]
}

/// Lower quartile, median and upper quartile, by interpolation between the two neighbours at (n + 1) / 4 and its multiples.
pub fn quartiles(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| {
        let at = (sorted.len() + 1) * quarter;
        match sorted.len() {
            0 => f64::NAN,
            1 => sorted[0],
            count => {
                let below = (at / 4).clamp(1, count - 1);
                let part = (at as f64 - 4.0 * below as f64) / 4.0;
                sorted[below - 1] * (1.0 - part) + sorted[below] * part
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_those_of_the_textbook() {
        assert_eq!(quartiles(&[4.0, 1.0, 3.0, 2.0, 7.0, 6.0, 5.0]), [2.0, 4.0, 6.0]);
        assert_eq!(quartiles(&[1.0, 2.0, 3.0, 4.0]), [1.25, 2.5, 3.75]);
        assert_eq!(quartiles(&[3.0]), [3.0; 3]);
        assert_eq!(median(&[2.0, 1.0]), 1.5);
        assert!(median(&[]).is_nan());
    }
}
