//! The kernels on the CPU: F32 in vectors as wide as the machine has ([`lanes`]), spread over threads
//! ([`pool`](mod@crate::device::pool)). One thread that cannot be started is an error of the call that wants it, and the next call
//! tries again.
//!
//! **Invariant** for every `unsafe` here: a tensor view of the CPU device stands for aligned, allocated memory, as its
//! constructor demanded; inputs are not written and outputs are no one else's while the kernel runs, in the caller's thread.

mod attention;
mod blocks;
#[cfg(target_arch = "x86_64")]
mod digits;
mod lanes;
mod math;
mod product;
mod room;
mod rope;
mod rows;
mod split;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::{ops::Range, slice};

use half::{bf16, f16};

use super::{Kernels, PAGE, Precision, Ragged, call::*, fit::check};
use crate::{
    device::{Cpu, CpuStream, TensorMut, TensorRef, pool::pool},
    dtype::{DType, Element},
    error::Result,
};
use lanes::Vectors;
use product::Product;
use rope::Turn;
use rows::{Convert, Each, Elements, Greatest, Norm};
use split::Pieces;
#[cfg(target_arch = "x86_64")]
use {
    digits::Instructions,
    tiles::{Amx, Twin},
};

/// Least work, in multiplications, that is worth another thread.
const PER_THREAD: usize = 1 << 15;

/// Activations and cache are F32, and weights are widened where they are used.
const PRECISION: Precision = Precision { activation: DType::F32, cache: DType::F32, weight: None };

/// The elements of a tensor, whose type the kernel's row has.
fn read<'a, T: Element>(tensor: TensorRef<'a, Cpu>) -> &'a [T] {
    assert_eq!(tensor.dtype(), T::DTYPE);
    // SAFETY: the view stands for that many aligned elements of this type, and nobody writes them while a kernel runs.
    unsafe { slice::from_raw_parts(tensor.ptr().as_ptr().cast(), tensor.elements()) }
}

fn write<'a, T: Element>(tensor: &'a mut TensorMut<'_, Cpu>) -> &'a mut [T] {
    assert_eq!(tensor.dtype(), T::DTYPE);
    // SAFETY: the view stands for that many aligned elements of this type; nobody else reads or writes them while a kernel
    // runs, and `tensor` is borrowed for as long as the slice.
    unsafe { slice::from_raw_parts_mut(tensor.ptr().as_ptr().cast(), tensor.elements()) }
}

fn raw(tensor: TensorRef<'_, Cpu>) -> &[u8] {
    // SAFETY: the view stands for that many bytes, which have no alignment and which nobody writes while a kernel runs.
    unsafe { slice::from_raw_parts(tensor.ptr().as_ptr(), tensor.bytes()) }
}

