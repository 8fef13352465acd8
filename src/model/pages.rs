//! Which pages of the KV cache each row has, and which are known by their content. A structure of numbers alone: no device.
//!
//! A page that is full is known by the chain that it ends: the page before it, and its own tokens. A row that begins takes over the
//! pages that are known of its tokens. What they hold is what the row would compute, to the last bit, since a token's keys and
//! values depend on the tokens before it and on nothing else.
//!
//! **Invariant**: nobody writes to a page that is known, or that two rows have. All pages of a row before one that is known are known.

use std::collections::{BTreeMap, HashMap};

use crate::{
    error::{Error, Result},
    kernels::PAGE,
};

/// How many pages so many tokens take.
pub(super) fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE)
}

/// A page's content: the chain before it, by a number that no other chain ever has (0: nothing is before it), and its tokens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Content(u64, [u32; PAGE]);

#[derive(Clone, Debug, Default)]
struct Page {
    /// How many rows have it.
    rows: u32,
    /// What it holds, if it is known, and the number of the chain that it ends.
    known: Option<(Content, u64)>,
    /// When the last row gave it back. No two pages have the same.
    given_back: u64,
}

/// The pages of a cache. Each is free, kept (nobody's, but known), or has rows.
#[derive(Debug)]
pub(super) struct Pages {
    pages: Vec<Page>,
    rows: Vec<Vec<u32>>,
    free: Vec<u32>,
    /// By when they were given back.
    kept: BTreeMap<u64, u32>,
    known: HashMap<Content, u32>,
    /// The last number that was given to a chain, or time.
    clock: u64,
}

impl Pages {
    pub(super) fn new(pages: usize, rows: usize) -> Self {
        Self {
            pages: vec![Page::default(); pages],
            rows: vec![Vec::new(); rows],
            free: (0..pages as u32).rev().collect(),
            kept: BTreeMap::new(),
            known: HashMap::new(),
            clock: 0,
        }
    }

    /// The row's pages, in the order of its tokens.
    pub(super) fn of(&self, row: usize) -> &[u32] {
        &self.rows[row]
    }

