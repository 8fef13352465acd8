//! One oracle for all ways to run a model: stored logits and greedy tokens of reference checkpoints ([`REFERENCES`]), and the ways
//! ([`ROWS`]). A new model is a line of the one, a new way a line of the other, with a field of [`Row`] if there is none for it.

#![allow(dead_code, reason = "each test uses a part")]

use std::path::PathBuf;

use layer_streamer::{
    Error, Settings, device,
    kernels::Kernels,
    model::{Choice, Decoder, Model, Sequence, Tables},
    plan::{CachePolicy, Placement, Reader, Tier},
};

use crate::common::{distance, expected, logits, packed};
use support::{data, speller};

/// A checkpoint, and in `tests/data/NAME` what `make_reference.py` or `make_expected.py` computed for it in F32 or F64.
pub struct Reference {
    pub name: &'static str,
    checkpoint: Place,
    /// How far logits and residual streams may be off where the device computes in BF16. Of random weights, attention is so sharp
    /// that operands in BF16 alone cost up to 1.8e-2, 2.4e-2 for llama3: so says an emulation of every rounding in PyTorch.
    bf16: f64,
}

/// Where a checkpoint lies.
enum Place {
    /// Beside what was computed for it.
    Data,
    Speller,
    /// In the folder that this variable names.
    Variable(&'static str),
}

use Place::*;

/// At least one for each model family.
pub const REFERENCES: [Reference; 7] = [
    Reference { name: "llama3", checkpoint: Data, bf16: 2.7e-2 },
    Reference { name: "mistral", checkpoint: Data, bf16: 2e-2 },
    Reference { name: "qwen2-f32", checkpoint: Data, bf16: 2e-2 },
    Reference { name: "qwen2-sharded", checkpoint: Data, bf16: 2e-2 },
    Reference { name: "qwen2-tied", checkpoint: Data, bf16: 2e-2 },
    Reference { name: "qwen3", checkpoint: Data, bf16: 2e-2 },
    Reference { name: "speller", checkpoint: Speller, bf16: 2e-2 },
];

/// Not in the repository: `ci/smollm2` makes it.
pub const SMOLLM2: Reference =
    Reference { name: "smollm2", checkpoint: Variable("LAYER_STREAMER_SMOLLM2"), bf16: 2e-2 };

/// How far off where the device computes in F32. All distances are ‖Δ‖ / ‖expected‖.
const F32: f64 = 2e-5;

/// One way to run a model.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The units' tiers, over and over.
    tiers: &'static [Tier],
    tables: Tables,
    /// `n_gpu`, `n_cpu_pinned` and `n_cpu`, and their batches.
    rings: [usize; 3],
    batches: [usize; 3],
    reader: Reader,
    cache: CachePolicy,
    /// Sequences that are continued together. Each starts one token later in the same text, up to seven, and ends as much sooner.
    sequences: usize,
    /// The prompt goes in pieces of so many tokens; 0: at once.
    piece: usize,
    /// Before the last piece, other tokens take its place, and are forgotten.
    redo: bool,
    /// What is of BF16 is stored packed.
    packed: bool,
}

const PLAIN: Row = Row {
    tiers: &[Disk],
    tables: OnDevice,
    rings: [2, 4, 0],
    batches: [0; 3],
    reader: Auto,
    cache: CachePolicy::Auto,
    sequences: 1,
    piece: 0,
    redo: false,
    packed: false,
};

use Reader::{Auto, Pread, Uring, UringFixed};
use Tables::{EmbeddingInFile, HeadStreamed, OnDevice};
use Tier::{Disk, Gpu, GpuPacked, Pinned, PinnedPacked, Ram};

/// How many rows at the head of [`ROWS`] reach whatever differs between models. The others differ in how units travel.
pub const OF_EACH_MODEL: usize = 7;