/// The weight of a product.
#[derive(Clone, Copy)]
enum Matrix<'a> {
    Plain(Weight<'a>),
    /// Of this type of blocks.
    Blocks(DType, &'a [u8]),
}

impl<'a> Matrix<'a> {
    fn new(tensor: TensorRef<'a, Cpu>) -> Self {
        match tensor.dtype() {
            dtype if dtype.is_blocks() => Self::Blocks(dtype, raw(tensor)),
            _ => Self::Plain(Weight::new(tensor)),
        }
    }
}

/// A weight, read one element or one row at a time as F32.
#[derive(Clone, Copy)]
enum Weight<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl<'a> Weight<'a> {
    fn new(tensor: TensorRef<'a, Cpu>) -> Self {
        match tensor.dtype() {
            DType::F32 => Self::F32(read(tensor)),
            DType::F16 => Self::F16(read(tensor)),
            DType::BF16 => Self::BF16(read(tensor)),
            other => unreachable!("weights of type {other} are refused"),
        }
    }

    fn at(self, index: usize) -> f32 {
        match self {
            Self::F32(x) => x[index],
            Self::F16(x) => x[index].to_f32(),
            Self::BF16(x) => x[index].to_f32(),
        }
    }
}

/// Whether to spread `work` multiplications over threads.
fn parallel(work: usize) -> bool {
    work >= 2 * PER_THREAD
}

/// Calls `f` with the numbers of some `rows` at a time, in parallel if that pays for so much work in all.
fn for_ranges(rows: usize, work: usize, f: impl Fn(Range<usize>) + Sync) -> Result<()> {
    if !parallel(work) {
        f(0..rows);
        return Ok(());
    }
    // Several for each thread, so that none waits long for the last.
    let pool = pool()?;
    let some = rows.div_ceil(4 * pool.size()).max(rows * PER_THREAD / 4 / work).max(1);
    pool.deal(rows.div_ceil(some), |piece| f(piece * some..rows.min((piece + 1) * some)));
    Ok(())
}

/// Calls `f` with some rows of a weight of `n` and some of the tokens at a time, in parallel if that pays for so much work in all:
/// with as many of each as `piece` says for so many threads.
fn for_parts(
    n: usize,
    tokens: Range<usize>,
    work: usize,
    piece: impl FnOnce(usize) -> [usize; 2],
    f: impl Fn(Range<usize>, Range<usize>) + Sync,
) -> Result<()> {
    if !parallel(work) {
        f(0..n, tokens);
        return Ok(());
    }
    let pool = pool()?;
    let [high, wide] = piece(pool.size());
    let across = tokens.len().div_ceil(wide);
    pool.deal(n.div_ceil(high) * across, |piece| {
        let (row, token) = (piece / across * high, tokens.start + piece % across * wide);
        f(row..n.min(row + high), token..tokens.end.min(token + wide));
    });
    Ok(())
}

/// Calls `f` with the number and the content of each row of `out`, in parallel if that pays.
fn for_rows(out: &mut [f32], width: usize, work: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Result<()> {
    let (rows, out) = (out.len().div_ceil(width.max(1)), Parts::new(out));
    for_ranges(rows, work, |rows| {
        for row in rows {
            // SAFETY: each row is given to one thread only, and `out` is this call's.
            f(row, unsafe { out.slice(row * width, width.min(out.len - row * width)) });
        }
    })
}

impl Kernels for Cpu {
    fn precision(&self) -> Precision {
        PRECISION
    }

    #[cfg(target_arch = "x86_64")]
    fn prepare(&self, _: &CpuStream) -> Result<()> {
        if Amx::wanted()?.is_some() { tiles::prepare() } else { Ok(()) }
    }

    /// As much as stays in the caches.
    fn block_tokens(&self, _token_bytes: usize) -> usize {
        256
    }

    fn scratch_bytes(&self) -> usize {
        #[cfg(target_arch = "x86_64")]
        // What is wrong with the setting is told by what prepares or computes.
        let tiles = if let Ok(Some(_)) = Amx::wanted() { tiles::SCRATCH_BYTES } else { 0 };
        #[cfg(not(target_arch = "x86_64"))]
        let tiles = 0;
        room::BYTES + tiles
    }

    /// How many threads there are does not matter.
    fn arithmetic(&self) -> String {
        let vectors = Vectors::widest().name();
        #[cfg(target_arch = "x86_64")]
        let more =
            [Instructions::widest().map(|_| ", whole numbers"), Amx::wanted().ok().flatten().map(|_| " and AMX")];
        #[cfg(not(target_arch = "x86_64"))]
        let more = [None::<&str>];
        format!("cpu ({vectors}{})", more.into_iter().flatten().collect::<String>())
    }

    fn compute(&self, _: &CpuStream, call: Call<'_, Cpu>) -> Result<()> {
        match call {
            Call::Cast(call) => cast(call),
            Call::Embed(Embed { table, ids, out, .. }) => copy_rows(table, ids, out),
            Call::RmsNorm(call) => rms_norm(call),
            Call::AddRmsNorm(call) => add_rms_norm(call),
            Call::RmsNormInPlace(call) => rms_norm_in_place(call),
            Call::Linear(call) => linear(call),
            Call::Rope(call) => rope(call),
            Call::Swiglu(Swiglu { gate, up }) => each_with(gate, up, Each::Swiglu),
            Call::Geglu(Geglu { gate, up }) => each_with(gate, up, Each::Geglu),
            Call::Scale(Scale { mut x, factor }) => each(&mut x, |_| Each::Scale(factor)),
            Call::SoftCap(SoftCap { mut x, cap }) => each(&mut x, |_| Each::SoftCap(cap)),
            Call::Add(Add { residual, y }) => each_with(residual, y, Each::Add),
            Call::AppendKv(call) => append_kv(call),
            Call::Attention(call) => attention(call),
            Call::Gather(Gather { x, indices, out, .. }) => copy_rows(x, indices, out),
            Call::Argmax(call) => argmax(call),
        }
    }
}

fn cast(Cast { x, out }: Cast<'_, Cpu>) -> Result<()> {
    let (from, to, count, vectors) = (x.dtype(), out.dtype(), x.elements(), Vectors::widest());
    // SAFETY: the view stands for that many bytes, which have no alignment and which nobody else uses while a kernel runs.
    let dst = Parts::new(unsafe { slice::from_raw_parts_mut(out.ptr().as_ptr(), out.bytes()) });
    let src = raw(x);
    for_ranges(count.div_ceil(SOME), count, |pieces| {
        let (first, end) = (pieces.start * SOME, count.min(pieces.end * SOME));
        // SAFETY: each piece is given to one thread only, and the output is this call's.
        let dst = unsafe { dst.slice(to.bytes(first), to.bytes(end - first)) };
        vectors.run(Convert { from, src: &src[from.bytes(first)..from.bytes(end)], to, dst });
    })
}

fn rms_norm(RmsNorm { x, weight, offset, eps, mut out, H: width }: RmsNorm<'_, Cpu>) -> Result<()> {
    let (weight, work, vectors) = (Weight::new(weight), x.elements(), Vectors::widest());
    let x = read::<f32>(x);
    for_rows(write(&mut out), width, work, |index, out| {
        let x = Some(&x[index * width..][..width]);
        vectors.run(Norm { x, weight, offset, eps, out });
    })
}

fn add_rms_norm(AddRmsNorm { mut residual, y, weight, offset, eps, out, H }: AddRmsNorm<'_, Cpu>) -> Result<()> {
    each_with(residual.borrow(), y, Each::Add)?;
    rms_norm(RmsNorm { x: residual.as_ref(), weight, offset, eps, out, H })
}

fn rms_norm_in_place(RmsNormInPlace { mut x, weight, offset, eps, H: width }: RmsNormInPlace<'_, Cpu>) -> Result<()> {
    let (weight, work, vectors) = (Weight::new(weight), x.elements(), Vectors::widest());
    for_rows(write(&mut x), width, work, |_, out| vectors.run(Norm { x: None, weight, offset, eps, out }))
}

fn linear(Linear { x, weight, bias, mut out, T: tokens, K: k, N: n }: Linear<'_, Cpu>) -> Result<()> {
    let (x, weight, bias) = (read::<f32>(x), Matrix::new(weight), bias.map(Weight::new));
    let (product, vectors) = (Product { x, weight, bias, tokens, k, stride: n }, Vectors::widest());
    let out = Parts::new(write::<f32>(&mut out));
    #[cfg(target_arch = "x86_64")]
    if let (Matrix::Plain(Weight::BF16(weight)), Some(amx), true) = (weight, Amx::wanted()?, tiles::take(k)) {
        // SAFETY: `out` is [T, N], and this call's.
        return unsafe {
            match tokens {
                1 => tiles::multiply(Twin::of(amx), &product, weight, n, out),
                _ => tiles::multiply(amx, &product, weight, n, out),
            }
        };
    }
    #[cfg(target_arch = "x86_64")]
    if let (Matrix::Blocks(dtype, weight), Some(instructions)) = (weight, Instructions::widest())
        && digits::take(dtype)
        && k > 0
    {
        // SAFETY: `out` is [T, N], and this call's.
        return unsafe { digits::multiply(instructions, &product, (dtype, weight), n, out) };
    }
    // SAFETY: `out` is [T, N], and each part of it is given to one thread only.
    let part = |rows: Range<usize>, some: Range<usize>| unsafe { product.part(vectors, rows, some, out) };
    for_parts(n, 0..tokens, tokens * n * k, |threads| product.piece(n, threads), part)
}

fn rope(call: Rope<'_, Cpu>) -> Result<()> {
    let Rope { x, positions, inv_freq, scale, layout, mut out, T: tokens, heads, D: size, .. } = call;
    let (positions, inv_freq) = (read::<u32>(positions), read::<f32>(inv_freq));
    let (x, width, vectors) = (read::<f32>(x), heads * size, Vectors::widest());
    for_rows(write(&mut out), width, tokens * width * 4, |token, out| {
        let x = &x[token * width..][..width];
        vectors.run(Turn { x, position: positions[token], inv_freq, scale, layout, size, out });
    })
}

/// Elements that are computed at a time.
const SOME: usize = 4096;

/// `x = each(x)`, element by element; `each` is given a range of them.
fn each<'a>(x: &mut TensorMut<'_, Cpu>, each: impl Fn(Range<usize>) -> Each<'a> + Sync) -> Result<()> {
    let (work, vectors) = (x.elements() * 8, Vectors::widest());
    for_rows(write(x), SOME, work, |index, x| {
        let each = each(index * SOME..index * SOME + x.len());
        vectors.run(Elements { x, each });
    })
}

/// The same with another tensor.
fn each_with<'a>(mut x: TensorMut<'_, Cpu>, y: TensorRef<'a, Cpu>, with: fn(&'a [f32]) -> Each<'a>) -> Result<()> {
    let y = read::<f32>(y);
    each(&mut x, |part| with(&y[part]))
}