    /// Pages that rows can take: those that nobody has, kept ones among them.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.kept.len()
    }

    /// Pages that a row takes that holds `length` tokens, and will hold `new` more.
    pub(super) fn needed(&self, row: usize, length: usize, new: usize) -> usize {
        pages_for(length + new).saturating_sub(self.rows[row].len())
            + usize::from(self.shared_end(row, length).is_some())
    }

    /// The page in which the row's next token would come, if other rows have it too.
    fn shared_end(&self, row: usize, length: usize) -> Option<u32> {
        let page = *self.rows[row].get(length / PAGE)?;
        (self.pages[page as usize].rows > 1).then_some(page)
    }

    /// Takes the pages that rows need, each of which holds `length` tokens and will hold `new` more. Where a row's next token comes in
    /// a page that others have too, it gets a page of its own, into which `copy` copies the whole of it. After an error some
    /// rows may have more pages than they need: [`cut`](Self::cut) them.
    ///
    /// # Errors
    /// [`Error::Pages`] if there are too few, before anything is done, or what `copy` returns.
    pub(super) fn grow(
        &mut self,
        batch: impl Iterator<Item = (usize, usize, usize)> + Clone,
        mut copy: impl FnMut(u32, u32) -> Result<()>,
    ) -> Result<()> {
        let (needed, available) = (self.needed_by_all(batch.clone()), self.available());
        if needed > available {
            return Err(Error::Pages { needed, available });
        }
        for (row, length, new) in batch {
            self.own_end(row, length, &mut copy)?;
            while self.rows[row].len() < pages_for(length + new) {
                let page = self.take();
                self.rows[row].push(page);
            }
        }
        Ok(())
    }

    /// Of rows that all have a page that they want for themselves the last one keeps it, if nobody else has it.
    fn needed_by_all(&self, batch: impl Iterator<Item = (usize, usize, usize)>) -> usize {
        let (mut shared, mut needed) = (Vec::new(), 0);
        for (row, length, new) in batch {
            needed += self.needed(row, length, new);
            shared.extend(self.shared_end(row, length));
        }
        shared.sort_unstable();
        let all_of_it = |same: &&[u32]| same.len() == self.pages[same[0] as usize].rows as usize;
        needed - shared.chunk_by(|a, b| a == b).filter(all_of_it).count()
    }

    /// Makes the page in which the row's next token comes the row's own, and unknown.
    fn own_end(&mut self, row: usize, length: usize, copy: &mut impl FnMut(u32, u32) -> Result<()>) -> Result<()> {
        let Some(&page) = self.rows[row].get(length / PAGE) else { return Ok(()) };
        if self.pages[page as usize].rows == 1 {
            self.forget(page);
            return Ok(());
        }
        let own = self.take();
        let copied = copy(page, own);
        let unused = if copied.is_ok() { std::mem::replace(&mut self.rows[row][length / PAGE], own) } else { own };
        self.give_back(unused);
        copied
    }

    /// Takes a page that nobody has: a free one, or else the one that was given back first.
    fn take(&mut self) -> u32 {
        let first_kept = || self.kept.pop_first().map(|(_, page)| page);
        let page = self.free.pop().or_else(first_kept).expect("there are as many as were counted");
        self.forget(page);
        self.pages[page as usize].rows = 1;
        page
    }

    fn forget(&mut self, page: u32) {
        if let Some((content, _)) = self.pages[page as usize].known.take() {
            self.known.remove(&content);
        }
    }

    /// One more row has a page that is known.
    fn share(&mut self, number: u32) {
        let page = &mut self.pages[number as usize];
        if page.rows == 0 {
            self.kept.remove(&page.given_back);
        }
        page.rows += 1;
    }

    /// One row has a page no longer.
    fn give_back(&mut self, number: u32) {
        let page = &mut self.pages[number as usize];
        page.rows -= 1;
        if page.rows > 0 {
            return;
        }
        if page.known.is_none() {
            return self.free.push(number);
        }
        self.clock += 1;
        page.given_back = self.clock;
        self.kept.insert(self.clock, number);
    }

    /// Gives back the row's pages behind `length` tokens, the last one first: of a chain that is kept the end is used again first.
    /// If the row ends within a page that is known, it goes on in one of its own: see [`grow`](Self::grow).
    pub(super) fn cut(&mut self, row: usize, length: usize) {
        while self.rows[row].len() > pages_for(length) {
            let page = self.rows[row].pop().expect("it has more than none");
            self.give_back(page);
        }
    }

    /// The chain that a row's first pages end; `None` if they are not known.
    fn chain(&self, row: usize, pages: usize) -> Option<u64> {
        let Some(last) = pages.checked_sub(1) else { return Some(0) };
        self.pages[self.rows[row][last] as usize].known.as_ref().map(|known| known.1)
    }

    /// What the page will be known by in which the next token comes of a row that holds `length` tokens, once it is full of `tokens`,
    /// the row's, with those to come: the chain before it, and its tokens. `None` if they do not fill it, or it will not be known.
    pub(super) fn next<'a>(&self, row: usize, length: usize, tokens: &'a [u32]) -> Option<(u64, &'a [u32])> {
        let at = length / PAGE;
        Some((self.chain(row, at)?, tokens.chunks_exact(PAGE).nth(at)?))
    }

    /// Takes over what is known of `tokens` behind the pages of a row, all of which are full of them, but leaves at least one token to
    /// compute. Returns how many tokens the row then holds.
    pub(super) fn begin(&mut self, row: usize, tokens: &[u32]) -> usize {
        let (full, whole) = (self.rows[row].len(), tokens.len().saturating_sub(1) / PAGE);
        let Some(mut chain) = self.chain(row, full) else { return full * PAGE };
        for tokens in tokens.chunks_exact(PAGE).take(whole).skip(full) {
            let Some(&number) = self.known.get(&content(chain, tokens)) else { break };
            self.share(number);
            chain = self.pages[number as usize].known.as_ref().map_or(0, |known| known.1);
            self.rows[row].push(number);
        }
        self.rows[row].len() * PAGE
    }

    /// Forgets what all pages hold, since it was computed from weights that were found to be wrong. Rows keep their pages.
    pub(super) fn distrust(&mut self) {
        self.known.clear();
        self.pages.iter_mut().for_each(|page| page.known = None);
        self.free.extend(std::mem::take(&mut self.kept).into_values());
    }

    /// Makes known the pages of a row that its tokens have filled, of which it held `before` until then. Where another page is
    /// known for the same, the row has that one from now on.
    pub(super) fn fill(&mut self, row: usize, before: usize, tokens: &[u32]) {
        for (at, tokens) in tokens.chunks_exact(PAGE).enumerate().skip(before / PAGE) {
            // Not after a distrust.
            let Some(chain) = self.chain(row, at) else { return };
            let content = content(chain, tokens);
            let own = self.rows[row][at];
            if let Some(&same) = self.known.get(&content) {
                self.share(same);
                self.rows[row][at] = same;
                self.give_back(own);
                continue;
            }
            self.clock += 1;
            self.known.insert(content.clone(), own);
            self.pages[own as usize].known = Some((content, self.clock));
        }
    }
}

