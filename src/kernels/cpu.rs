//! The kernels on the CPU: plain loops that a compiler vectorises, spread over threads by rayon, and matrix products by
//! the `gemm` crates, which picks the widest instructions that the machine has (AVX-512, AVX2, …) at run time. The threads are the kernels'
//! own: one that cannot be started is an error of the call that wants it, and the next call tries again.
//!
//! **Invariant** for every `unsafe` here: a tensor view of the CPU device stands for aligned, allocated memory, as its
//! constructor demanded; inputs are not written and outputs are no one else's while the kernel runs, in the caller's thread.

use std::{
    cell::RefCell,
    io, slice,
    sync::{Arc, OnceLock},
};

use gemm_common::Parallelism;
use gemm_f32::gemm::f32::get_gemm_fn;
use half::{bf16, f16};
use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};

use super::{Kernels, Precision, Ragged, RopeLayout, call::*, fit::check};
use crate::{
    device::{Cpu, CpuStream, TensorMut, TensorRef},
    dtype::{self, DType, Element},
    error::{Error, Result},
};

/// Least work, in multiplications, that is worth another thread.
const PER_THREAD: usize = 1 << 15;

/// Activations and cache are F32, and weights are widened where they are used.
const PRECISION: Precision = Precision { activation: DType::F32, cache: DType::F32, weight: None };

/// F32 elements of the panel that a thread widens weights into: a part of the cache for a few tokens, and for many, where
/// the panel is read often, as much as makes the product efficient.
const PANEL: [usize; 2] = [1 << 17, 1 << 20];

thread_local! {
    static WIDENED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

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

/// The threads of all CPU kernels of the process: as many as there are processors, or as RAYON_NUM_THREADS says.
///
/// # Errors
/// [`Error::Thread`] where they cannot be started.
fn pool() -> Result<&'static ThreadPool> {
    static POOL: OnceLock<ThreadPool> = OnceLock::new();
    if let Some(pool) = POOL.get() {
        return Ok(pool);
    }
    let failed = |error| Error::Thread { stage: "kernels", source: Arc::new(io::Error::other(error)) };
    let pool = ThreadPoolBuilder::new().thread_name(|number| format!("ls-kernels-{number}")).build().map_err(failed)?;
    // Of two that are made at once, one is kept.
    Ok(POOL.get_or_init(|| pool))
}

/// Whether to spread `work` multiplications over threads.
fn parallel(work: usize) -> bool {
    work >= 2 * PER_THREAD
}

/// Calls `f` with the number and the content of each row of `out`, in parallel if that pays.
fn for_rows(out: &mut [f32], width: usize, work: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) -> Result<()> {
    if width > 0 && parallel(work) {
        pool()?.install(|| out.par_chunks_mut(width).enumerate().for_each(|(index, row)| f(index, row)));
    } else if width > 0 {
        out.chunks_mut(width).enumerate().for_each(|(index, row)| f(index, row));
    }
    Ok(())
}

/// Sums `f` over the indices in sixteen lanes, which vectorises and loses less than one running sum.
fn lanes(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let whole = len / 16 * 16;
    for start in (0..whole).step_by(16) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += f(start + lane);
        }
    }
    sums.iter().sum::<f32>() + (whole..len).map(f).sum::<f32>()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let b = &b[..a.len()];
    lanes(a.len(), |i| a[i] * b[i])
}

fn norm_factor(x: &[f32], eps: f32) -> f32 {
    1.0 / (lanes(x.len(), |i| x[i] * x[i]) / x.len() as f32 + eps).sqrt()
}

/// `out[t, n] = Σ x[t, k] · weight[n, k]` for dense `x [T, K]` and `weight [N, K]`, in this thread; rows of `out` are `stride`
/// elements apart. With `adds` it is added to what is there.
///
/// # Safety
/// The matrices are what their sizes say, and nothing else uses `out`.
#[rustfmt::skip]
pub(crate) unsafe fn product(
    [tokens, k, n]: [usize; 3],
    x: *const f32,
    weight: *const f32,
    (out, stride): (*mut f32, usize),
    adds: bool,
) {
    let (k_step, stride, none) = (k as isize, stride as isize, Parallelism::None);
    // The transpose, `weight · xᵀ`, since the crate's kernels write columns: each matrix with its steps to the next column and row.
    // SAFETY: the caller promises that `x`, `weight` and `out` have as many elements as the sizes and steps say, and that nothing
    // else uses `out`.
    unsafe {
        get_gemm_fn()(
            n, tokens, k,
            out, stride, 1, adds,
            weight, 1, k_step,
            x, k_step, 1,
            1.0, 1.0, false, false, false, none,
        );
    }
}

impl Kernels for Cpu {
    fn precision(&self) -> Precision {
        PRECISION
    }