fn append_kv(call: AppendKv<'_, Cpu>) -> Result<()> {
    let AppendKv { block, batch, mut cache, T, G: kv_heads, D: size, P, pages, .. } = call;
    let (block, cache) = (read::<f32>(block), write::<f32>(&mut cache));
    for sequence in Sequences::new("append_kv", batch, [T, P, pages])?.iter() {
        let first = sequence.kv_len - sequence.tokens.len();
        for (place, token) in (first..).zip(sequence.tokens.clone()) {
            for kv_head in 0..kv_heads {
                let source = &block[(token * kv_heads + kv_head) * size..][..size];
                cache[sequence.at(place, (kv_head, kv_heads)) * size..][..size].copy_from_slice(source);
            }
        }
    }
    Ok(())
}

fn attention(call: Attention<'_, Cpu>) -> Result<()> {
    let Attention { q, keys, values, batch, mask, mut out, T, HQ: heads, G: kv_heads, D: size, P, pages, .. } = call;
    let pieces = Pieces {
        q: read(q),
        keys: read(keys),
        values: read(values),
        mask,
        out: Parts::new(write(&mut out)),
        sequences: Sequences::new("attention", batch, [T, P, pages])?,
        heads,
        kv_heads,
        size,
        vectors: Vectors::widest(),
    };
    if parallel(pieces.work()) {
        pieces.deal(pool()?)
    } else {
        pieces.here()
    }
    Ok(())
}