fn content(chain: u64, tokens: &[u32]) -> Content {
    Content(chain, tokens.try_into().expect("a page's tokens"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Pages with what is written to them: in each place a number for the tokens up to there.
    struct Cache {
        pages: Pages,
        written: Vec<[u64; PAGE]>,
        held: Vec<Vec<u32>>,
    }

    /// A number for tokens, which others hardly have.
    fn number(tokens: &[u32]) -> u64 {
        tokens.iter().fold(1, |number: u64, token| {
            (number ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
        })
    }

    impl Cache {
        fn new(pages: usize, rows: usize) -> Self {
            let written = vec![[0; PAGE]; pages];
            Self { pages: Pages::new(pages, rows), written, held: vec![Vec::new(); rows] }
        }

        /// What a decoder does for a batch; a pass may fail after anything was written.
        fn pass(&mut self, batch: &[(usize, Vec<u32>)], fails: bool) -> Result<()> {
            let Self { pages, written, held } = self;
            let sizes = batch.iter().map(|(row, tokens)| (*row, held[*row].len(), tokens.len()));
            let enough = sizes.clone().map(|(row, length, new)| pages.needed(row, length, new)).sum::<usize>()
                <= pages.available();
            let grown = pages.grow(sizes, |from, to| {
                written[to as usize] = written[from as usize];
                Ok(())
            });
            assert!(grown.is_ok() || !enough);
            grown?;
            for (row, tokens) in batch {
                let all = [&held[*row][..], tokens].concat();
                for length in held[*row].len() + 1..=all.len() {
                    let page = pages.of(*row)[(length - 1) / PAGE] as usize;
                    assert!(pages.pages[page].rows == 1 && pages.pages[page].known.is_none(), "it is the row's alone");
                    written[page][(length - 1) % PAGE] = if fails { 0 } else { number(&all[..length]) };
                }
            }
            for (row, tokens) in batch {
                let before = held[*row].len();
                if fails {
                    pages.cut(*row, before);
                } else {
                    held[*row].extend(tokens);
                    pages.fill(*row, before, &held[*row]);
                }
            }
            Ok(())
        }

        fn truncate(&mut self, row: usize, length: usize) {
            self.held[row].truncate(length);
            self.pages.cut(row, length);
        }

        fn begin(&mut self, row: usize, tokens: &[u32]) -> usize {
            // At least what rows hold is known.
            let alike = |held: &[u32]| held.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            let most = self.held.iter().map(|held| alike(held)).max().unwrap_or(0).min(tokens.len() - 1);
            let taken = self.pages.begin(row, tokens);
            assert!(taken >= most / PAGE * PAGE && taken < tokens.len() && taken.is_multiple_of(PAGE));
            let held = &mut self.held[row];
            held.extend(&tokens[held.len()..taken]);
            taken
        }

        /// Every place that a row holds has what was computed for it, and every page is accounted for.
        fn check(&self) {
            let Self { pages: Pages { pages, rows, free, kept, known, .. }, written, held } = self;
            let mut count = vec![0; pages.len()];
            for (own, held) in rows.iter().zip(held) {
                assert_eq!(own.len(), pages_for(held.len()));
                assert_eq!(own.iter().collect::<HashSet<_>>().len(), own.len(), "a page twice in a row");
                own.iter().for_each(|page| count[*page as usize] += 1);
                for at in 0..held.len() {
                    assert_eq!(written[own[at / PAGE] as usize][at % PAGE], number(&held[..=at]));
                }
            }
            for (page, count) in pages.iter().zip(&count) {
                assert_eq!(page.rows, *count);
                assert!(*count < 2 || page.known.is_some(), "shared, but not known");
            }
            assert!(free.iter().all(|page| count[*page as usize] == 0 && pages[*page as usize].known.is_none()));
            assert!(kept.values().all(|page| count[*page as usize] == 0 && pages[*page as usize].known.is_some()));
            let used = count.iter().filter(|count| **count > 0).count();
            let apart: HashSet<_> = free.iter().chain(kept.values()).collect();
            assert_eq!((apart.len(), apart.len() + used), (free.len() + kept.len(), pages.len()), "lost, or twice");
            let all_known = pages.iter().filter(|page| page.known.is_some()).count();
            assert_eq!(known.len(), all_known);
            assert!(
                known
                    .iter()
                    .all(|(content, page)| pages[*page as usize].known.as_ref().is_some_and(|own| own.0 == *content))
            );
        }
    }

    /// Tokens that often begin as others do.
    fn tokens(rng: &mut fastrand::Rng, most: usize) -> Vec<u32> {
        let pages = (0..most.div_ceil(PAGE)).flat_map(|_| [rng.u32(0..2); PAGE]);
        let mut tokens: Vec<_> = pages.collect();
        tokens.truncate(if rng.bool() { tokens.len() } else { rng.usize(1..=most) });
        tokens
    }

    #[test]
    fn every_row_finds_what_was_computed_for_it_whatever_rows_share_keep_and_cut() {
        for _ in 0..40 {
            let seed = fastrand::u64(..);
            println!("seed {seed}");
            let mut rng = fastrand::Rng::with_seed(seed);
            let (count, rows) = (rng.usize(1..20), rng.usize(1..6));
            let mut cache = Cache::new(count, rows);
            let mut reused = 0;
            for _ in 0..300 {
                let row = rng.usize(0..rows);
                match rng.u8(0..7) {
                    0 => cache.truncate(row, 0),
                    1 => cache.truncate(row, rng.usize(0..=cache.held[row].len())),
                    2 => {
                        cache.truncate(row, 0);
                        reused += cache.begin(row, &tokens(&mut rng, 6 * PAGE));
                    }
                    3 => {
                        // One that goes on, with what others have computed by now.
                        let held = cache.held[row].len() / PAGE * PAGE;
                        cache.truncate(row, held);
                        let all = [&cache.held[row][..], &tokens(&mut rng, 3 * PAGE)].concat();
                        reused += cache.begin(row, &all) - held;
                    }
                    fails => {
                        let mut batch: Vec<_> = (0..rows).map(|row| (row, tokens(&mut rng, 3 * PAGE))).collect();
                        rng.shuffle(&mut batch);
                        batch.truncate(rng.usize(1..=rows));
                        let before = (cache.pages.available(), cache.pages.rows.clone());
                        if let Err(error) = cache.pass(&batch, fails == 4) {
                            assert!(matches!(error, Error::Pages { needed, available } if needed > available));
                            assert_eq!((cache.pages.available(), &cache.pages.rows), (before.0, &before.1));
                        }
                    }
                }
                cache.check();
            }
            println!("{count} pages, {rows} rows, {reused} tokens taken over");
            (0..rows).for_each(|row| cache.truncate(row, 0));
            assert_eq!(cache.pages.available(), count);
        }
    }

    #[test]
    fn a_sequence_takes_over_whole_pages_of_one_that_ended_and_leaves_a_token_to_compute() {
        let ids: Vec<u32> = (0..4 * PAGE as u32).collect();
        let mut cache = Cache::new(6, 2);
        cache.pass(&[(0, ids[..3 * PAGE + 1].to_vec())], false).unwrap();
        let first = cache.pages.of(0)[..3].to_vec();
        cache.truncate(0, 0);
        assert_eq!(cache.pages.available(), 6, "kept pages can be taken");
        assert_eq!(cache.begin(1, &ids[..3 * PAGE]), 2 * PAGE);
        assert_eq!(cache.begin(0, &ids), 3 * PAGE);
        assert_eq!((cache.pages.of(0), cache.pages.of(1), cache.pages.available()), (&first[..], &first[..2], 3));
        // Other tokens before it: another page.
        let mut other = ids.clone();
        other[0] = 9;
        cache.truncate(1, 0);
        assert_eq!(cache.begin(1, &other), 0);
    }

    #[test]
    fn of_pages_that_are_kept_the_ends_of_the_oldest_sequences_are_used_again_first() {
        let of = |first: u32| (0..2 * PAGE as u32).map(|token| token + first).collect::<Vec<_>>();
        let mut cache = Cache::new(5, 1);
        for first in [1000, 2000] {
            cache.pass(&[(0, of(first))], false).unwrap();
            cache.truncate(0, 0);
        }
        // The page that was free, and the end of the older sequence.
        cache.pass(&[(0, vec![7; PAGE + 1])], false).unwrap();
        let mut known = |first: u32| {
            cache.truncate(0, 0);
            cache.begin(0, &[of(first), vec![0]].concat()) / PAGE
        };
        assert_eq!([known(1000), known(2000)], [1, 2]);
    }

    #[test]
    fn rows_that_compute_the_same_have_it_once() {
        let ids: Vec<u32> = (0..PAGE as u32 + 9).collect();
        let mut cache = Cache::new(4, 2);
        cache.pass(&[(0, ids.clone()), (1, ids.clone())], false).unwrap();
        assert_eq!((cache.pages.of(0)[0], cache.pages.available()), (cache.pages.of(1)[0], 1));
        assert_ne!(cache.pages.of(0)[1], cache.pages.of(1)[1]);
    }

    #[test]
    fn rows_that_were_cut_within_a_shared_page_go_on_in_pages_of_their_own_as_far_as_there_must_be_some() {
        let ids: Vec<u32> = (0..PAGE as u32).collect();
        let mut cache = Cache::new(2, 2);
        cache.pass(&[(0, ids.clone()), (1, ids.clone())], false).unwrap();
        assert_eq!(cache.pages.available(), 1);
        (0..2).for_each(|row| cache.truncate(row, 9));
        // Both need one, and the last keeps the one that they had.
        cache.pass(&[(0, vec![1]), (1, vec![2])], false).unwrap();
        cache.check();
        assert_eq!(cache.pages.available(), 0);
    }

    #[test]
    fn after_a_distrust_nothing_is_taken_over_and_rows_go_on() {
        let mut cache = Cache::new(8, 3);
        let tokens = [7; 3 * PAGE];
        cache.pass(&[(0, tokens[..2 * PAGE + 1].to_vec())], false).unwrap();
        assert_eq!(cache.begin(1, &tokens), 2 * PAGE);
        cache.truncate(1, 0);
        cache.pages.distrust();
        assert_eq!((cache.pages.begin(1, &tokens), cache.pages.available()), (0, 5));
        cache.pass(&[(0, tokens[2 * PAGE + 1..].to_vec())], false).unwrap();
        cache.check();
        cache.pass(&[(2, tokens.to_vec())], false).unwrap();
        cache.check();
        assert_eq!(cache.begin(1, &[&tokens[..], &[7]].concat()), 3 * PAGE);
    }
}
