//! Attention against formulas in f64, and bits that depend neither on the company nor on how the work is split.

use std::rc::Rc;

use super::{
    super::{split::Pieces, *},
    floats,
};
use crate::{device::pool::Pool, kernels::AttentionMask};

/// Sequences of these (cached before, new) lengths, in pages of any order.
#[derive(Clone)]
struct Case {
    lengths: Vec<(usize, usize)>,
    heads: usize,
    kv_heads: usize,
    size: usize,
    mask: AttentionMask,
    q: Vec<f32>,
    /// So many for each sequence.
    pages: Vec<u32>,
    width: usize,
    keys: Rc<[f32]>,
    values: Rc<[f32]>,
}

/// A head of a token: its number among all, and where it lies.
struct Query {
    number: usize,
    sequence: usize,
    place: usize,
    head: usize,
}

impl Case {
    fn random(lengths: &[(usize, usize)], [heads, kv_heads, size]: [usize; 3], mask: AttentionMask) -> Self {
        let mut rng = fastrand::Rng::new();
        let width = lengths.iter().map(|(before, new)| before + new).max().unwrap().div_ceil(PAGE);
        let mut pages: Vec<u32> = (0..(lengths.len() * width) as u32).collect();
        rng.shuffle(&mut pages);
        let queries = lengths.iter().map(|(_, new)| new).sum::<usize>() * heads;
        let cached = pages.len() * kv_heads * PAGE;
        let [q, keys, values] = [queries, cached, cached].map(|count| floats(&mut rng, count * size));
        let (keys, values) = (keys.into(), values.into());
        Self { lengths: lengths.to_vec(), heads, kv_heads, size, mask, q, pages, width, keys, values }
    }