fn argmax(Argmax { x, mut out, V: width, .. }: Argmax<'_, Cpu>) -> Result<()> {
    /// Most pieces of a row.
    const PIECES: usize = 64;
    let (vectors, len) = (Vectors::widest(), width.div_ceil(PIECES).max(SOME));
    for (row, out) in read::<f32>(x).chunks(width.max(1)).zip(write::<u32>(&mut out)) {
        let mut greatest = [f32::NEG_INFINITY; PIECES];
        let pieces = width.div_ceil(len);
        for_rows(&mut greatest[..pieces], 1, width, |piece, greatest| {
            greatest[0] = vectors.run(Greatest(&row[piece * len..width.min((piece + 1) * len)]));
        })?;
        let (piece, most) = greatest[..pieces]
            .iter()
            .enumerate()
            .fold((0, f32::NEG_INFINITY), |best, (piece, &x)| if x > best.1 || x.is_nan() { (piece, x) } else { best });
        // Nothing equals a NaN.
        let place = row[piece * len..].iter().position(|&x| x == most);
        *out = place.map_or(u32::MAX, |place| (piece * len + place) as u32);
    }
    Ok(())
}

/// Rows of `table`, of a type that widens to F32; the last one for indices beyond.
fn copy_rows(table: TensorRef<'_, Cpu>, indices: TensorRef<'_, Cpu>, mut out: TensorMut<'_, Cpu>) -> Result<()> {
    let (width, from, src, indices) = (out.shape()[1], table.dtype(), raw(table), read::<u32>(indices));
    let (rows, row_bytes, work, vectors) =
        (table.shape()[0], from.bytes(width), indices.len() * width, Vectors::widest());
    for_rows(write(&mut out), width, work, |row, out| {
        let src = &src[(indices[row] as usize).min(rows - 1) * row_bytes..][..row_bytes];
        // SAFETY: a row of F32 is that many bytes, and is borrowed mutably.
        let dst = unsafe { slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), width * 4) };
        vectors.run(Convert { from, src, to: DType::F32, dst });
    })
}

