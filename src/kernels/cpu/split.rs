//! How attention is dealt to threads. A piece is some queries of a key and value head; where there are few, as where tokens are
//! decoded by a model with few such heads, each stretch of keys is a piece of its own. What stretches give is then left in
//! the [`room`](mod@super::room) and merged once all of them are there, in rounds of as many stretches as it has room for.

use std::ops::Range;

use super::{
    Parts, Sequences,
    attention::{QUERIES, Queries, State, To, stretch},
    lanes::{Lanes, Vectors, Work},
    room::{self, room},
};
use crate::{device::pool::Pool, kernels::AttentionMask};

/// F32 of a line of the cache: what two threads write must not lie in one.
const LINE: usize = 16;

/// Of fewer pieces for each thread, stretches are pieces.
const FEW: usize = 4;

/// What the pieces of one call share.
pub(super) struct Pieces<'a> {
    pub(super) q: &'a [f32],
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    pub(super) mask: AttentionMask,
    pub(super) out: Parts,
    pub(super) sequences: Sequences<'a>,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) size: usize,
    pub(super) vectors: Vectors,
}

impl Pieces<'_> {
    /// Multiplications and as many additions again, at most.
    pub(super) fn work(&self) -> usize {
        self.sequences.iter().map(|of| of.tokens.len() * of.kv_len).sum::<usize>() * self.heads * self.size
    }

    /// In this thread.
    pub(super) fn here(&self) {
        (0..self.count()).for_each(|piece| self.compute(piece, To::Out(self.out)));
    }

    /// In all threads.
    pub(super) fn deal(&self, pool: &Pool) {
        if self.splits(pool.size(), room::LEN) {
            self.split(pool, &mut room().0);
        } else {
            self.whole(pool);
        }
    }

    /// Whether so many threads have too few pieces that go over all stretches, and enough of single ones that fit into the room.
    pub(super) fn splits(&self, threads: usize, room: usize) -> bool {
        let (count, all, enough) = (self.count(), self.stretches().len(), FEW * threads);
        let slots = self.slots(room);
        threads > 1 && count < enough && all > 1 && (slots == all || count * slots >= enough)
    }

    /// A piece goes over all stretches.
    pub(super) fn whole(&self, pool: &Pool) {
        pool.deal(self.count(), |piece| self.compute(piece, To::Out(self.out)));
    }

    /// Each stretch is a piece.
    ///
    /// # Panics
    /// If there is no room for one stretch of each query.
    pub(super) fn split(&self, pool: &Pool, room: &mut [f32]) {
        let (queries, count, all) = (self.queries(), self.count(), self.stretches());
        let partials = Partials { slots: self.slots(room.len()), size: self.size, room: Parts::new(room) };
        let some = queries.div_ceil(FEW * pool.size()).max(1);
        for start in all.clone().step_by(partials.slots) {
            let stretches = start..all.end.min(start + partials.slots);
            pool.deal(count * stretches.len(), |piece| {
                let slot = piece / count;
                self.compute(piece % count, To::Slot { partials: &partials, stretch: start + slot, slot });
            });
            pool.deal(queries.div_ceil(some), |piece| {
                let queries = piece * some..queries.min((piece + 1) * some);
                self.vectors.run(Merge {
                    of: self,
                    partials: &partials,
                    all: &all,
                    stretches: stretches.clone(),
                    queries,
                });
            });
        }
    }

    /// Of how many stretches of each query what they give fits into the room, at most of all.
    fn slots(&self, room: usize) -> usize {
        let each = (room / self.queries().max(1)).saturating_sub(LINE);
        (each / Partials::slot(self.size)).min(self.stretches().len())
    }

    /// Heads of all tokens.
    fn queries(&self) -> usize {
        self.sequences.tokens() * self.heads
    }

    /// Query heads of a key and value head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads.max(1)
    }

    /// The number of the sequence's first part, which leaves those before it as many numbers as they have parts, or one more.
    fn first_part(&self, sequence: usize) -> usize {
        self.sequences.offsets[sequence] as usize * self.group() / QUERIES + sequence
    }

    /// How many pieces there are, of which some are nothing.
    fn count(&self) -> usize {
        self.first_part(self.sequences.len()) * self.kv_heads
    }

    /// The stretches that any query sees.
    fn stretches(&self) -> Range<usize> {
        let (keys, window) = (stretch(self.size), self.mask.window);
        let ends = self.sequences.iter().filter(|of| !of.tokens.is_empty());
        let ends = ends.map(|of| (of.sees(0, window).start / keys, of.kv_len.div_ceil(keys)));
        ends.reduce(|all, of| (all.0.min(of.0), all.1.max(of.1))).map_or(0..0, |(start, end)| start..end)
    }

    fn compute(&self, piece: usize, to: To<'_>) {
        // The last tokens first: they see most.
        let (kv_head, part) = (piece % self.kv_heads, self.count() / self.kv_heads - 1 - piece / self.kv_heads);
        let (mut number, mut end) = (0, self.sequences.len());
        while end - number > 1 {
            let middle = number.midpoint(end);
            *(if self.first_part(middle) <= part { &mut number } else { &mut end }) = middle;
        }
        let (sequence, group) = (self.sequences.get(number), self.group());
        let (queries, first) = (sequence.tokens.len() * group, (part - self.first_part(number)) * QUERIES);
        if first >= queries {
            return;
        }
        self.vectors.run(Queries {
            q: self.q,
            keys: self.keys,
            values: self.values,
            mask: self.mask,
            to,
            sequence: &sequence,
            kv_head: (kv_head, self.kv_heads),
            heads: (kv_head * group, group),
            all_heads: self.heads,
            size: self.size,
            queries: first..queries.min(first + QUERIES),
        });
    }
}