    fn scratch_bytes(&self) -> usize {
        // The widened panel, and as much again for what `gemm` packs.
        // Without threads nothing is computed at all, which the first kernel says.
        pool().map_or(1, ThreadPool::current_num_threads) * 2 * PANEL[1] * size_of::<f32>()
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
            Call::Swiglu(Swiglu { gate, up }) => gated(gate, up, |gate, up| gate * (up / (1.0 + (-gate).exp()))),
            Call::Geglu(Geglu { gate, up }) => gated(gate, up, |gate, up| gelu(gate) * up),
            Call::Scale(Scale { x, factor }) => in_place(x, |x| x * factor),
            Call::SoftCap(SoftCap { x, cap }) => in_place(x, |x| soft_cap(x, cap)),
            Call::Add(call) => add(call),
            Call::AppendKv(call) => append_kv(call),
            Call::Attention(call) => attention(call),
            Call::Gather(Gather { x, indices, out, .. }) => copy_rows(x, indices, out),
            Call::Argmax(call) => argmax(call),
        }
    }
}

fn cast(Cast { x, out }: Cast<'_, Cpu>) -> Result<()> {
    // SAFETY: the view stands for that many bytes, which have no alignment and which nobody else uses while a kernel runs.
    let dst = unsafe { slice::from_raw_parts_mut(out.ptr().as_ptr(), out.bytes()) };
    dtype::convert(x.dtype(), raw(x), out.dtype(), dst);
    Ok(())
}

fn rms_norm(RmsNorm { x, weight, offset, eps, mut out, H: width }: RmsNorm<'_, Cpu>) -> Result<()> {
    let (weight, work) = (Weight::new(weight), x.elements());
    let x = read::<f32>(x);
    for_rows(write(&mut out), width, work, |index, row| {
        let x = &x[index * width..][..width];
        let factor = norm_factor(x, eps);
        row.iter_mut().enumerate().for_each(|(i, out)| *out = x[i] * factor * (offset + weight.at(i)));
    })?;
    Ok(())
}

fn add_rms_norm(AddRmsNorm { mut residual, y, weight, offset, eps, out, H }: AddRmsNorm<'_, Cpu>) -> Result<()> {
    add(Add { residual: residual.borrow(), y })?;
    rms_norm(RmsNorm { x: residual.as_ref(), weight, offset, eps, out, H })
}

fn rms_norm_in_place(RmsNormInPlace { mut x, weight, offset, eps, H: width }: RmsNormInPlace<'_, Cpu>) -> Result<()> {
    let (weight, work) = (Weight::new(weight), x.elements());
    for_rows(write(&mut x), width, work, |_, row| {
        let factor = norm_factor(row, eps);
        row.iter_mut().enumerate().for_each(|(i, x)| *x *= factor * (offset + weight.at(i)));
    })?;
    Ok(())
}

fn linear(Linear { x, weight, bias, mut out, T: tokens, K: k, N: n }: Linear<'_, Cpu>) -> Result<()> {
    let bias = bias.map(Weight::new);
    if tokens * n == 0 {
        return Ok(());
    }
    let (x, out) = (read::<f32>(x), ProductColumns(write::<f32>(&mut out).as_mut_ptr()));
    let (dtype, bytes) = (weight.dtype(), raw(weight));
    let row_bytes = k * dtype.size();
    let panel = PANEL[usize::from(tokens >= 16)];
    // A product over panels of weight rows: each is widened where it is needed, then multiplied, by one thread.
    let threads = pool()?.current_num_threads();
    let rows = (panel / k.max(1)).clamp(1, n.div_ceil(threads).next_multiple_of(8));
    let one = |first: usize| {
        let rows = rows.min(n - first);
        let multiply = |panel: *const f32| {
            if let Some(bias) = bias {
                for token in 0..tokens {
                    for row in first..first + rows {
                        // SAFETY: (token, row) is inside [T, N], and this panel's columns are this call's alone.
                        unsafe { *out.at(token * n + row) = bias.at(row) };
                    }
                }
            }
            // SAFETY: `out` holds tokens × rows from `first` on at stride n, `x` tokens × k, `panel` rows × k.
            unsafe { product([tokens, k, rows], x.as_ptr(), panel, (out.at(first), n), bias.is_some()) };
        };
        let source = &bytes[first * row_bytes..][..rows * row_bytes];
        if dtype == DType::F32 {
            return multiply(source.as_ptr().cast());
        }
        WIDENED.with_borrow_mut(|widened| {
            // As large as it may ever be at once, so that it is allocated once a thread.
            widened.resize(widened.len().max(panel).max(rows * k), 0.0);
            // SAFETY: the vector holds rows × k elements of F32.
            let dst = unsafe { slice::from_raw_parts_mut(widened.as_mut_ptr().cast::<u8>(), rows * k * 4) };
            dtype::convert(dtype, source, DType::F32, dst);
            multiply(widened.as_ptr());
        });
    };
    let panels = n.div_ceil(rows);
    if parallel(tokens * n * k) {
        pool()?.install(|| (0..panels).into_par_iter().for_each(|index| one(index * rows)));
    } else {
        (0..panels).for_each(|index| one(index * rows));
    }
    Ok(())
}