pub const ROWS: [Row; 58] = [
    PLAIN,
    Row { tables: EmbeddingInFile, ..PLAIN },
    Row { tables: HeadStreamed, ..PLAIN },
    Row { tiers: &[Gpu, Disk, Pinned, Ram], tables: HeadStreamed, ..PLAIN },
    Row { piece: 5, ..PLAIN },
    Row { sequences: 2, ..PLAIN },
    Row { packed: true, tiers: &[Gpu, Disk, Pinned, Ram], tables: HeadStreamed, ..PLAIN },
    // Packed.
    Row { packed: true, ..PLAIN },
    Row { packed: true, tables: EmbeddingInFile, ..PLAIN },
    Row { packed: true, tables: HeadStreamed, rings: [1, 0, 0], ..PLAIN },
    Row { packed: true, tiers: &[Ram], rings: [1, 0, 1], ..PLAIN },
    Row { packed: true, tiers: &[Pinned], ..PLAIN },
    Row { packed: true, tiers: &[Gpu], tables: EmbeddingInFile, piece: 5, ..PLAIN },
    Row { packed: true, tiers: &[GpuPacked], ..PLAIN },
    Row {
        packed: true,
        tiers: &[GpuPacked, Gpu, Pinned, GpuPacked, Disk],
        rings: [1, 0, 1],
        tables: HeadStreamed,
        ..PLAIN
    },
    Row { tiers: &[GpuPacked, Gpu], ..PLAIN },
    Row { tiers: &[PinnedPacked], ..PLAIN },
    Row { tiers: &[PinnedPacked, Disk, Pinned, PinnedPacked], rings: [1, 1, 1], tables: HeadStreamed, ..PLAIN },
    Row { packed: true, reader: Pread, rings: [3, 3, 3], batches: [2, 2, 2], ..PLAIN },
    // Tiers.
    Row { tiers: &[Ram], ..PLAIN },
    Row { tiers: &[Pinned], ..PLAIN },
    Row { tiers: &[Gpu], ..PLAIN },
    Row { tiers: &[Gpu, Disk, Pinned, Ram], ..PLAIN },
    Row { tiers: &[Ram, Pinned, Disk, Gpu], ..PLAIN },
    Row { tiers: &[Disk, Gpu], ..PLAIN },
    Row { tiers: &[Ram], tables: HeadStreamed, ..PLAIN },
    Row { tiers: &[Pinned], tables: HeadStreamed, ..PLAIN },
    Row { tiers: &[Gpu], tables: HeadStreamed, ..PLAIN },
    Row { tiers: &[Pinned, Ram, Gpu, Disk], tables: EmbeddingInFile, ..PLAIN },
    Row { tiers: &[Ram], rings: [1, 0, 1], ..PLAIN },
    Row { tiers: &[Pinned], rings: [1, 0, 0], ..PLAIN },
    Row { tiers: &[Gpu], rings: [1, 0, 0], ..PLAIN },
    Row { tiers: &[Gpu, Disk, Pinned, Ram], rings: [1, 0, 0], ..PLAIN },
    Row { tiers: &[Gpu, Disk, Pinned, Ram], rings: [1, 0, 1], ..PLAIN },
    Row { tiers: &[Gpu, Disk, Pinned, Ram], rings: [1, 1, 1], ..PLAIN },
    Row { tiers: &[Gpu, Disk, Pinned, Ram], rings: [7, 4, 3], batches: [7, 2, 3], tables: HeadStreamed, ..PLAIN },
    // Rings and batches; see also `rings`.
    Row { rings: [1, 0, 0], ..PLAIN },
    Row { rings: [1, 0, 0], tables: HeadStreamed, ..PLAIN },
    Row { rings: [1, 1, 1], tables: HeadStreamed, ..PLAIN },
    Row { rings: [7, 4, 5], batches: [7, 4, 5], ..PLAIN },
    Row { rings: [3, 3, 3], batches: [2, 2, 2], tables: HeadStreamed, ..PLAIN },
    // Who reads, and from where.
    Row { reader: UringFixed, cache: CachePolicy::Direct, ..PLAIN },
    Row { reader: Uring, cache: CachePolicy::Direct, ..PLAIN },
    Row { reader: Pread, cache: CachePolicy::Direct, ..PLAIN },
    Row { reader: UringFixed, cache: CachePolicy::Buffered, ..PLAIN },
    Row { reader: Uring, cache: CachePolicy::Buffered, ..PLAIN },
    Row { reader: Pread, cache: CachePolicy::Buffered, ..PLAIN },
    Row { reader: Pread, tables: HeadStreamed, ..PLAIN },
    // How tokens are given.
    Row { piece: 1, ..PLAIN },
    Row { piece: 5, tables: EmbeddingInFile, ..PLAIN },
    Row { piece: 5, tables: HeadStreamed, ..PLAIN },
    Row { piece: 6, redo: true, ..PLAIN },
    Row { piece: 6, redo: true, tables: HeadStreamed, ..PLAIN },
    Row { sequences: 2, tables: EmbeddingInFile, ..PLAIN },
    Row { sequences: 2, tables: HeadStreamed, ..PLAIN },
    // More sequences than go through the head at once, and more tokens than go through a layer at once.
    Row { sequences: 20, ..PLAIN },
    Row { sequences: 20, tables: HeadStreamed, ..PLAIN },
    Row { sequences: 3, piece: 6, redo: true, tiers: &[Gpu, Disk, Pinned, Ram], ..PLAIN },
];

