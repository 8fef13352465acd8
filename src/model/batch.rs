//! Which tokens of which sequences a pass has, and the words that tell the device so.

use std::ops::Range;

/// Tokens that go through a layer at once.
pub(super) const BLOCK: usize = 256;

/// New tokens of one sequence of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// The sequence's row in the KV cache.
    pub row: usize,
    /// The tokens that follow what the cache holds; at least one.
    pub tokens: &'a [u32],
}

/// The tokens of a batch that go through the layers in one pass. A batch's tokens are counted over all its sequences, one after
/// the other; those of a pass follow each other.
///
/// It says where the words lie that the device gets: each token's id, each token's position, for each block what
/// [`Ragged`](crate::kernels::Ragged) tells the kernels, and which of the pass's tokens is each sequence's last.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pass {
    /// Tokens of the batch in passes before this one.
    before: usize,
    /// Tokens in this pass.
    pub(super) tokens: usize,
    /// Sequences of the whole batch; some may have no token in this pass.
    pub(super) sequences: usize,
    /// How many sequences have their last token before this pass, and how many by its end.
    ended: [usize; 2],
}

/// Tokens of a pass that go through a layer together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    number: usize,
    /// Its first token in the pass.
    pub(super) start: usize,
    pub(super) tokens: usize,
}