fn rope(call: Rope<'_, Cpu>) -> Result<()> {
    let Rope { x, positions, inv_freq, scale, layout, mut out, T: tokens, heads, D: size, half } = call;
    // Pair `i` is made of elements `i · step` and `i · step + apart`.
    let (step, apart) = match layout {
        RopeLayout::Halves => (1, half),
        RopeLayout::Interleaved => (2, 1),
    };
    let (positions, inv_freq) = (read::<u32>(positions), read::<f32>(inv_freq));
    let (x, width) = (read::<f32>(x), heads * size);
    for_rows(write(&mut out), width, tokens * width * 8, |token, row| {
        let x = &x[token * width..][..width];
        for (head, x) in row.chunks_mut(size).zip(x.chunks(size)) {
            head[2 * half..].copy_from_slice(&x[2 * half..]);
        }
        for (i, &frequency) in inv_freq.iter().enumerate() {
            let (sin, cos) = (positions[token] as f32 * frequency).sin_cos();
            let (sin, cos) = (sin * scale, cos * scale);
            let (first, second) = (i * step, i * step + apart);
            for (head, x) in row.chunks_mut(size).zip(x.chunks(size)) {
                let (a, b) = (x[first], x[second]);
                head[first] = a * cos - b * sin;
                head[second] = b * cos + a * sin;
            }
        }
    })?;
    Ok(())
}

/// `gate = f(gate, up)`, element by element.
fn gated(
    mut gate: TensorMut<'_, Cpu>,
    up: TensorRef<'_, Cpu>,
    f: impl Fn(f32, f32) -> f32 + Sync + Send,
) -> Result<()> {
    let (up, width) = (read::<f32>(up), up.shape().last().copied().unwrap_or(1));
    for_rows(write(&mut gate), width, up.len() * 8, |index, row| {
        let up = &up[index * width..][..width];
        row.iter_mut().zip(up).for_each(|(gate, up)| *gate = f(*gate, *up));
    })
}

/// The form with a hyperbolic tangent.
fn gelu(x: f32) -> f32 {
    // √(2/π)
    const ROOT: f32 = 0.797_884_6;
    0.5 * x * (1.0 + (ROOT * (x + 0.044715 * x * x * x)).tanh())
}

fn soft_cap(x: f32, cap: f32) -> f32 {
    cap * (x / cap).tanh()
}

/// `x = f(x)`, element by element.
fn in_place(mut x: TensorMut<'_, Cpu>, f: impl Fn(f32) -> f32 + Sync + Send) -> Result<()> {
    // The logits of a token are one row, which is too much for one thread.
    const PIECE: usize = 4096;
    let work = x.elements() * 8;
    for_rows(write(&mut x), PIECE, work, |_, piece| piece.iter_mut().for_each(|x| *x = f(*x)))
}

fn add(Add { mut residual, y }: Add<'_, Cpu>) -> Result<()> {
    write::<f32>(&mut residual).iter_mut().zip(read::<f32>(y)).for_each(|(x, y)| *x += y);
    Ok(())
}

fn append_kv(call: AppendKv<'_, Cpu>) -> Result<()> {
    let AppendKv { block, batch, mut cache, T, G: kv_heads, D: size, rows, capacity, .. } = call;
    let (block, cache) = (read::<f32>(block), write::<f32>(&mut cache));
    for sequence in sequences("append_kv", batch, [T, rows, capacity])? {
        let first = sequence.kv_len - sequence.tokens.len();
        for (place, token) in (first..).zip(sequence.tokens.clone()) {
            for kv_head in 0..kv_heads {
                let source = &block[(token * kv_heads + kv_head) * size..][..size];
                cache[((sequence.row * kv_heads + kv_head) * capacity + place) * size..][..size]
                    .copy_from_slice(source);
            }
        }
    }
    Ok(())
}

