//! The kernels, one row each: what it is called, its dimensions, and its arguments in order. From a row follow the method of
//! [`Kernels`](super::Kernels), its checks, its variant of [`Call`](super::call::Call) and how the C API passes it on.
//!
//! | argument | what |
//! | --- | --- |
//! | `x: read TYPE [shape]` | a tensor that is read; `batch: read Ragged [S, P]` stands for its three |
//! | `x: write TYPE [shape]` | a tensor that is written, or read and written |
//! | `x: maybe TYPE [shape]` | a tensor that is read if there is one |
//! | `x: value TYPE` | anything else |
//!
//! Types are those of [`Type`](super::fit::Type). A dimension has the same size wherever it is named, and `..` stands for the
//! same leading dimensions. What else must hold follows as `where CONDITION, MESSAGE;`.

/// Hands all rows to another macro.
macro_rules! kernels {
    ($then:ident) => {
        $then! {
            /// Converts `x` into `out`, of the same shape: F32, F16, BF16, F8E4M3 or blocks of quantised weights → F32 or BF16.
            cast Cast [] {
                x: read Any [..],
                out: write Any [..],
            }
            where x.dtype() == out.dtype() || x.dtype().converts_to(out.dtype()),
                "no conversion from {} to {}", x.dtype(), out.dtype();

            /// Looks up rows: `out[t] = table[ids[t]]`, with `table [V, H]` a weight, `ids [T]` U32, `out [T, H]` F32. Ids from
            /// `V` on are the caller's error: what they give is unspecified.
            embed Embed [V, H, T] {
                table: read Matrix [V, H],
                ids: read U32 [T],
                out: write F32 [T, H],
            }
            where V > 0 || T == 0, "the table has no rows";

            /// Root mean square norm over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467):
            /// `out = x / sqrt(mean(x²) + eps) · (offset + weight)`, with `x [.., H]` F32 (the residual stream), `weight [H]`
            /// and `out [.., H]` an activation, rounded once. `offset` is 0 for most models, and 1 for Gemma.
            rms_norm RmsNorm [H] {
                x: read F32 [.., H],
                weight: read Weight [H],
                offset: value f32,
                eps: value f32,
                out: write Activation [.., H],
            }

            /// `residual += y`, then the norm of it: [`add`](Kernels::add) and [`rms_norm`](Kernels::rms_norm), which a device
            /// may do in one go.
            add_rms_norm AddRmsNorm [H] {
                residual: write F32 [.., H],
                y: read Activation [.., H],
                weight: read Weight [H],
                offset: value f32,
                eps: value f32,
                out: write Activation [.., H],
            }

            /// The norm of `x [.., H]`, F32, in place, for each head of a query or key, or for all of a token's at once.
            rms_norm_in_place RmsNormInPlace [H] {
                x: write F32 [.., H],
                weight: read Weight [H],
                offset: value f32,
                eps: value f32,
            }

            /// `out = x · weightᵀ + bias`, with activations `x [T, K]` and `out [T, N]`, `weight [N, K]`, `bias [N]`. `out` may
            /// be F32 instead, for logits and for what [`rope`](Kernels::rope) takes. On a GPU the first product of a shape with more than
            /// 16 rows waits for the stream.
            linear Linear [T, K, N] {
                x: read Activation [T, K],
                weight: read Matrix [N, K],
                bias: maybe Weight [N],
                out: write ActivationOrF32 [T, N],
            }

            /// Rotary position embedding (Su et al. 2021, arXiv:2104.09864): pair `i` of a head, by `layout`, turns by
            /// `positions[t] · inv_freq[i]` and becomes `scale` times as long, 1 for most models. The first `2 · half` elements
            /// of a head are in pairs, up to all `D`; the others are passed on as they are. `x [T, heads, D]` F32,
            /// `positions [T]` U32, `inv_freq [half]` F32, and `out [T, heads, D]` an activation: queries and keys are rounded
            /// here, once, since attention makes more of their errors than any other part.
            rope Rope [T, heads, D, half] {
                x: read F32 [T, heads, D],
                positions: read U32 [T],
                inv_freq: read F32 [half],
                scale: value f32,
                layout: value RopeLayout,
                out: write Activation [T, heads, D],
            }
            where half <= D / 2, "{half} frequencies for heads of {D}";

            /// `gate = silu(gate) · up` in place (Shazeer 2020, arXiv:2002.05202), activations of one shape.
            swiglu Swiglu [] {
                gate: write Activation [..],
                up: read Activation [..],
            }

            /// `gate = gelu(gate) · up` in place, with the form of GELU that has a hyperbolic tangent (Hendrycks and Gimpel
            /// 2016, arXiv:1606.08415): `x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))`. Activations of one shape.
            geglu Geglu [] {
                gate: write Activation [..],
                up: read Activation [..],
            }

            /// `x *= factor` in place: an activation, or F32.
            scale Scale [] {
                x: write ActivationOrF32 [..],
                factor: value f32,
            }

            /// `x = cap · tanh(x / cap)` in place, F32 (Gemma 2's report, arXiv:2408.00118).
            soft_cap SoftCap [] {
                x: write F32 [..],
                cap: value f32,
            }
            where cap > 0.0 && cap.is_finite(), "a cap of {cap}, expected a number above 0";

            /// `residual += y`, of one shape: `residual` F32, `y` an activation.
            add Add [] {
                residual: write F32 [..],
                y: read Activation [..],
            }

            /// Writes the block's keys or values `[T, G, D]` to their places in one layer's `cache [pages, G, PAGE, D]`, with
            /// [`PAGE`](crate::kernels::PAGE) tokens to a page.
            append_kv AppendKv [T, G, D, S, P, pages, page] {
                block: read Activation [T, G, D],
                batch: read Ragged [S, P],
                cache: write Cache [pages, G, page, D],
            }
            where G > 0, "block is {:?} but the cache {:?}", block.shape(), cache.shape();
            where page == PAGE, "the cache is {:?}, expected pages of {PAGE} tokens", cache.shape();

            /// Causal attention of the block's queries over the cache, grouped heads (Ainslie et al. 2023, arXiv:2305.13245):
            /// query head `h` of `HQ` uses key head `h · G / HQ`. `q` and `out [T, HQ, D]`, `keys` and
            /// `values [pages, G, PAGE, D]`, with [`PAGE`](crate::kernels::PAGE) tokens to a page.
            attention Attention [T, HQ, D, S, P, pages, G, page] {
                q: read Activation [T, HQ, D],
                keys: read Cache [pages, G, page, D],
                values: read Cache [pages, G, page, D],
                batch: read Ragged [S, P],
                mask: value AttentionMask,
                out: write Activation [T, HQ, D],
            }
            where G > 0 && HQ.is_multiple_of(G), "q is {:?} but the cache {:?}", q.shape(), keys.shape();
            where page == PAGE, "the cache is {:?}, expected pages of {PAGE} tokens", keys.shape();
            where mask.window != Some(0), "a window of 0, in which a token does not see itself";
            where mask.soft_cap.is_none_or(|cap| cap > 0.0 && cap.is_finite()),
                "a soft cap of {}, expected a number above 0", mask.soft_cap.unwrap_or_default();

            /// Copies rows of the residual stream: `out[i] = x[indices[i]]`, with `x [T, H]` F32, `indices [R]` U32, `out [R, H]`
            /// F32.
            gather Gather [T, H, R] {
                x: read F32 [T, H],
                indices: read U32 [R],
                out: write F32 [R, H],
            }
            where T > 0 || R == 0, "the table has no rows";

            /// The index of each row's greatest element, the first if there are several, or `u32::MAX` of a row with a NaN: `x [R, V]`
            /// F32, `out [R]` U32.
            argmax Argmax [R, V] {
                x: read F32 [R, V],
                out: write U32 [R],
            }
            where R == 0 || V > 0, "x is {:?}: rows without an element", x.shape();
        }
    };
}
pub(super) use kernels;
