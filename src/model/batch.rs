//! Which tokens of which sequences a pass has, and the words that tell the device so.

use std::ops::Range;

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
/// It says where the words lie that the device gets: each token's id, each token's position, the pages of each sequence, which of
/// the pass's tokens is each sequence's last, and for each block what else [`Ragged`](crate::kernels::Ragged) tells the kernels.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pass {
    /// Tokens of the batch in passes before this one.
    before: usize,
    /// Tokens in this pass.
    pub(super) tokens: usize,
    /// Tokens that go through a layer at once, at most.
    block: usize,
    /// Sequences of the whole batch; some may have no token in this pass.
    pub(super) sequences: usize,
    /// Pages of the sequence that has most by the end of the batch.
    pub(super) pages: usize,
    /// How many sequences have their last token before this pass, and how many by its end.
    ended: [usize; 2],
}

/// Tokens of a pass that go through a layer together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// Its first token in the pass.
    pub(super) start: usize,
    pub(super) tokens: usize,
    /// The first of its sequences in the batch, and that one's first token among those of the batch.
    first: (usize, usize),
    /// How many sequences have tokens in it.
    pub(super) sequences: usize,
    /// Where its words start.
    words: usize,
}

/// The tokens of a sequence in a block.
struct Piece {
    /// The sequence's row.
    row: usize,
    /// Those of the sequence's tokens in the batch that come before.
    before: usize,
    /// Where they lie in the block.
    tokens: Range<usize>,
}

/// The batch as passes of at most so many tokens, in blocks of so many, whose sequences have at most so many pages. Where the tokens are a
/// multiple of a block's, blocks are those of a single pass.
pub(super) fn passes(batch: &[Sequence<'_>], [most, block]: [usize; 2], pages: usize) -> impl Iterator<Item = Pass> {
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
        let ended = [ended(before), ended(before + tokens)];
        Pass { before, tokens, block, sequences: batch.len(), pages, ended }
    })
}