fn attention(call: Attention<'_, Cpu>) -> Result<()> {
    let Attention { q, keys, values, batch, mask, mut out, T, HQ: heads, G: kv_heads, D: size, rows, capacity, .. } =
        call;
    let (q, keys, values) = (read::<f32>(q), read::<f32>(keys), read::<f32>(values));
    let mut rest = write::<f32>(&mut out);
    for sequence in sequences("attention", batch, [T, rows, capacity])? {
        let (part, after) = rest.split_at_mut(sequence.tokens.len() * heads * size);
        rest = after;
        let work = part.len() * sequence.kv_len;
        for_rows(part, size, work, |index, out| {
            let (token, head) = (index / heads, index % heads);
            let end = sequence.kv_len - sequence.tokens.len() + token + 1;
            let start = mask.window.map_or(0, |window| end.saturating_sub(window));
            let lane = (sequence.row * kv_heads + head * kv_heads / heads) * capacity * size;
            let query = &q[((sequence.tokens.start + token) * heads + head) * size..][..size];
            let row = |cache: &'_ [f32], place: usize| -> std::ops::Range<usize> {
                debug_assert!(lane + place * size < cache.len());
                lane + place * size..lane + (place + 1) * size
            };
            SCORES.with_borrow_mut(|scores| {
                scores.clear();
                scores.extend((start..end).map(|place| dot(query, &keys[row(keys, place)]) * mask.scale));
                if let Some(cap) = mask.soft_cap {
                    scores.iter_mut().for_each(|score| *score = soft_cap(*score, cap));
                }
                let greatest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.iter_mut().for_each(|score| *score = (*score - greatest).exp());
                let sum = lanes(scores.len(), |i| scores[i]);
                out.fill(0.0);
                for (score, place) in scores.iter().zip(start..) {
                    let weight = score / sum;
                    out.iter_mut().zip(&values[row(values, place)]).for_each(|(out, value)| *out += weight * value);
                }
            });
        })?;
    }
    Ok(())
}

fn argmax(Argmax { x, mut out, V: width, .. }: Argmax<'_, Cpu>) -> Result<()> {
    for (row, out) in read::<f32>(x).chunks(width.max(1)).zip(write::<u32>(&mut out)) {
        let better = |best: usize, index: usize| if row[index] > row[best] { index } else { best };
        *out = (0..width).reduce(better).unwrap_or(0) as u32;
    }
    Ok(())
}

/// Rows of `table`, of a type that widens to F32; the last one for indices beyond.
fn copy_rows(table: TensorRef<'_, Cpu>, indices: TensorRef<'_, Cpu>, mut out: TensorMut<'_, Cpu>) -> Result<()> {
    let (width, bytes, indices) = (out.shape()[1], raw(table), read::<u32>(indices));
    let (rows, row_bytes) = (table.shape()[0], width * table.dtype().size());
    for (row, &index) in write::<f32>(&mut out).chunks_mut(width.max(1)).zip(indices) {
        let source = &bytes[(index as usize).min(rows - 1) * row_bytes..][..row_bytes];
        // SAFETY: a row of F32 is that many bytes.
        let row = unsafe { slice::from_raw_parts_mut(row.as_mut_ptr().cast::<u8>(), width * 4) };
        dtype::convert(table.dtype(), source, DType::F32, row);
    }
    Ok(())
}

/// Where a product is written: threads fill distinct columns.
#[derive(Clone, Copy)]
struct ProductColumns(*mut f32);

// SAFETY: each thread writes its own columns only.
unsafe impl Send for ProductColumns {}
// SAFETY: through a shared reference, too, each thread writes its own columns only, and nobody reads them meanwhile.
unsafe impl Sync for ProductColumns {}

impl ProductColumns {
    /// # Safety
    /// `index` is inside the output.
    unsafe fn at(self, index: usize) -> *mut f32 {
        // SAFETY: the caller promises that `index` is inside the output, where the pointer starts.
        unsafe { self.0.add(index) }
    }
}

/// One sequence of a batch, checked.
struct CheckedSequence {
    tokens: std::ops::Range<usize>,
    kv_len: usize,
    row: usize,
}

/// The sequences of a batch of so many tokens, beside a cache of so many rows and places in each.
fn sequences<'a>(
    kernel: &'static str,
    batch: Ragged<'a, Cpu>,
    [tokens, rows, capacity]: [usize; 3],
) -> Result<impl Iterator<Item = CheckedSequence> + 'a> {
    let (offsets, lens, places) = (read::<u32>(batch.q_offsets), read::<u32>(batch.kv_lens), read::<u32>(batch.rows));
    let sequences = lens.len();
    let consistent = offsets[0] == 0 && offsets[sequences] as usize == tokens && offsets.is_sorted();
    check(kernel, consistent, || format!("offsets {offsets:?} of {tokens} tokens, {sequences} lengths"))?;
    let sequence = |i: usize| CheckedSequence {
        tokens: offsets[i] as usize..offsets[i + 1] as usize,
        kv_len: lens[i] as usize,
        row: places[i] as usize,
    };
    for s in (0..sequences).map(sequence) {
        check(kernel, s.row < rows && s.tokens.len() <= s.kv_len && s.kv_len <= capacity, || {
            format!(
                "{} tokens of row {} with {} cached do not fit {rows} rows of {capacity}",
                s.tokens.len(),
                s.row,
                s.kv_len
            )
        })?;
    }
    Ok((0..sequences).map(sequence))
}
