//! Who is next, and how prompts share a pass.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
};

/// Those that wait: the greatest priority first, and of equal ones the first that came.
pub(super) struct Queue<T> {
    waiting: BTreeMap<(i64, u64), T>,
}

/// Where something stands in a queue.
fn place(priority: i32, ticket: u64) -> (i64, u64) {
    (-i64::from(priority), ticket)
}

impl<T> Queue<T> {
    pub(super) fn new() -> Self {
        Self { waiting: BTreeMap::new() }
    }

    pub(super) fn put(&mut self, priority: i32, ticket: u64, what: T) {
        self.waiting.insert(place(priority, ticket), what);
    }

    pub(super) fn take_first(&mut self) -> Option<T> {
        self.waiting.pop_first().map(|(_, first)| first)
    }

    pub(super) fn take(&mut self, ticket: u64) -> Option<T> {
        let place = *self.waiting.keys().find(|(_, other)| *other == ticket)?;
        self.waiting.remove(&place)
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}

/// The number of the one that gives up its place first: of the least priority, and of those the last that came.
pub(super) fn last(running: impl Iterator<Item = (i32, u64)>) -> Option<usize> {
    let places = running.enumerate().map(|(number, (priority, ticket))| (place(priority, ticket), number));
    places.max().map(|(_, number)| number)
}

/// Shares so many tokens among prompts that have these left: each gets the same, and what one does not need goes to the others, so that a
/// long prompt does not hold up short ones.
pub(super) fn shares(left: &[usize], tokens: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..left.len()).collect();
    order.sort_by_key(|number| left[*number]);
    let (mut shares, mut tokens) = (vec![0; left.len()], tokens);
    for (done, number) in order.iter().enumerate() {
        // Rounded up, so that the last token is given too: to the shortest.
        let share = tokens.div_ceil(left.len() - done).min(left[*number]);
        (shares[*number], tokens) = (share, tokens - share);
    }
    shares
}

/// The page that a prompt comes to next.
#[derive(Clone, Copy, Debug)]
pub(super) struct Next<'a> {
    /// The same for those that compute the same page.
    pub(super) page: (u64, &'a [u32]),
    /// Tokens of the page that are there.
    pub(super) there: usize,
    /// Whether another one's page would do, once it is full.
    pub(super) can_wait: bool,
    pub(super) priority: i32,
    pub(super) ticket: u64,
}

/// Which of some prompts wait for the page that they come to next, since another one computes it: of those with the same page the one
/// that has the most of it, and of equal ones the most important. That one waits for none, so that there is always somebody who goes on.
/// It ends or leaves the page behind at some time, whatever becomes of it: then nobody waits for it any more.
pub(super) fn waits(prompts: &[Option<Next<'_>>]) -> Vec<bool> {
    let rank = |next: &Next<'_>| (Reverse(next.there), place(next.priority, next.ticket));
    let mut first = HashMap::new();
    for next in prompts.iter().flatten() {
        let best = first.entry(next.page).or_insert(rank(next));
        *best = rank(next).min(*best);
    }
    let waits = |next: &Next<'_>| next.can_wait && first[&next.page] != rank(next);
    prompts.iter().map(|next| next.as_ref().is_some_and(waits)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_shared_evenly_and_nothing_of_it_is_left_while_a_prompt_needs_it() {
        assert_eq!(shares(&[1000, 10, 1000], 110), [50, 10, 50]);
        assert_eq!(shares(&[5, 5, 5], 4), [2, 1, 1]);
        assert_eq!(shares(&[3, 0], 100), [3, 0]);
        assert_eq!(shares(&[], 7), [0; 0]);
        let mut rng = fastrand::Rng::new();
        for _ in 0..2000 {
            let left: Vec<usize> = (0..rng.usize(..9)).map(|_| rng.usize(..300)).collect();
            let tokens = rng.usize(..600);
            let shares = shares(&left, tokens);
            assert!(shares.iter().zip(&left).all(|(share, left)| share <= left));
            assert_eq!(shares.iter().sum::<usize>(), tokens.min(left.iter().sum()), "{left:?} of {tokens}");
            // Whoever wants more has as much as anyone else, but for a token.
            let most = shares.iter().max().copied().unwrap_or(0);
            let short = shares.iter().zip(&left).filter(|(share, left)| share < left).map(|(share, _)| *share);
            assert!(short.min().is_none_or(|least| least + 1 >= most), "{left:?} of {tokens}: {shares:?}");
        }
    }

    #[test]
    fn of_prompts_with_the_same_page_the_one_that_has_most_of_it_computes_it_and_who_has_begun_it_goes_on() {
        let page = |page: u32, there, priority, ticket| {
            let tokens = if page == 0 { &[1, 2][..] } else { &[1, 3] };
            Some(Next { page: (0, tokens), there, can_wait: there == 0, priority, ticket })
        };
        let begun = [page(0, 0, 9, 1), page(0, 5, 0, 8), page(0, 3, 0, 2), None, page(1, 0, 0, 3), page(0, 0, 0, 4)];
        assert_eq!(waits(&begun), [true, false, false, false, false, true]);
        assert_eq!(waits(&[page(0, 0, 0, 1), page(0, 0, 1, 2), page(0, 0, 1, 3)]), [true, false, true]);
        assert_eq!(waits(&[]), [false; 0]);
    }

    #[test]
    fn the_most_important_is_next_and_the_latest_of_the_least_important_gives_up_its_place() {
        let mut queue = Queue::new();
        let all = [(0, 3), (1, 4), (0, 1), (-2, 0), (1, 5)];
        all.iter().for_each(|&(priority, ticket)| queue.put(priority, ticket, ticket));
        assert_eq!((queue.take(1), queue.take(1), queue.len()), (Some(1), None, 4));
        let order: Vec<_> = std::iter::from_fn(|| queue.take_first()).collect();
        assert_eq!(order, [4, 5, 3, 0]);
        assert_eq!(last(all.into_iter()), Some(3));
        assert_eq!(last(all[..2].iter().copied().chain([(0, 9)])), Some(2));
        assert_eq!(last(std::iter::empty()), None);
    }
}