    /// Calls `f` with the pieces, and returns what they wrote, query by query.
    fn compute(&self, vectors: Vectors, f: impl FnOnce(&Pieces<'_>)) -> Vec<Vec<u32>> {
        let mut offsets = vec![0];
        self.lengths.iter().for_each(|(_, new)| offsets.push(offsets.last().unwrap() + *new as u32));
        let lens: Vec<u32> = self.lengths.iter().map(|(before, new)| (before + new) as u32).collect();
        let mut out = vec![f32::NAN; self.q.len()];
        f(&Pieces {
            q: &self.q,
            keys: &self.keys,
            values: &self.values,
            mask: self.mask,
            out: Parts::new(&mut out),
            sequences: Sequences { offsets: &offsets, lens: &lens, pages: &self.pages, width: self.width },
            heads: self.heads,
            kv_heads: self.kv_heads,
            size: self.size,
            vectors,
        });
        out.chunks(self.size).map(|query| query.iter().map(|x| x.to_bits()).collect()).collect()
    }

    fn queries(&self) -> Vec<Query> {
        let mut queries = Vec::new();
        for (sequence, &(before, new)) in self.lengths.iter().enumerate() {
            for (place, head) in (before..before + new).flat_map(|place| (0..self.heads).map(move |head| (place, head)))
            {
                queries.push(Query { number: queries.len(), sequence, place, head });
            }
        }
        queries
    }

    /// The query's token, as the only one of a batch.
    fn alone(&self, query: &Query) -> Self {
        let width = self.heads * self.size;
        Self {
            lengths: vec![(query.place, 1)],
            q: self.q[query.number / self.heads * width..][..width].to_vec(),
            pages: self.pages[query.sequence * self.width..][..self.width].to_vec(),
            ..self.clone()
        }
    }

    /// By the formula.
    fn exact(&self, query: &Query) -> Vec<f64> {
        let AttentionMask { scale, window, soft_cap } = self.mask;
        let (pages, kv_head) = (&self.pages[query.sequence * self.width..], query.head / (self.heads / self.kv_heads));
        let end = query.place + 1;
        let places = window.map_or(0, |window| end.saturating_sub(window))..end;
        let (mut sum, mut mixed) = (0.0, vec![0.0; self.size]);
        for place in places {
            let page = pages[place / PAGE] as usize;
            let at = ((page * self.kv_heads + kv_head) * PAGE + place % PAGE) * self.size;
            let pairs = self.q[query.number * self.size..].iter().zip(&self.keys[at..][..self.size]);
            let score = pairs.map(|(q, key)| f64::from(*q) * f64::from(*key)).sum::<f64>() * f64::from(scale);
            let cap = |cap: f32| f64::from(cap) * (score / f64::from(cap)).tanh();
            let weight = soft_cap.map_or(score, cap).exp();
            sum += weight;
            mixed.iter_mut().zip(&self.values[at..]).for_each(|(mixed, value)| *mixed += weight * f64::from(*value));
        }
        mixed.into_iter().map(|mixed| mixed / sum).collect()
    }
}

fn mask(window: Option<usize>, soft_cap: Option<f32>) -> AttentionMask {
    AttentionMask { scale: 1.5, window, soft_cap }
}

/// Each token is alone, in company, and split in every way: always with the same bits.
fn is_right_however_it_is_split(case: &Case) {
    let pools = [0, 1, 3].map(|threads| Pool::start(threads).unwrap());
    let queries: Vec<_> =
        case.queries().into_iter().map(|query| (case.alone(&query), case.exact(&query), query)).collect();
    for vectors in Vectors::all() {
        let whole = case.compute(vectors, |pieces| pieces.here());
        for (alone, exact, query) in &queries {
            let what = || format!("{vectors:?}, {:?}, place {}, head {}", case.mask, query.place, query.head);
            let got = &whole[query.number];
            for (got, exact) in got.iter().zip(exact) {
                let off = (f64::from(f32::from_bits(*got)) - exact).abs();
                assert!(off < 4e-6, "{}: {off}", what());
            }
            let alone = alone.compute(vectors, |pieces| pieces.here());
            assert!(alone[query.head] == *got, "{}: other bits alone", what());
        }
        for pool in &pools {
            assert!(case.compute(vectors, |pieces| pieces.whole(pool)) == whole, "{vectors:?}, {:?}", case.mask);
            assert!(case.compute(vectors, |pieces| pieces.deal(pool)) == whole, "{vectors:?}, {:?}", case.mask);
            // Room for one stretch of each query, for two, and for all; what it holds from before must not matter.
            for stretches in [1, 2, 100] {
                let mut room = vec![f32::NAN; case.q.len() / case.size * (16 + stretches * (case.size + 17))];
                let split = case.compute(vectors, |pieces| pieces.split(pool, &mut room));
                let threads = pool.size();
                assert!(split == whole, "{vectors:?}, {:?}: other bits by {threads} threads, {stretches}", case.mask);
            }
        }
    }
}

#[test]
fn every_set_of_instructions_attends_alike_and_bits_do_not_depend_on_the_company_nor_on_how_it_is_split() {
    // Tokens on both sides of where stretches end, and windows that begin within one, at its end and before its begin.
    for mask in [
        mask(None, None),
        mask(None, Some(0.7)),
        mask(Some(1), None),
        mask(Some(70), Some(0.7)),
        mask(Some(512), None),
        mask(Some(700), None),
    ] {
        is_right_however_it_is_split(&Case::random(&[(1590, 20)], [3, 1, 40], mask));
        is_right_however_it_is_split(&Case::random(
            &[(1015, 13), (0, 0), (0, 1), (1100, 1), (511, 2)],
            [4, 2, 5],
            mask,
        ));
    }
}

#[test]
fn heads_that_are_too_large_for_stretches_attend_alike() {
    is_right_however_it_is_split(&Case::random(&[(700, 5)], [2, 2, 256], mask(None, None)));
    is_right_however_it_is_split(&Case::random(&[(700, 5)], [2, 2, 257], mask(None, None)));
}

/// Zeros keep their signs, too: sums that end as -0, before a stretch of which the query sees nothing, and after one.
#[test]
fn a_stretch_that_is_not_seen_changes_no_bit() {
    let mut case = Case::random(&[(1020, 8)], [1, 1, 3], mask(Some(2), None));
    case.q.fill(1.0);
    // In order, so that places are those in the cache of the one head.
    case.pages.sort_unstable();
    let [keys, values] = [&mut case.keys, &mut case.values].map(|of| Rc::get_mut(of).unwrap());
    // Each key weighs less than half of the next, so that the smallest number by its weight is a zero.
    keys.iter_mut().enumerate().for_each(|(at, key)| *key = (at / 3) as f32 - 1000.0);
    values.fill(-0.0);
    [1022, 1024].into_iter().for_each(|place| values[place * 3..][..3].fill(-f32::from_bits(1)));
    is_right_however_it_is_split(&case);
}

#[test]
fn few_pieces_of_long_contexts_are_split_if_there_is_room() {
    let splits = |lengths: &[(usize, usize)], threads, room| {
        let case = Case::random(lengths, [14, 2, 8], mask(None, None));
        let mut splits = false;
        case.compute(Vectors::Plain, |pieces| splits = pieces.splits(threads, room));
        splits
    };
    let much = 1 << 18;
    assert!(splits(&[(8191, 1)], 16, much) && splits(&[(600, 1), (1, 1)], 16, much) && splits(&[(2000, 8)], 16, much));
    assert!(!splits(&[(8191, 1)], 1, much), "nobody to share with");
    assert!(!splits(&[(511, 1)], 16, much), "one stretch");
    assert!(!splits(&[(0, 600)], 16, much), "pieces enough");
    // Of each of 14 queries a line for what is merged, and a line for each stretch: all 16, or none.
    assert!(splits(&[(8191, 1)], 16, 14 * 16 * 17) && !splits(&[(8191, 1)], 16, 14 * 16 * 16));
    // Two pieces of each of 4 stretches are enough for two threads.
    assert!(splits(&[(8191, 1)], 2, 14 * 16 * 5) && !splits(&[(8191, 1)], 2, 14 * 16 * 5 - 1));
    assert!(!splits(&[(8191, 1)], 16, 0) && !splits(&[(600, 1)], 16, 0), "no room");
}