/// Every combination of stages that are skipped, short and long, handed over singly, in pairs and all at once.
pub fn rings() -> Vec<Row> {
    let depths = |counts: [usize; 3]| {
        counts.into_iter().flat_map(|n| match n {
            0 | 1 => vec![(n, 0)],
            _ => vec![(n, 0), (n, 2), (n, n)],
        })
    };
    let mut rows = Vec::new();
    for (n_gpu, batch_gpu) in depths([1, 2, 7]) {
        for (n_cpu_pinned, batch_cpu_pinned) in depths([0, 1, 4]) {
            for (n_cpu, batch_cpu) in depths([0, 1, 5]) {
                let (rings, batches) = ([n_gpu, n_cpu_pinned, n_cpu], [batch_gpu, batch_cpu_pinned, batch_cpu]);
                rows.push(Row { rings, batches, ..PLAIN });
            }
        }
    }
    rows
}

impl Reference {
    fn folder(&self) -> PathBuf {
        match self.checkpoint {
            Data => data(self.name),
            Speller => speller(),
            Variable(name) => std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")).into(),
        }
    }
}

/// Holds the model, run in each of these ways, against what is stored. Panics with each way that gives anything else.
pub fn hold<D: Kernels>(device: &D, references: &[Reference], rows: &[Row]) {
    let mut wrong = Vec::new();
    for reference in references {
        let packed = packed(&reference.folder());
        let [model, of_packed] = [&reference.folder(), packed.path()].map(|folder| Model::open(folder).unwrap());
        let of = |row: &Row| if row.packed { &of_packed } else { &model };
        let most = rows.iter().map(|row| match run(device, of(row), reference, row) {
            Ok(off) => off,
            Err(said) => {
                wrong.push(format!("{}, {row:?}:\n    {said}", reference.name));
                0.0
            }
        });
        let most = most.fold(0.0, f64::max);
        println!("{}: {} ways, logits off by {most:.1e} at most", reference.name, rows.len());
    }
    let (count, all) = (wrong.len(), references.len() * rows.len());
    wrong.truncate(20);
    assert!(count == 0, "{count} of {all} are wrong; the first:\n{}", wrong.join("\n"));
}

/// How far logits are off, or what is wrong.
fn run<D: Kernels>(device: &D, model: &Model, reference: &Reference, row: &Row) -> Result<f64, String> {
    let stored = expected(&data(reference.name));
    let tolerance = if device.precision().weight.is_some() { reference.bf16 } else { F32 };
    // Sequence i is a text that is i tokens further on.
    let skew = |i: usize| i % 8;
    let whole = [stored.prompt.as_slice(), &stored.continuation].concat();
    let texts: Vec<&[u32]> = (0..row.sequences).map(|i| &whole[..stored.prompt.len() + skew(i)]).collect();
    let mut decoder = placed(device, model, row, whole.len() + 8)?;

    let split = |tokens: &[u32]| (tokens.len() - 1).checked_div(row.piece).unwrap_or(0) * row.piece;
    // The last sequence has the first row of the cache.
    let kept_in = |i: usize| row.sequences - 1 - i;
    let mut found = vec![Vec::new(); row.sequences];
    for (i, tokens) in texts.iter().enumerate() {
        let before = &tokens[..split(tokens)];
        for tokens in before.chunks(row.piece.max(1)) {
            decoder.forward(&[Sequence { row: kept_in(i), tokens }]).map_err(said)?;
            found[i].extend(logits(&mut decoder));
        }
        if row.redo {
            decoder.forward(&[Sequence { row: kept_in(i), tokens: &[5, 6, 7] }]).map_err(said)?;
            decoder.truncate(kept_in(i), before.len()).map_err(said)?;
        }
    }
    let last = |i: usize| Sequence { row: kept_in(i), tokens: &texts[i][split(texts[i])..] };
    let batch: Vec<_> = (0..row.sequences).map(last).collect();
    let mut streams = Vec::new();
    let pass = decoder.forward_observed(&batch, |_, residual, stream| {
        streams.push(vec![0.0; residual.elements()]);
        device::download(device, stream, residual, streams.last_mut().expect("one was pushed"))
    });
    pass.map_err(said)?;
    let vocab = model.config.vocab;
    let all = logits(&mut decoder);
    let mut rest = all.as_slice();
    for (found, sequence) in found.iter_mut().zip(&batch) {
        let (own, others) = rest.split_at(sequence.tokens.len() * vocab);
        found.extend_from_slice(own);
        rest = others;
    }

    if batch[0].tokens.len() == stored.prompt.len() && row.sequences == 1 {
        for (layer, stream) in streams.iter().enumerate() {
            if let Some(expected) = stored.floats.get(&format!("hidden.{layer}")) {
                let what = format!("the residual stream after layer {layer}");
                near(&what, stream, expected, model.config.hidden, tolerance, 0)?;
            }
        }
    }
    let expected = &stored.floats["logits"];
    // Of a model with a large vocabulary only the prompt's last are stored.
    let (end, first) = (stored.prompt.len() * vocab, stored.prompt.len() - expected.len() / vocab);
    let mut most = 0.0f64;
    for (i, found) in found.iter().enumerate() {
        let what = format!("sequence {i}: the logits");
        most = most.max(near(&what, &found[first * vocab..end], expected, vocab, tolerance, first)?);
    }
    continued(&mut decoder, &texts, &whole, kept_in)?;
    Ok(most)
}

