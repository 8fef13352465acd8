//! Judging: from windows to figures, and whether to trust them.

use crate::plan::Bandwidths;

/// A round of a probe: the rates of its windows in bytes per second, and what disturbed it, as far as the kernel tells.
pub(super) struct ProbeRound {
    pub(super) disk: Vec<f64>,
    pub(super) copy: Vec<f64>,
    pub(super) disturbed: Option<String>,
}

/// What a probe found.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Judgement {
    pub(super) bandwidths: Bandwidths,
    pub(super) spread: Bandwidths,
    pub(super) disturbed: Option<String>,
}

/// Windows agree where the fastest is at most so many times as fast as the slowest of them.
const AGREE: f64 = 1.25;

/// So many windows must agree to be believed (or a quarter of all, if that is more): a single fast one may be a cache's.
const ENOUGH: usize = 3;

/// The largest spread of a figure that was not disturbed.
const CALM: f64 = 0.15;

/// Contention only ever lowers a rate, so the figure is that of the fastest windows that agree, out of the rounds in which
/// nothing disturbed, if there are any.
pub(super) fn judge(rounds: &[ProbeRound]) -> Judgement {
    let calm: Vec<_> = rounds.iter().filter(|round| round.disturbed.is_none()).collect();
    let rounds = if calm.is_empty() { rounds.iter().collect() } else { calm };
    let pool = |link: fn(&ProbeRound) -> &[f64]| figure(rounds.iter().flat_map(|round| link(round)).copied().collect());
    let (disk, copy) = (pool(|round| &round.disk), pool(|round| &round.copy));
    let mut causes: Vec<_> = rounds.last().and_then(|round| round.disturbed.clone()).into_iter().collect();
    for (link, figure) in [("reads from disk", &disk), ("copies to the device", &copy)] {
        if figure.spread > CALM {
            let [slowest, fastest] = figure.range.map(|rate| rate / 1e9);
            causes.push(format!("{link} gave anything from {slowest:.2} to {fastest:.2} GB/s"));
        }
    }
    Judgement {
        bandwidths: Bandwidths { disk: disk.rate, copy: copy.rate },
        spread: Bandwidths { disk: disk.spread, copy: copy.spread },
        disturbed: (!causes.is_empty()).then(|| causes.join(", ")),
    }
}

struct Figure {
    rate: f64,
    /// Median distance of the windows from the rate, relative to it.
    spread: f64,
    /// The slowest and the fastest window.
    range: [f64; 2],
}

/// `rates`: at least one.
fn figure(mut rates: Vec<f64>) -> Figure {
    rates.sort_by(|a, b| b.total_cmp(a));
    let enough = ENOUGH.max(rates.len().div_ceil(4)).min(rates.len());
    let agreeing = (0..rates.len()).map(|first| {
        let count = rates[first..].iter().take_while(|&&rate| rate >= rates[first] / AGREE).count();
        &rates[first..first + count]
    });
    let rate = median(agreeing.into_iter().find(|group| group.len() >= enough).unwrap_or(&rates));
    let mut distances: Vec<f64> = rates.iter().map(|other| (other / rate - 1.0).abs()).collect();
    distances.sort_by(f64::total_cmp);
    Figure { rate, spread: median(&distances), range: [rates[rates.len() - 1], rates[0]] }
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COPY: [f64; 5] = [10.1e9, 9.9e9, 10.0e9, 10.2e9, 9.8e9];

    fn round(disk: &[f64], disturbed: Option<&str>) -> ProbeRound {
        let disk = disk.iter().map(|gigabytes| gigabytes * 1e9).collect();
        ProbeRound { disk, copy: COPY.to_vec(), disturbed: disturbed.map(str::to_owned) }
    }

    fn found(rounds: &[ProbeRound]) -> (f64, Option<String>) {
        let Judgement { bandwidths, spread, disturbed } = judge(rounds);
        assert!((bandwidths.copy / 10e9 - 1.0).abs() < 0.02 && spread.copy < 0.02, "{bandwidths:?} {spread:?}");
        (bandwidths.disk / 1e9, disturbed)
    }

    #[test]
    fn calm_windows_give_their_median() {
        let (rate, disturbed) = found(&[round(&[2.5, 2.7, 2.6, 2.4, 2.65, 2.55, 2.6], None)]);
        assert!((2.5..=2.65).contains(&rate) && disturbed.is_none(), "{rate} {disturbed:?}");
    }

    #[test]
    fn a_single_window_that_was_stolen_or_came_from_a_cache_changes_nothing() {
        for odd in [0.3, 9.0] {
            let (rate, disturbed) = found(&[round(&[2.5, 2.6, odd, 2.55, 2.6, 2.5, 2.55], None)]);
            assert!((2.5..=2.6).contains(&rate) && disturbed.is_none(), "{odd}: {rate} {disturbed:?}");
        }
    }

    #[test]
    fn where_half_of_the_windows_are_slow_the_fast_ones_count_and_it_is_disturbed() {
        let mixed = || round(&[2.6, 0.5, 2.5, 0.6, 2.55, 0.9, 2.6, 0.5], None);
        let (rate, disturbed) = found(&[mixed()]);
        assert!((2.5..=2.6).contains(&rate), "{rate}");
        let said = disturbed.unwrap();
        assert!(said.contains("reads from disk gave anything from 0.50 to 2.60 GB/s"), "{said}");
        assert!(!said.contains("copies"), "{said}");
        // A calm second round is enough.
        let calm = || round(&[2.5, 2.6, 2.55, 2.6, 2.5, 2.45, 2.55], None);
        let (rate, disturbed) = found(&[mixed(), calm()]);
        assert!((2.45..=2.6).contains(&rate) && disturbed.is_none(), "{rate} {disturbed:?}");
    }

    #[test]
    fn windows_that_never_agree_are_disturbed() {
        let (rate, disturbed) = found(&[round(&[0.4, 0.9, 1.4, 2.0, 2.7], None)]);
        assert!((0.9..=2.0).contains(&rate) && disturbed.is_some(), "{rate} {disturbed:?}");
    }

    #[test]
    fn rounds_in_which_others_had_the_machine_count_only_where_there_is_no_other() {
        let stolen = || round(&[0.52, 0.51, 0.53, 0.52, 0.52], Some("the hypervisor took 40 %"));
        let (rate, disturbed) = found(&[stolen()]);
        assert!((0.51..=0.53).contains(&rate), "{rate}");
        assert_eq!(disturbed.as_deref(), Some("the hypervisor took 40 %"));
        let (rate, disturbed) = found(&[stolen(), round(&[2.5, 2.6, 2.55], None)]);
        assert!((2.5..=2.6).contains(&rate) && disturbed.is_none(), "{rate} {disturbed:?}");
        // Of disturbed rounds the fastest windows are nearest to the truth.
        let (rate, disturbed) = found(&[stolen(), round(&[1.5, 1.6, 1.55], Some("others"))]);
        assert!((1.5..=1.6).contains(&rate) && disturbed.is_some(), "{rate} {disturbed:?}");
    }

    #[test]
    fn one_window_is_a_figure_too() {
        assert_eq!(found(&[round(&[0.02], None)]), (0.02, None));
    }
}
