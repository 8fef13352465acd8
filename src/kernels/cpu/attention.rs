//! Attention over the cache, in blocks of keys with a running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al.
//! 2022, arXiv:2205.14135). A piece is some queries of the heads that share a key and value head, which read its cache together.
//!
//! Keys are taken in stretches, each with a softmax of its own. Their results are merged in ascending order: by the piece that
//! goes over all of them, or in the end, where each stretch is a piece ([`split`](super::split)).
//!
//! A query's result depends neither on the others nor on whether it was split: stretches and blocks begin at multiples of their
//! lengths, and keys that it does not see weigh nothing.
//!
//! Loops over vectors have no closures here: of a piece this long the compiler leaves them where they are, without its instructions.

use std::{array, mem::MaybeUninit, ops::Range, ptr, slice};

use super::{
    CheckedSequence, Parts,
    lanes::{Lanes, Work},
    math::{exp, tanh},
    product::dots,
    rows::{put, some},
    split::Partials,
};
use crate::kernels::{AttentionMask, PAGE};

/// Keys of a block, which lies in one page.
const KEYS: usize = 64;
const _: () = assert!(PAGE.is_multiple_of(KEYS));

/// Queries of a piece: a multiple of any tile's.
pub(super) const QUERIES: usize = 24;

/// Keys of a stretch: whole blocks.
const STRETCH: usize = 512;

/// The largest heads of which a piece has room for the sums of another stretch.
const WIDEST: usize = 256;

/// Keys of a stretch for heads of `size`: all that there are for heads larger than models have.
pub(super) fn stretch(size: usize) -> usize {
    if size <= WIDEST { STRETCH } else { usize::MAX }
}

/// Where results go.
#[derive(Clone, Copy)]
pub(super) enum To<'a> {
    /// Those of all stretches, merged, to the output.
    Out(Parts),
    /// What one stretch gives, to its slot.
    Slot { partials: &'a Partials, stretch: usize, slot: usize },
}

/// Some queries of one sequence and one key and value head.
pub(super) struct Queries<'a> {
    pub(super) q: &'a [f32],
    /// Those of all pages, and so are `values`.
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    pub(super) mask: AttentionMask,
    pub(super) to: To<'a>,
    pub(super) sequence: &'a CheckedSequence<'a>,
    /// The key head, and how many a page has.
    pub(super) kv_head: (usize, usize),
    /// The first query head of those that share the key head, and how many do.
    pub(super) heads: (usize, usize),
    /// Query heads of a token.
    pub(super) all_heads: usize,
    pub(super) size: usize,
    /// Of the sequence's tokens and the heads, one after the other; at most [`QUERIES`].
    pub(super) queries: Range<usize>,
}

/// What there is of a query after some keys, beside the sum of their values: all relative to the greatest score.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct State {
    pub(super) greatest: f32,
    pub(super) sum: f32,
}

impl State {
    /// No keys. Finite, so that a block without a key for a query leaves it as it is.
    pub(super) const NONE: Self = Self { greatest: f32::MIN, sum: 0.0 };

    /// Merges what a later stretch gave into this, and its sums of values into `values`.
    #[inline(always)]
    pub(super) fn merge<L: Lanes>(&mut self, values: &mut [f32], later: Self, later_values: &[f32]) {
        // A stretch of which the query sees nothing changes no bit, not even the sign of a zero.
        if later.sum == 0.0 {
            return;
        }
        if self.sum == 0.0 {
            values.copy_from_slice(later_values);
            *self = later;
            return;
        }
        let greatest = if self.greatest > later.greatest { self.greatest } else { later.greatest };
        let factor = exp(L::splat(self.greatest - greatest));
        let later_factor = exp(L::splat(later.greatest - greatest));
        for (values, later) in values.chunks_mut(L::COUNT).zip(later_values.chunks(L::COUNT)) {
            // SAFETY: both chunks have so many elements, a vector's at most, and this one is borrowed mutably.
            unsafe {
                let value: L = some(values.as_ptr(), values.len());
                let later: L = some(later.as_ptr(), values.len());
                put(later.times_plus(later_factor, value.times(factor)), values.as_mut_ptr(), values.len());
            }
        }
        let [factor, later_factor] = [factor, later_factor].map(|factor| factor.array()[0]);
        *self = Self { greatest, sum: self.sum * factor + later.sum * later_factor };
    }