impl Pass {
    /// The longest words there can be: of so many tokens, in blocks of so many, of so many sequences that have so many pages each.
    pub(super) fn most_words([tokens, block]: [usize; 2], sequences: usize, pages: usize) -> usize {
        let blocks = tokens.div_ceil(block);
        let pass = Self { tokens, sequences, pages, ..Self::default() };
        // The end of a block is in the middle of one sequence at most.
        pass.block_words().saturating_add(2 * (sequences + blocks) + blocks)
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
    pub(super) fn blocks(self, batch: &[Sequence<'_>]) -> impl Iterator<Item = Block> {
        let (mut first, mut words) = ((0, 0), self.block_words());
        (0..self.tokens).step_by(self.block).map(move |start| {
            let tokens = self.block.min(self.tokens - start);
            while first.1 + batch[first.0].tokens.len() <= self.before + start {
                first = (first.0 + 1, first.1 + batch[first.0].tokens.len());
            }
            let mut block = Block { start, tokens, first, sequences: 0, words };
            block.sequences = self.pieces(block, batch).count();
            words += 2 * block.sequences + 1;
            block
        })
    }

    /// Its tokens' ids.
    pub(super) fn ids(self, batch: &[Sequence<'_>]) -> impl Iterator<Item = u32> {
        batch.iter().flat_map(|sequence| sequence.tokens.iter().copied()).skip(self.before).take(self.tokens)
    }

    /// Where positions start among the words; ids are first.
    pub(super) fn positions(self) -> usize {
        self.tokens
    }

    /// Where the pages of the batch's sequences start among the words, so many for each.
    fn table(self) -> usize {
        2 * self.tokens
    }

    /// Where the numbers of the sequences' last tokens start among the words.
    pub(super) fn last(self) -> usize {
        self.table().saturating_add(self.sequences.saturating_mul(self.pages))
    }

    /// Where the words of the first block start.
    fn block_words(self) -> usize {
        self.last().saturating_add(self.sequences)
    }

    /// Where the offsets, the lengths and the pages of a block's sequences start among the words.
    pub(super) fn ragged(self, block: Block) -> [usize; 3] {
        [block.words, block.words + block.sequences + 1, self.table() + block.first.0 * self.pages]
    }

    /// The tokens of each sequence that has some in a block.
    fn pieces(self, block: Block, batch: &[Sequence<'_>]) -> impl Iterator<Item = Piece> {
        let start = self.before + block.start;
        let end = start + block.tokens;
        batch[block.first.0..].iter().scan(block.first.1, move |first, sequence| {
            let own = *first..*first + sequence.tokens.len();
            *first = own.end;
            let tokens = own.start.max(start)..own.end.min(end);
            let before = tokens.start.saturating_sub(own.start);
            (own.start < end).then(|| Piece {
                row: sequence.row,
                before,
                tokens: tokens.start - start..tokens.end - start,
            })
        })
    }

    /// Where the tokens of each sequence lie in a block that has some there, with the sequence's row.
    pub(super) fn spans(self, block: Block, batch: &[Sequence<'_>]) -> impl Iterator<Item = (usize, Range<usize>)> {
        self.pieces(block, batch).map(|piece| (piece.row, piece.tokens))
    }

    /// Writes the words, where row `r` of the KV cache holds `length(r)` tokens before the batch, and has `pages(r)`. Returns how
    /// many words there are.
    pub(super) fn fill<'a>(
        self,
        words: &mut [u32],
        batch: &[Sequence<'_>],
        length: impl Fn(usize) -> usize,
        pages: impl Fn(usize) -> &'a [u32],
    ) -> usize {
        words.iter_mut().zip(self.ids(batch)).for_each(|(word, id)| *word = id);
        let mut end = self.block_words();
        for block in self.blocks(batch) {
            let [offsets, lengths, _] = self.ragged(block);
            words[offsets] = 0;
            for (i, Piece { row, before, tokens }) in self.pieces(block, batch).enumerate() {
                let held = length(row) + before;
                words[offsets + i + 1] = tokens.end as u32;
                words[lengths + i] = (held + tokens.len()) as u32;
                let positions = &mut words[self.positions() + block.start + tokens.start..][..tokens.len()];
                positions.iter_mut().zip(held..).for_each(|(word, at)| *word = at as u32);
            }
            end = lengths + block.sequences;
        }
        let mut after = 0;
        for (i, sequence) in batch.iter().enumerate() {
            let (to, own) = (&mut words[self.table() + i * self.pages..][..self.pages], pages(sequence.row));
            // Those behind a sequence's last page are any.
            to[..own.len()].copy_from_slice(own);
            to[own.len()..].fill(0);
            after += sequence.tokens.len();
            // Read only where the sequence ends in this pass.
            let last = after.clamp(self.before + 1, self.before + self.tokens) - 1;
            words[self.last() + i] = (last - self.before) as u32;
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of a block.
    const BLOCK: usize = 256;

    const LENGTHS: [usize; 4] = [300, 1, 500, 7];

    fn words(pass: Pass, batch: &[Sequence<'_>]) -> Vec<u32> {
        let mut words = vec![u32::MAX; Pass::most_words([pass.tokens, BLOCK], 4, 9)];
        let pages = [&[5, 6, 1, 2, 3][..], &[7], &[8; 9], &[4]];
        let count = pass.fill(&mut words, batch, |row| [9, 0, 4, 2][row], |row| pages[3 - row]);
        words.truncate(count);
        words
    }

    /// What a block's kernels are told: offsets, lengths and pages.
    fn told(pass: Pass, block: Block, words: &[u32]) -> [&[u32]; 3] {
        let [offsets, lengths, pages] = pass.ragged(block).map(|at| &words[at..]);
        let sequences = block.sequences;
        [&offsets[..sequences + 1], &lengths[..sequences], &pages[..sequences * pass.pages]]
    }

    #[test]
    fn in_passes_of_whole_blocks_each_block_is_told_what_it_is_told_in_a_single_pass() {
        let ids: Vec<u32> = (0..500).collect();
        let batch: Vec<_> = (0..4).map(|i| Sequence { row: 3 - i, tokens: &ids[..LENGTHS[i]] }).collect();
        let [whole] = passes(&batch, [1000, BLOCK], 9).collect::<Vec<_>>()[..] else { panic!("several passes") };
        assert!(whole.is_whole() && whole.ending() == (0..4));
        let all = words(whole, &batch);
        let blocks: Vec<_> = whole.blocks(&batch).collect();
        let mut ends = 0;
        for pass in passes(&batch, [2 * BLOCK, BLOCK], 9) {
            let found = words(pass, &batch);
            assert_eq!(found[..pass.tokens], all[pass.before..][..pass.tokens], "ids");
            assert!(pass.ids(&batch).eq(found[..pass.tokens].iter().copied()));
            let positions = [(pass, &found, 0), (whole, &all, pass.before)]
                .map(|(of, words, skip)| &words[of.positions() + skip..][..pass.tokens]);
            assert_eq!(positions[0], positions[1]);
            for (number, block) in pass.blocks(&batch).enumerate() {
                let expected = told(whole, blocks[number + pass.before / BLOCK], &all);
                assert_eq!(told(pass, block, &found), expected, "{pass:?} {block:?}");
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
    fn a_block_is_told_of_the_sequences_that_have_tokens_in_it_alone() {
        let batch: Vec<_> = (0..4).map(|row| Sequence { row: 3 - row, tokens: &[5; 500][..LENGTHS[row]] }).collect();
        let [pass] = passes(&batch, [1000, BLOCK], 9).collect::<Vec<_>>()[..] else { panic!("several passes") };
        let words = words(pass, &batch);
        let found: Vec<_> = pass.blocks(&batch).map(|block| told(pass, block, &words)).collect();
        let nine = |pages: &[&[u32]]| {
            let each = pages.iter().map(|own| [own, &[0; 9][own.len()..]].concat());
            each.collect::<Vec<_>>().concat()
        };
        let [first, second, third, last] = [&[5, 6, 1, 2, 3][..], &[7], &[8; 9], &[4]];
        let expected = [
            (vec![0, 256], vec![258], nine(&[first])),
            (vec![0, 44, 45, 256], vec![302, 5, 211], nine(&[first, second, third])),
            (vec![0, 256], vec![467], nine(&[third])),
            (vec![0, 33, 40], vec![500, 16], nine(&[third, last])),
        ];
        assert_eq!(found.len(), expected.len());
        for (found, (offsets, lengths, pages)) in found.into_iter().zip(&expected) {
            assert_eq!(found, [&offsets[..], lengths, pages]);
        }
    }

    #[test]
    fn every_word_is_written_however_short_the_passes() {
        let batch: Vec<_> = (0..4).map(|row| Sequence { row, tokens: &[5; 500][..LENGTHS[row]] }).collect();
        for most in [1, 7, 300, 301, 302, 808] {
            let mut tokens = 0;
            for pass in passes(&batch, [most, BLOCK], 9) {
                assert!(!words(pass, &batch).contains(&u32::MAX), "{pass:?}");
                tokens += pass.tokens;
            }
            assert_eq!(tokens, 808);
        }
    }
}