fn placed<D: Kernels>(device: &D, model: &Model, row: &Row, context: usize) -> Result<Decoder<D>, String> {
    let ([n_gpu, n_cpu_pinned, n_cpu], [batch_gpu, batch_cpu_pinned, batch_cpu]) = (row.rings, row.batches);
    let (reader, cache) = (row.reader, row.cache);
    let settings = Settings { n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, reader, cache };
    let mut model = model.clone();
    model.tables = row.tables;
    let units = model.placement(&settings).tiers.len();
    let tiers = row.tiers.iter().copied().cycle().take(units).collect();
    model.place(&Placement { tiers, statics: row.tables.word().into(), settings: settings.clone() }).map_err(said)?;
    Decoder::new(device, &model, &settings, row.sequences, context).map_err(said)
}

fn said(error: Error) -> String {
    error.to_string()
}

/// Compares rows of `width` values, of which the first is that of this position.
fn near(
    what: &str,
    found: &[f32],
    expected: &[f32],
    width: usize,
    tolerance: f64,
    first: usize,
) -> Result<f64, String> {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} values, {} expected", found.len(), expected.len()));
    }
    let off = distance(found, expected);
    // Not a number is not near.
    if off <= tolerance {
        return Ok(off);
    }
    let of_row = |(a, b)| distance(a, b);
    let rows: Vec<_> = found.chunks(width).zip(expected.chunks(width)).map(of_row).collect();
    let worst = |of: &mut dyn Iterator<Item = f64>| {
        let found = of.enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b));
        found.map_or(0, |(index, _)| index)
    };
    let row = worst(&mut rows.iter().copied());
    let (a, b) = (&found[row * width..][..width], &expected[row * width..][..width]);
    let column = worst(&mut a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())));
    let (position, a, b, off_there) = (first + row, a[column], b[column], rows[row]);
    Err(format!(
        "{what}: off by {off:.1e}, tolerated {tolerance:.1e}; most at position {position}, by {off_there:.1e}: \
         value {column} is {a}, expected {b}"
    ))
}

/// Continues the texts of the pass before, to the end of `whole`.
fn continued<D: Kernels>(
    decoder: &mut Decoder<D>,
    texts: &[&[u32]],
    whole: &[u32],
    kept_in: impl Fn(usize) -> usize,
) -> Result<(), String> {
    let rows: Vec<_> = (0..texts.len()).map(&kept_in).collect();
    let mut found = vec![Vec::new(); texts.len()];
    let most = whole.len() - texts[0].len();
    let decoded = decoder.decode(&rows, most, &[], Choice::Greedy, |row, token| {
        let i = kept_in(row);
        found[i].push(token);
        let whole = texts[i].len() + found[i].len() == whole.len();
        Ok::<_, Error>(if whole { std::ops::ControlFlow::Break(()) } else { std::ops::ControlFlow::Continue(()) })
    });
    decoded.map_err(said)?;
    for (i, (text, found)) in texts.iter().zip(&found).enumerate() {
        let expected = &whole[text.len()..];
        if found != expected {
            let wrong = found.iter().zip(expected).take_while(|(a, b)| a == b).count();
            let position = text.len() + wrong;
            return Err(format!("sequence {i}: at position {position} other tokens: {found:?}, expected {expected:?}"));
        }
    }
    Ok(())
}