/// An output of which each thread writes its own parts.
#[derive(Clone, Copy)]
struct Parts<T = f32> {
    start: *mut T,
    len: usize,
}

// SAFETY: threads write parts that do not overlap, as those promise who ask for them.
unsafe impl<T: Send> Send for Parts<T> {}
// SAFETY: as above, through shared references too.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    fn new(out: &mut [T]) -> Self {
        Self { start: out.as_mut_ptr(), len: out.len() }
    }

    /// # Panics
    /// If the part does not lie in the output.
    ///
    /// # Safety
    /// The output is still there, and nobody else uses this part as long as the slice is.
    unsafe fn slice<'a>(self, at: usize, len: usize) -> &'a mut [T] {
        assert!(at <= self.len && len <= self.len - at, "{len} elements from {at} on, of {}", self.len);
        // SAFETY: the part lies in the output, which the caller promises is there, and nobody else's.
        unsafe { slice::from_raw_parts_mut(self.start.add(at), len) }
    }
}

/// One sequence of a batch, checked.
struct CheckedSequence<'a> {
    tokens: Range<usize>,
    kv_len: usize,
    pages: &'a [u32],
}

impl CheckedSequence<'_> {
    /// Which of the rows of all pages and heads the cache has for a place of the sequence and one of so many heads. Those of the
    /// places behind it follow, up to the page's end.
    fn at(&self, place: usize, (kv_head, kv_heads): (usize, usize)) -> usize {
        (self.pages[place / PAGE] as usize * kv_heads + kv_head) * PAGE + place % PAGE
    }

    /// The places in the cache that the token sees, of this number among the new ones.
    fn sees(&self, token: usize, window: Option<usize>) -> Range<usize> {
        let end = self.kv_len - self.tokens.len() + token + 1;
        window.map_or(0, |window| end.saturating_sub(window))..end
    }
}

/// The sequences of a batch, checked.
#[derive(Clone, Copy)]
struct Sequences<'a> {
    offsets: &'a [u32],
    lens: &'a [u32],
    pages: &'a [u32],
    /// Of each sequence in the table.
    width: usize,
}

impl<'a> Sequences<'a> {
    /// Those of a batch of so many tokens, with so many pages each in the table, beside a cache of so many.
    fn new(kernel: &'static str, batch: Ragged<'a, Cpu>, [tokens, width, pages]: [usize; 3]) -> Result<Self> {
        let all = Self { offsets: read(batch.q_offsets), lens: read(batch.kv_lens), pages: read(batch.pages), width };
        let (offsets, count) = (all.offsets, all.len());
        let consistent = offsets[0] == 0 && offsets[count] as usize == tokens && offsets.is_sorted();
        check(kernel, consistent, || format!("offsets {offsets:?} of {tokens} tokens, {count} lengths"))?;
        for s in all.iter() {
            let (new, of) = (s.tokens.len(), s.kv_len.div_ceil(PAGE));
            check(kernel, new <= s.kv_len && of <= width, || {
                format!("{new} tokens of {} in the cache do not fit {width} pages of {PAGE}", s.kv_len)
            })?;
            let beyond = s.pages[..of].iter().find(|&&page| page as usize >= pages);
            check(kernel, beyond.is_none(), || {
                format!("page {} of a cache of {pages} pages", beyond.copied().unwrap_or_default())
            })?;
        }
        Ok(all)
    }

    fn len(&self) -> usize {
        self.lens.len()
    }

    /// Tokens of all of them.
    fn tokens(&self) -> usize {
        self.offsets[self.len()] as usize
    }

    fn get(&self, number: usize) -> CheckedSequence<'a> {
        let [start, end] = [number, number + 1].map(|at| self.offsets[at] as usize);
        let pages = &self.pages[number * self.width..][..self.width];
        CheckedSequence { tokens: start..end, kv_len: self.lens[number] as usize, pages }
    }

    fn iter(self) -> impl Iterator<Item = CheckedSequence<'a>> + 'a {
        (0..self.len()).map(move |number| self.get(number))
    }
}