    /// Makes sums of values their mean.
    #[inline(always)]
    pub(super) fn finish<L: Lanes>(self, values: &mut [f32]) {
        for values in values.chunks_mut(L::COUNT) {
            // SAFETY: the chunk has so many elements, a vector's at most, and is borrowed mutably.
            unsafe {
                let mean = some::<L, _>(values.as_ptr(), values.len()).over(L::splat(self.sum));
                put(mean, values.as_mut_ptr(), values.len());
            }
        }
    }
}

/// What a piece's queries have of a stretch.
struct Sums {
    states: [State; QUERIES],
    /// What the last block multiplied the sums of values by.
    factors: [f32; QUERIES],
    /// Of each query of the piece `size` sums of values, which are nobody else's.
    values: [*mut f32; QUERIES],
}

impl Work for Queries<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (count, keys, first) = (self.queries.len(), stretch(self.size), self.results());
        let seen = self.sees(0).start..self.sees(count - 1).end;
        let stretches = match self.to {
            To::Out(_) => seen.start / keys..seen.end.div_ceil(keys),
            To::Slot { stretch, .. } => stretch..stretch + 1,
        };
        let mut room = MaybeUninit::<[f32; QUERIES * WIDEST]>::uninit();
        let (mut scores, mut totals) = ([[0.0f32; KEYS]; QUERIES], [State::NONE; QUERIES]);
        for (number, stretch) in stretches.enumerate() {
            let places = seen.start.max(stretch * keys)..seen.end.min((stretch + 1) * keys);
            let values = if number == 0 { first } else { self.rows_in(&mut room) };
            let states = self.sums::<L>(places, values, &mut scores);
            if number == 0 {
                totals = states;
                continue;
            }
            for (query, (total, state)) in totals.iter_mut().zip(states).take(count).enumerate() {
                // SAFETY: each query has `size` sums there, which are written, and another `size` of this stretch.
                let [all, later] = [first, values].map(|of| unsafe { slice::from_raw_parts_mut(of[query], self.size) });
                total.merge::<L>(all, state, later);
            }
        }
        for (query, total) in totals.into_iter().take(count).enumerate() {
            match self.to {
                To::Out(_) => {
                    // SAFETY: the query has `size` elements of the output, and no other piece has this query.
                    total.finish::<L>(unsafe { slice::from_raw_parts_mut(first[query], self.size) });
                }
                To::Slot { partials, slot, .. } => {
                    // SAFETY: no other piece has this query and this stretch.
                    *unsafe { partials.state(self.number(query), slot) } = total;
                }
            }
        }
    }
}

