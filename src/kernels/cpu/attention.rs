//! Attention over the cache, in blocks of keys with a running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al.
//! 2022, arXiv:2205.14135). A piece is some queries of the heads that share a key and value head, which read its cache together.
//!
//! A query's result does not depend on the others: blocks begin at multiples of [`KEYS`], and keys that it does not see weigh
//! nothing.

use std::ops::Range;

use super::{
    CheckedSequence, Parts,
    lanes::{Lanes, Work},
    math::{exp, tanh},
    product::dots,
    rows::{put, some},
};
use crate::kernels::AttentionMask;

/// Keys of a block.
const KEYS: usize = 64;

/// Queries of a piece: a multiple of any tile's.
pub(super) const QUERIES: usize = 24;

/// Some queries of one sequence and one key and value head.
pub(super) struct Queries<'a> {
    pub(super) q: &'a [f32],
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    pub(super) mask: AttentionMask,
    pub(super) out: Parts,
    pub(super) sequence: &'a CheckedSequence,
    /// The first query head of those that share the key head, and how many do.
    pub(super) heads: (usize, usize),
    /// Query heads of a token.
    pub(super) all_heads: usize,
    pub(super) size: usize,
    /// Of the sequence's tokens and the heads, one after the other; at most [`QUERIES`].
    pub(super) queries: Range<usize>,
}

/// What there is of a query after some blocks, beside the sum of values in `out`: all relative to the greatest score.
#[derive(Clone, Copy)]
struct State {
    greatest: f32,
    sum: f32,
    /// What the last block multiplied the sums by.
    factor: f32,
}

impl Work for Queries<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let count = self.queries.len();
        // Finite, so that a block without a key for a query leaves it as it is.
        let mut states = [State { greatest: f32::MIN, sum: 0.0, factor: 1.0 }; QUERIES];
        let mut scores = [[0.0f32; KEYS]; QUERIES];
        (0..count).for_each(|query| self.out(query).fill(0.0));
        let (first, last) = (self.sees(0).start, self.sees(count - 1).end);
        for start in (first / KEYS * KEYS..last).step_by(KEYS) {
            let places = start.max(first)..last.min(start + KEYS);
            self.scores::<L>(start, places.clone(), &mut scores);
            for (query, (scores, state)) in scores.iter_mut().zip(&mut states).take(count).enumerate() {
                self.weigh::<L>(query, start, scores, state);
            }
            self.add_values::<L>(start, places, &scores, &states);
        }
        for (query, state) in states.iter().take(count).enumerate() {
            self.out(query).iter_mut().for_each(|out| *out /= state.sum);
        }
    }
}