/// What stretches gave of each query, and how far their merging is.
pub(super) struct Partials {
    room: Parts,
    size: usize,
    /// How many stretches of each query.
    slots: usize,
}

#[allow(clippy::mut_from_ref, reason = "callers promise that nobody else uses what they ask for")]
impl Partials {
    /// Elements of a slot: the sums of values, and the state.
    fn slot(size: usize) -> usize {
        (size + 2).next_multiple_of(LINE)
    }

    /// Where a query's elements begin: the state of what is merged, then its slots.
    fn at(&self, query: usize) -> usize {
        query * (LINE + self.slots * Self::slot(self.size))
    }

    /// # Safety
    /// Nobody else uses this slot as long as the slice is used.
    pub(super) unsafe fn values(&self, query: usize, slot: usize) -> &mut [f32] {
        // SAFETY: as the caller promises; the room outlives this, by `split`.
        unsafe { self.room.slice(self.at(query) + LINE + slot * Self::slot(self.size), self.size) }
    }

    /// # Safety
    /// As [`values`](Self::values).
    pub(super) unsafe fn state(&self, query: usize, slot: usize) -> &mut State {
        // SAFETY: as the caller promises.
        unsafe { self.state_at(self.at(query) + LINE + slot * Self::slot(self.size) + self.size) }
    }

    /// # Safety
    /// Nobody else uses what is merged of this query as long as the state is used.
    unsafe fn merged(&self, query: usize) -> &mut State {
        // SAFETY: as the caller promises.
        unsafe { self.state_at(self.at(query)) }
    }

    /// # Safety
    /// Nobody else uses this place.
    unsafe fn state_at(&self, at: usize) -> &mut State {
        // SAFETY: a state is two F32, which nobody else uses, as the caller promises.
        unsafe { &mut *self.room.slice(at, 2).as_mut_ptr().cast() }
    }
}

/// Adds what some stretches gave of some queries to what is merged of those before.
struct Merge<'a> {
    of: &'a Pieces<'a>,
    partials: &'a Partials,
    all: &'a Range<usize>,
    stretches: Range<usize>,
    queries: Range<usize>,
}

impl Work for Merge<'_> {
    type Out = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { of, partials, all, stretches, queries } = self;
        for query in queries {
            // SAFETY: the stretches are computed, and no other thread merges this query, whose head of the output it is.
            let (out, merged) = unsafe { (of.out.slice(query * of.size, of.size), partials.merged(query)) };
            if stretches.start == all.start {
                out.fill(0.0);
                *merged = State::NONE;
            }
            for slot in 0..stretches.len() {
                // SAFETY: as above.
                let (state, values) = unsafe { (*partials.state(query, slot), partials.values(query, slot)) };
                merged.merge::<L>(out, state, values);
            }
            if stretches.end == all.end {
                merged.finish::<L>(out);
            }
        }
    }
}