/// The batch as passes of at most so many tokens. Where that is a multiple of [`BLOCK`], blocks are those of a single pass.
pub(super) fn passes(batch: &[Sequence<'_>], most: usize) -> impl Iterator<Item = Pass> {
    let all: usize = batch.iter().map(|sequence| sequence.tokens.len()).sum();
    let ended = |by: usize| {
        let ends = batch.iter().scan(0, |end, sequence| {
            *end += sequence.tokens.len();
            Some(*end)
        });
        ends.take_while(|end| *end <= by).count()
    };
    (0..all).step_by(most).map(move |before| {
        let tokens = most.min(all - before);
        Pass { before, tokens, sequences: batch.len(), ended: [ended(before), ended(before + tokens)] }
    })
}

impl Pass {
    /// The longest words there can be: of so many tokens of so many sequences.
    pub(super) fn most_words(tokens: usize, sequences: usize) -> usize {
        Self { tokens, sequences, ..Self::default() }.words()
    }

    /// The batch has tokens in no other pass.
    pub(super) fn is_whole(self) -> bool {
        self.before == 0 && self.is_last()
    }

    /// No pass of the batch comes after it.
    pub(super) fn is_last(self) -> bool {
        self.ended[1] == self.sequences
    }

    /// The sequences whose last token is in this pass.
    pub(super) fn ending(self) -> Range<usize> {
        self.ended[0]..self.ended[1]
    }

    /// Its tokens in blocks.
    pub(super) fn blocks(self) -> impl Iterator<Item = Block> {
        let block =
            move |(number, start): (usize, usize)| Block { number, start, tokens: BLOCK.min(self.tokens - start) };
        (0..self.tokens).step_by(BLOCK).enumerate().map(block)
    }

    /// Its tokens' ids.
    pub(super) fn ids(self, batch: &[Sequence<'_>]) -> impl Iterator<Item = u32> {
        batch.iter().flat_map(|sequence| sequence.tokens.iter().copied()).skip(self.before).take(self.tokens)
    }

    /// Where positions start among the words; ids are first.
    pub(super) fn positions(self) -> usize {
        self.tokens
    }

    /// Where the offsets, the lengths and the rows of a block's sequences start among the words.
    pub(super) fn ragged(self, block: Block) -> [usize; 3] {
        let offsets = self.block_words(block.number);
        let lengths = offsets + self.sequences + 1;
        [offsets, lengths, lengths + self.sequences]
    }

    fn block_words(self, number: usize) -> usize {
        2 * self.tokens + number * (3 * self.sequences + 1)
    }

    /// Where the numbers of the sequences' last tokens start among the words.
    pub(super) fn last(self) -> usize {
        self.block_words(self.tokens.div_ceil(BLOCK))
    }

    /// Where the tokens of each sequence lie in a block that has some there, with the sequence's row.
    pub(super) fn spans(self, block: Block, batch: &[Sequence<'_>]) -> impl Iterator<Item = (usize, Range<usize>)> {
        let start = self.before + block.start;
        let end = start + block.tokens;
        let spans = batch.iter().scan(0, move |first, sequence| {
            let own = *first..*first + sequence.tokens.len();
            *first = own.end;
            Some((sequence.row, own.start.clamp(start, end) - start..own.end.clamp(start, end) - start))
        });
        spans.filter(|(_, tokens)| !tokens.is_empty())
    }

    /// How many words there are.
    pub(super) fn words(self) -> usize {
        self.last() + self.sequences
    }

    /// Writes the words, where row `r` of the KV cache holds `length(r)` tokens before the batch.
    pub(super) fn fill(self, words: &mut [u32], batch: &[Sequence<'_>], length: impl Fn(usize) -> usize) {
        let (pass, mut first) = (self.before..self.before + self.tokens, 0);
        for (i, sequence) in batch.iter().enumerate() {
            let (after, held) = (first + sequence.tokens.len(), length(sequence.row));
            // Those of its tokens that are in the pass.
            let own = first.max(pass.start)..after.min(pass.end);
            if !own.is_empty() {
                let at = own.start - pass.start;
                words[at..][..own.len()].copy_from_slice(&sequence.tokens[own.start - first..own.end - first]);
                let positions = &mut words[self.positions() + at..][..own.len()];
                positions.iter_mut().zip(held + own.start - first..).for_each(|(word, at)| *word = at as u32);
            }
            for block in self.blocks() {
                // Where its tokens begin and end in the block, how long its cache is by then, and its row.
                let (start, [offsets, lengths, rows]) = (pass.start + block.start, self.ragged(block));
                let end = start + block.tokens;
                words[offsets + i] = (first.clamp(start, end) - start) as u32;
                words[offsets + i + 1] = (after.clamp(start, end) - start) as u32;
                words[lengths + i] = (held + end.clamp(first, after) - first) as u32;
                words[rows + i] = sequence.row as u32;
            }
            // Read only where the sequence ends in this pass.
            words[self.last() + i] = (after.clamp(pass.start + 1, pass.end) - 1 - pass.start) as u32;
            first = after;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTHS: [usize; 4] = [300, 1, 500, 7];

    fn words(pass: Pass, batch: &[Sequence<'_>]) -> Vec<u32> {
        let mut words = vec![u32::MAX; pass.words()];
        pass.fill(&mut words, batch, |row| [9, 0, 4, 2][row]);
        words
    }

    #[test]
    fn in_passes_of_whole_blocks_each_block_is_told_what_it_is_told_in_a_single_pass() {
        let ids: Vec<u32> = (0..500).collect();
        let batch: Vec<_> = (0..4).map(|i| Sequence { row: 3 - i, tokens: &ids[..LENGTHS[i]] }).collect();
        let [whole] = passes(&batch, 1000).collect::<Vec<_>>()[..] else { panic!("several passes") };
        assert!(whole.is_whole() && whole.ending() == (0..4));
        let all = words(whole, &batch);
        let mut ends = 0;
        for pass in passes(&batch, 2 * BLOCK) {
            let found = words(pass, &batch);
            assert_eq!(found[..pass.tokens], all[pass.before..][..pass.tokens], "ids");
            assert!(pass.ids(&batch).eq(found[..pass.tokens].iter().copied()));
            let positions = [(pass, &found, 0), (whole, &all, pass.before)]
                .map(|(of, words, skip)| &words[of.positions() + skip..][..pass.tokens]);
            assert_eq!(positions[0], positions[1]);
            for block in pass.blocks() {
                let same = Block { number: block.number + pass.before / BLOCK, ..block };
                let [told, expected] = [(pass, block, &found), (whole, same, &all)]
                    .map(|(of, block, words)| &words[of.ragged(block)[0]..][..3 * of.sequences + 1]);
                assert_eq!(told, expected, "{pass:?} {block:?}");
            }
            assert_eq!(pass.ending().start, ends);
            for i in pass.ending() {
                assert_eq!(found[pass.last() + i] as usize + pass.before, all[whole.last() + i] as usize);
            }
            ends = pass.ending().end;
            assert!(!pass.is_whole() && pass.is_last() == (ends == 4));
        }
        assert_eq!(ends, 4);
    }

    #[test]
    fn every_word_is_written_however_short_the_passes() {
        let batch: Vec<_> = (0..4).map(|row| Sequence { row, tokens: &[5; 500][..LENGTHS[row]] }).collect();
        for most in [1, 7, 300, 301, 302, 808] {
            let mut tokens = 0;
            for pass in passes(&batch, most) {
                assert!(!words(pass, &batch).contains(&u32::MAX), "{pass:?}");
                assert!(pass.words() <= Pass::most_words(most, 4));
                tokens += pass.tokens;
            }
            assert_eq!(tokens, 808);
        }
    }
}