impl Queries<'_> {
    /// The query's number among those of all tokens and heads, as they lie in `q` and the output.
    fn number(&self, query: usize) -> usize {
        let (query, (first, group)) = (self.queries.start + query, self.heads);
        (self.sequence.tokens.start + query / group) * self.all_heads + first + query % group
    }

    /// Where each query's result goes: `size` elements.
    fn results(&self) -> [*mut f32; QUERIES] {
        let mut results = [ptr::null_mut(); QUERIES];
        for (query, result) in results.iter_mut().take(self.queries.len()).enumerate() {
            let number = self.number(query);
            let elements = match self.to {
                // SAFETY: no other piece has this query.
                To::Out(out) => unsafe { out.slice(number * self.size, self.size) },
                // SAFETY: no other piece has this query and this stretch.
                To::Slot { partials, slot, .. } => unsafe { partials.values(number, slot) },
            };
            *result = elements.as_mut_ptr();
        }
        results
    }

    /// The same in a piece's own room.
    fn rows_in(&self, room: &mut MaybeUninit<[f32; QUERIES * WIDEST]>) -> [*mut f32; QUERIES] {
        // In bounds for as many queries as there are, since there is no second stretch of larger heads.
        array::from_fn(|query| room.as_mut_ptr().cast::<f32>().wrapping_add(query * self.size))
    }

    /// The softmax of one stretch, whose sums of values go to `values`.
    #[inline(always)]
    fn sums<L: Lanes>(
        &self,
        stretch: Range<usize>,
        values: [*mut f32; QUERIES],
        scores: &mut [[f32; KEYS]; QUERIES],
    ) -> [State; QUERIES] {
        let count = self.queries.len();
        // SAFETY: each query has `size` elements there.
        values.iter().take(count).for_each(|values| unsafe { values.write_bytes(0, self.size) });
        let mut sums = Sums { states: [State::NONE; QUERIES], factors: [1.0; QUERIES], values };
        for start in (stretch.start / KEYS * KEYS..stretch.end).step_by(KEYS) {
            let columns = stretch.start.saturating_sub(start)..stretch.end.min(start + KEYS) - start;
            let row = self.sequence.at(start, self.kv_head);
            self.scores::<L>(row, columns.clone(), scores);
            for (query, scores) in scores.iter_mut().take(count).enumerate() {
                sums.factors[query] = self.weigh::<L>(query, start, scores, &mut sums.states[query]);
            }
            self.add_values::<L>(row, columns, scores, &sums);
        }
        sums.states
    }

    /// The places in the cache that the query sees.
    fn sees(&self, query: usize) -> Range<usize> {
        self.sequence.sees((self.queries.start + query) / self.heads.1, self.mask.window)
    }

    /// The scaled products with those keys of a block that are at `columns`. The block begins at `row` of the cache.
    #[inline(always)]
    fn scores<L: Lanes>(&self, row: usize, columns: Range<usize>, scores: &mut [[f32; KEYS]; QUERIES]) {
        for query in (0..self.queries.len()).step_by(L::TOKENS) {
            let mut column = columns.start;
            while column < columns.end {
                let (rows, place) = (if column + 4 <= columns.end { 4 } else { 1 }, row + column);
                match (rows, (self.queries.len() - query).min(L::TOKENS)) {
                    (4, 6) => self.some_scores::<L, 4, 6>(query, place, column, scores),
                    (4, 5) => self.some_scores::<L, 4, 5>(query, place, column, scores),
                    (4, 4) => self.some_scores::<L, 4, 4>(query, place, column, scores),
                    (4, 3) => self.some_scores::<L, 4, 3>(query, place, column, scores),
                    (4, 2) => self.some_scores::<L, 4, 2>(query, place, column, scores),
                    (4, _) => self.some_scores::<L, 4, 1>(query, place, column, scores),
                    (_, few) => {
                        for query in query..query + few {
                            self.some_scores::<L, 1, 1>(query, place, column, scores);
                        }
                    }
                }
                column += rows;
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
            *at = self.q[self.number(query + more) * self.size..][..self.size].as_ptr();
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

    /// Makes the query's scores of a block weights, relative to the greatest score so far. Returns by what that multiplies sums.
    #[inline(always)]
    fn weigh<L: Lanes>(&self, query: usize, start: usize, scores: &mut [f32; KEYS], state: &mut State) -> f32 {
        let sees = self.sees(query);
        if let Some(cap) = self.mask.soft_cap {
            let cap = L::splat(cap);
            for at in (0..KEYS).step_by(L::COUNT) {
                set(scores, at, cap.times(tanh(get::<L>(scores, at).over(cap))));
            }
        }
        scores[..sees.start.saturating_sub(start).min(KEYS)].fill(f32::NEG_INFINITY);
        scores[sees.end.saturating_sub(start).min(KEYS)..].fill(f32::NEG_INFINITY);
        const { assert!(KEYS.is_multiple_of(L::COUNT)) };
        let mut greatest = L::splat(state.greatest);
        for at in (0..KEYS).step_by(L::COUNT) {
            greatest = greatest.max(get(scores, at));
        }
        let greatest = greatest.greatest();
        let mut sum = L::splat(0.0);
        for at in (0..KEYS).step_by(L::COUNT) {
            let weight = exp(get::<L>(scores, at).minus(L::splat(greatest)));
            sum = sum.plus(weight);
            set(scores, at, weight);
        }
        let factor = exp(L::splat(state.greatest - greatest)).array()[0];
        *state = State { greatest, sum: state.sum * factor + sum.sum() };
        factor
    }

    /// Adds the values of the same keys, by their weights, to what there is.
    #[inline(always)]
    fn add_values<L: Lanes>(&self, row: usize, columns: Range<usize>, weights: &[[f32; KEYS]; QUERIES], sums: &Sums) {
        let (weights, place) = (|query: usize| &weights[query][columns.clone()], row + columns.start);
        for query in (0..self.queries.len()).step_by(L::TOKENS) {
            let count = (self.queries.len() - query).min(L::TOKENS);
            let mut column = 0;
            while column < self.size {
                let wide = column + 4 * L::COUNT <= self.size;
                match (wide, count) {
                    (true, 6) => self.mix::<L, 6, 4>(query, column, place, weights, sums),
                    (true, 5) => self.mix::<L, 5, 4>(query, column, place, weights, sums),
                    (true, 4) => self.mix::<L, 4, 4>(query, column, place, weights, sums),
                    (true, 3) => self.mix::<L, 3, 4>(query, column, place, weights, sums),
                    (true, 2) => self.mix::<L, 2, 4>(query, column, place, weights, sums),
                    (true, _) => self.mix::<L, 1, 4>(query, column, place, weights, sums),
                    (false, _) => {
                        for query in query..query + count {
                            self.mix::<L, 1, 1>(query, column, place, weights, sums);
                        }
                    }
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
        sums: &Sums,
    ) {
        let (size, width) = (self.size, (self.size - column).min(V * L::COUNT));
        let mut all = [[L::splat(0.0); V]; Q];
        for (more, all) in all.iter_mut().enumerate() {
            let (before, factor) = (sums.values[query + more], L::splat(sums.factors[query + more]));
            for (part, sum) in all.iter_mut().enumerate() {
                // SAFETY: so many elements of the query are left from here on, and they are written.
                *sum = unsafe { part_of::<L, V>(before.add(column + part * L::COUNT), width) };
                *sum = sum.times(factor);
            }
        }
        let (count, mut rows) = (weights(query).len(), [weights(query).as_ptr(); Q]);
        for (more, row) in rows.iter_mut().enumerate() {
            *row = weights(query + more)[..count].as_ptr();
        }
        let values = &self.values[place * size..][..count * size][column..];
        // SAFETY: each query has `count` weights, and so many rows of `size` elements have `width` left from this column on.
        let all = unsafe { mixed::<L, Q, V>(all, rows, values.as_ptr(), size, count, width) };
        for (more, all) in all.iter().enumerate() {
            for (part, sum) in all.iter().enumerate() {
                let (at, left) = (column + part * L::COUNT, width - part * L::COUNT);
                // SAFETY: so many elements of the query are left from here on, which are nobody else's.
                unsafe { put(*sum, sums.values[query + more].add(at), left) };
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

/// The scores from `at` on.
#[inline(always)]
fn get<L: Lanes>(scores: &[f32; KEYS], at: usize) -> L {
    // SAFETY: the slice is a vector.
    unsafe { L::load(scores[at..][..L::COUNT].as_ptr()) }
}

#[inline(always)]
fn set<L: Lanes>(scores: &mut [f32; KEYS], at: usize, x: L) {
    // SAFETY: the slice is a vector, borrowed mutably.
    unsafe { x.store(scores[at..][..L::COUNT].as_mut_ptr()) };
}
