//! What is fastest: the one comparison of ways to run, whether their time is forecast, hoped for or measured.

use std::cmp::Ordering;

/// What a way to run costs. Less is better: less time, and of equal times less of the rest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Seconds of a pass.
    pub(crate) seconds: f64,
    /// What decides where these are equal: seconds that links are busy, say, or bytes of slots.
    pub(crate) burden: f64,
}

impl Cost {
    /// Of a time alone.
    #[cfg(feature = "tuner")]
    pub(crate) fn of_seconds(seconds: f64) -> Self {
        Self { seconds, burden: 0.0 }
    }

    /// What is no number is as bad as can be.
    fn key(self) -> [f64; 2] {
        [self.seconds, self.burden].map(|value| if value.is_nan() { f64::INFINITY } else { value })
    }
}

impl Ord for Cost {
    fn cmp(&self, other: &Self) -> Ordering {
        let ([seconds, burden], [others_seconds, others_burden]) = (self.key(), other.key());
        seconds.total_cmp(&others_seconds).then(burden.total_cmp(&others_burden))
    }
}

impl PartialOrd for Cost {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Cost {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Cost {}

/// The fastest, the first of equals. Times that differ from the least by no more than this share of it count as equal.
pub(crate) fn fastest<T>(ways: impl IntoIterator<Item = (Cost, T)>, alike: f64) -> Option<T> {
    let ways: Vec<_> = ways.into_iter().collect();
    let [least, _] = ways.iter().map(|(cost, _)| *cost).min()?.key();
    let near = ways.into_iter().filter(|(cost, _)| cost.key()[0] <= least * (1.0 + alike));
    let equal = near.map(|(cost, way)| (Cost { seconds: 0.0, ..cost }, way));
    equal.min_by_key(|(cost, _)| *cost).map(|(_, way)| way)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_time_comes_first_then_less_of_the_rest_then_what_came_first() {
        let found = |ways: &[(f64, f64)], alike| {
            let ways = ways.iter().enumerate().map(|(number, &(seconds, burden))| (Cost { seconds, burden }, number));
            fastest(ways, alike)
        };
        assert_eq!(found(&[], 0.0), None);
        assert_eq!(found(&[(2.0, 1.0), (1.0, 9.0), (1.001, 0.0)], 0.0), Some(1));
        assert_eq!(found(&[(2.0, 1.0), (1.0, 9.0), (1.001, 0.0)], 0.01), Some(2));
        assert_eq!(found(&[(1.0, 3.0), (1.0, 2.0), (1.0, 2.0)], 0.0), Some(1));
        // Nothing is chosen by what is no number while there is something else.
        assert_eq!(found(&[(f64::NAN, 0.0), (-f64::NAN, 0.0), (5.0, 7.0)], 0.0), Some(2));
        assert_eq!(found(&[(f64::NAN, 1.0), (f64::INFINITY, 0.0)], 0.0), Some(1));
    }
}