impl Queries<'_> {
    /// Where the query's head begins in `q` and `out`.
    fn at(&self, query: usize) -> usize {
        let (query, (first, group)) = (self.queries.start + query, self.heads);
        ((self.sequence.tokens.start + query / group) * self.all_heads + first + query % group) * self.size
    }

    #[allow(clippy::mut_from_ref, reason = "a piece's queries have this part of the output to themselves")]
    fn out(&self, query: usize) -> &mut [f32] {
        // SAFETY: `at` is a head of the output, and no other piece has this query.
        unsafe { self.out.slice(self.at(query), self.size) }
    }

    /// The places in the cache that the query sees.
    fn sees(&self, query: usize) -> Range<usize> {
        let CheckedSequence { tokens, kv_len, .. } = self.sequence;
        let end = kv_len - tokens.len() + (self.queries.start + query) / self.heads.1 + 1;
        self.mask.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// The scaled products with the keys at `places`, of the block that begins at `start`.
    #[inline(always)]
    fn scores<L: Lanes>(&self, start: usize, places: Range<usize>, scores: &mut [[f32; KEYS]; QUERIES]) {
        for query in (0..self.queries.len()).step_by(L::TOKENS) {
            let mut place = places.start;
            while place < places.end {
                let (rows, column) = (if place + 4 <= places.end { 4 } else { 1 }, place - start);
                match (rows, (self.queries.len() - query).min(L::TOKENS)) {
                    (4, 6) => self.some_scores::<L, 4, 6>(query, place, column, scores),
                    (4, 5) => self.some_scores::<L, 4, 5>(query, place, column, scores),
                    (4, 4) => self.some_scores::<L, 4, 4>(query, place, column, scores),
                    (4, 3) => self.some_scores::<L, 4, 3>(query, place, column, scores),
                    (4, 2) => self.some_scores::<L, 4, 2>(query, place, column, scores),
                    (4, _) => self.some_scores::<L, 4, 1>(query, place, column, scores),
                    (_, few) => {
                        (0..few).for_each(|more| self.some_scores::<L, 1, 1>(query + more, place, column, scores));
                    }
                }
                place += rows;
            }
        }
    }

    #[inline(always)]
    fn some_scores<L: Lanes, const R: usize, const T: usize>(
        &self,
        query: usize,
        place: usize,
        column: usize,
        scores: &mut [[f32; KEYS]; QUERIES],
    ) {
        let mut queries = [self.q.as_ptr(); T];
        for (more, at) in queries.iter_mut().enumerate() {
            *at = self.q[self.at(query + more)..][..self.size].as_ptr();
        }
        let keys = &self.keys[place * self.size..][..R * self.size];
        // SAFETY: each query has `size` elements, and so has each of R keys.
        let products = unsafe {
            let ahead = keys.as_ptr().wrapping_add(8 * self.size);
            dots::<L, f32, R, T>(queries, keys.as_ptr(), self.size, self.size, ahead)
        };
        for (scores, products) in scores[query..].iter_mut().zip(&products) {
            for (score, product) in scores[column..].iter_mut().zip(products) {
                *score = product * self.mask.scale;
            }
        }
    }

    /// Makes the query's scores of a block weights, relative to the greatest score so far.
    #[inline(always)]
    fn weigh<L: Lanes>(&self, query: usize, start: usize, scores: &mut [f32; KEYS], state: &mut State) {
        let sees = self.sees(query);
        if let Some(cap) = self.mask.soft_cap {
            each::<L>(scores, |score| L::splat(cap).times(tanh(score.over(L::splat(cap)))));
        }
        scores[..sees.start.saturating_sub(start).min(KEYS)].fill(f32::NEG_INFINITY);
        scores[sees.end.saturating_sub(start).min(KEYS)..].fill(f32::NEG_INFINITY);
        let mut greatest = L::splat(state.greatest);
        each::<L>(scores, |score| {
            greatest = greatest.max(score);
            score
        });
        let greatest = greatest.greatest();
        let mut sum = L::splat(0.0);
        each::<L>(scores, |score| {
            let weight = exp(score.minus(L::splat(greatest)));
            sum = sum.plus(weight);
            weight
        });
        state.factor = exp(L::splat(state.greatest - greatest)).array()[0];
        state.sum = state.sum * state.factor + sum.sum();
        state.greatest = greatest;
    }

    /// Adds the values at `places`, by their weights, to what there is.
    #[inline(always)]
    fn add_values<L: Lanes>(
        &self,
        start: usize,
        places: Range<usize>,
        weights: &[[f32; KEYS]; QUERIES],
        states: &[State; QUERIES],
    ) {
        let weights = |query: usize| &weights[query][places.start - start..places.end - start];
        for query in (0..self.queries.len()).step_by(L::TOKENS) {
            let count = (self.queries.len() - query).min(L::TOKENS);
            let mut column = 0;
            while column < self.size {
                let wide = column + 4 * L::COUNT <= self.size;
                match (wide, count) {
                    (true, 6) => self.mix::<L, 6, 4>(query, column, places.start, weights, states),
                    (true, 5) => self.mix::<L, 5, 4>(query, column, places.start, weights, states),
                    (true, 4) => self.mix::<L, 4, 4>(query, column, places.start, weights, states),
                    (true, 3) => self.mix::<L, 3, 4>(query, column, places.start, weights, states),
                    (true, 2) => self.mix::<L, 2, 4>(query, column, places.start, weights, states),
                    (true, _) => self.mix::<L, 1, 4>(query, column, places.start, weights, states),
                    (false, _) => (query..query + count)
                        .for_each(|query| self.mix::<L, 1, 1>(query, column, places.start, weights, states)),
                }
                column += if wide { 4 * L::COUNT } else { L::COUNT };
            }
        }
    }

    /// V vectors of the values' columns, for Q queries; the last vector may be a part of one.
    #[inline(always)]
    fn mix<'w, L: Lanes, const Q: usize, const V: usize>(
        &self,
        query: usize,
        column: usize,
        place: usize,
        weights: impl Fn(usize) -> &'w [f32],
        states: &[State; QUERIES],
    ) {
        let (size, width) = (self.size, (self.size - column).min(V * L::COUNT));
        let mut sums = [[L::splat(0.0); V]; Q];
        for (more, sums) in sums.iter_mut().enumerate() {
            let (out, factor) = (self.out(query + more), L::splat(states[query + more].factor));
            for (part, sum) in sums.iter_mut().enumerate() {
                // SAFETY: so many elements of the head are left from here on.
                *sum = unsafe { part_of::<L, V>(out.as_ptr().add(column + part * L::COUNT), width) };
                *sum = sum.times(factor);
            }
        }
        let (count, mut rows) = (weights(query).len(), [weights(query).as_ptr(); Q]);
        for (more, row) in rows.iter_mut().enumerate() {
            *row = weights(query + more)[..count].as_ptr();
        }
        let values = &self.values[place * size..][..count * size][column..];
        // SAFETY: each query has `count` weights, and so many rows of `size` elements have `width` left from this column on.
        let sums = unsafe { mixed::<L, Q, V>(sums, rows, values.as_ptr(), size, count, width) };
        for (more, sums) in sums.iter().enumerate() {
            let out = self.out(query + more);
            for (part, sum) in sums.iter().enumerate() {
                let (at, left) = (column + part * L::COUNT, width - part * L::COUNT);
                // SAFETY: so many elements of the head are left from here on, and no other piece has this query.
                unsafe { put(*sum, out.as_mut_ptr().add(at), left) };
            }
        }
    }
}

/// `sums` and, added to them, `count` rows of values by each query's weights.
///
/// # Safety
/// The weights lie there, and the rows, which are `size` elements apart, have V vectors, or `width` elements if V is one.
#[inline(always)]
unsafe fn mixed<L: Lanes, const Q: usize, const V: usize>(
    mut sums: [[L; V]; Q],
    weights: [*const f32; Q],
    values: *const f32,
    size: usize,
    count: usize,
    width: usize,
) -> [[L; V]; Q] {
    for at in 0..count {
        let mut vectors = [L::splat(0.0); V];
        for (part, vector) in vectors.iter_mut().enumerate() {
            // SAFETY: the caller promises the rows.
            *vector = unsafe { part_of::<L, V>(values.add(at * size + part * L::COUNT), width) };
        }
        for (weights, sums) in weights.iter().zip(&mut sums) {
            // SAFETY: the caller promises the weights.
            let weight = L::splat(unsafe { *weights.add(at) });
            for (sum, vector) in sums.iter_mut().zip(&vectors) {
                *sum = weight.times_plus(*vector, *sum);
            }
        }
    }
    sums
}

/// A vector of one of V, or what is `left` of it and zeros: several are always whole.
///
/// # Safety
/// A vector's elements lie there, or `left` if V is one.
#[inline(always)]
unsafe fn part_of<L: Lanes, const V: usize>(at: *const f32, left: usize) -> L {
    // SAFETY: the caller promises the elements.
    unsafe { if V > 1 { L::load(at) } else { some(at, left) } }
}

/// `x = f(x)`, vector by vector.
#[inline(always)]
fn each<L: Lanes>(x: &mut [f32; KEYS], mut f: impl FnMut(L) -> L) {
    const { assert!(KEYS.is_multiple_of(L::COUNT)) };
    for part in x.chunks_exact_mut(L::COUNT) {
        // SAFETY: a chunk is a vector.
        unsafe { f(L::load(part.as_ptr())).store(part.as_mut_ptr()) };
    }
}
