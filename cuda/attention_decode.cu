// Attention of a few tokens: reading the cache is all the time it takes. A block is a warp that takes one token, the query
// heads that share a key head (up to 16, which are the rows of a tensor core's tile), and some parts of the context. What
// the parts come to is added up by another kernel.
#include <limits.h>
#include <math.h>

#include "attention.cuh"

namespace lsk {
namespace {

// Query heads of a block, at most.
constexpr int kHeads = 16;

template <int D>
struct Shape {
  static constexpr int kQueryBytes = kHeads * D * 2, kBytes = kQueryBytes + 3 * kKeys<D> * D * 2;
  // Blocks that a multiprocessor of an H100 holds: 227 KiB of shared memory, a KiB of each block is the system's; and 32.
  static constexpr int kMost = 227 * 1024 / (kBytes + 1024), kResident = kMost < 32 ? kMost : 32;
};

// The sums and the state in a place of token `number` of the launch. The scratch has [tiles, some_heads, places, size]
// sums, then [.., places] State.
__device__ inline float* sums_at(const Attention& call, int size, int64_t number, int head, int place) {
  return call.scratch + ((number * call.some_heads + head - call.first_head) * call.places + place) * size;
}

__device__ inline State* state_at(const Attention& call, int size, int64_t number, int head, int place) {
  float* const states = call.scratch + int64_t(call.tiles) * call.some_heads * call.places * size;
  return reinterpret_cast<State*>(states) + (number * call.some_heads + head - call.first_head) * call.places + place;
}

// With kCap, scores are capped: apart, so that the others need no register for it.
template <int D, bool kCap>
__global__ void __launch_bounds__(32) decode(Attention call, int splits) {
  using Shape = Shape<D>;
  LSK_DYNAMIC_SHARED(shared);
  const int share = call.heads / call.kv_heads, chunks = (share + kHeads - 1) / kHeads;
  const int split = int(blockIdx.x) % splits, block = int(blockIdx.x) / splits;
  const int chunk = block % chunks, groups = call.some_heads / share, number = block / chunks / groups;
  const int kv_head = call.first_head / share + block / chunks % groups;
  const int head = kv_head * share + chunk * kHeads, heads = min(share - chunk * kHeads, kHeads);
  Tile tile;
  if (!find_tile(call, call.first_tile + number, 1, &tile)) return;
  const int begin = first_key<D>(call, tile), end = tile.past + 1;
  const int first = begin / kPart, parts = (end - 1) / kPart - first + 1;

  const int lane = int(threadIdx.x);
  copy_tile<D, kHeads, 32>(shared, call.q + (int64_t(tile.token) * call.heads + head) * D, D, heads, lane);
  // Where this lane reads queries, as in Softmax::add.
  const char* const query_row = shared + (lane & 15) * D * 2;
  const int place = ((lane >> 4) ^ swizzle<D>(lane & 15)) * 16;
  const auto query = [&](int step, uint32_t(&a)[1][4]) { ldmatrix_x4(a[0], query_row + (step * 32 ^ place)); };
  for (int part = split; part < parts; part += splits) {
    const int from = part == 0 ? begin : (first + part) * kPart, to = min(end, (first + part + 1) * kPart);
    const auto ended = [&](auto& softmax, int, bool) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = h * 8 + lane / 4, column = lane % 4 * 2;
        if (row >= heads) continue;
        if (parts == 1) {
          const float factor = 1.0f / softmax.d[0][h];
          lsk_bf16* const out = call.out + (int64_t(tile.token) * call.heads + head + row) * D + column;
#pragma unroll
          for (int n = 0; n < D / 8; ++n) {
            *reinterpret_cast<uint32_t*>(out + n * 8) =
                pack_bf16(softmax.sums[0][n][2 * h] * factor, softmax.sums[0][n][2 * h + 1] * factor);
          }
          continue;
        }
        float* const sums = sums_at(call, D, number, head + row, part) + column;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          *reinterpret_cast<float2*>(sums + n * 8) =
              make_float2(softmax.sums[0][n][2 * h], softmax.sums[0][n][2 * h + 1]);
        }
        if (lane % 4 == 0) *state_at(call, D, number, head + row, part) = {softmax.m[0][h], softmax.d[0][h]};
      }
    };
    char* const tiles = shared + Shape::kQueryBytes;
    attend<D, 1, 32, kCap, false>(call, tiles, tile.pages, kv_head, from, to, tile.past, query, ended);
    // All lanes are done with the tiles.
    __syncwarp();
  }
}

// The shares of 32 parts, one a lane: `later` is this lane's, and `before` what the parts before all of them came to; then
// what they came to together. Of that there is only the maximum, and whether it is of any keys: d is 1 or 0.
__device__ inline Shares add_states(State* before, State later) {
  const int lane = int(threadIdx.x) % 32;
  // Maxima are exact in any order. Those of no keys do not count.
  float most = later.d == 0.0f ? -INFINITY : later.m;
  if (lane == 0 && before->d != 0.0f) most = fmaxf(most, before->m);
  for (int distance = 1; distance < 32; distance *= 2) {
    const float below = __shfl_up_sync(kWarp, most, distance);
    if (lane >= distance) most = fmaxf(most, below);
  }
  const float below = __shfl_up_sync(kWarp, most, 1);
  State own = *before;
  if (lane > 0) own = {below, below == -INFINITY ? 0.0f : 1.0f};
  const Shares shares = add_state(&own, later);
  before->m = __shfl_sync(kWarp, most, 31);
  before->d = before->m == -INFINITY ? 0.0f : 1.0f;
  return shares;
}

// Adds up the parts of a token's head, a column a thread. The sums of 32 parts are on their way while those of 32 are added.
template <int D>
__global__ void __launch_bounds__(D) combine(Attention call) {
  const int number = int(blockIdx.x) / call.some_heads, head = call.first_head + int(blockIdx.x) % call.some_heads;
  Tile tile;
  if (!find_tile(call, call.first_tile + number, 1, &tile)) return;
  const int parts = tile.past / kPart - first_key<D>(call, tile) / kPart + 1, lane = int(threadIdx.x) % 32;
  if (parts == 1) return;
  const State* const states = state_at(call, D, number, head, 0);
  const float* const partial = sums_at(call, D, number, head, 0) + int(threadIdx.x);
  float next[32], now[32];
  State next_state;
  const auto load = [&](int base) {
    next_state = base + lane < parts ? states[base + lane] : State{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 32; ++i) next[i] = base + i < parts ? partial[int64_t(base + i) * D] : 0.0f;
  };
  load(0);
  State most = {-INFINITY, 0.0f};
  float sum = 0.0f, d = 0.0f;
  for (int base = 0; base < parts; base += 32) {
    const State state = next_state;
#pragma unroll
    for (int i = 0; i < 32; ++i) now[i] = next[i];
    load(base + 32);
    const Shares own = add_states(&most, state);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      if (i % 8 == 0 && base + i >= parts) break;
      const Shares shares = {__shfl_sync(kWarp, own.before, i), __shfl_sync(kWarp, own.later, i)};
      d = add_sum(d, __shfl_sync(kWarp, state.d, i), shares);
      sum = add_sum(sum, now[i], shares);
    }
  }
  store(call.out + (int64_t(tile.token) * call.heads + head) * D + int(threadIdx.x),
        Vec<lsk_bf16, 1>{__float2bfloat16_rn(sum * (1.0f / d))});
}

// Calls `launch` for tokens and heads, in groups of `share`, as many at a time as have room in the scratch.
template <typename Launch>
cudaError_t in_pieces(Attention call, int size, int share, size_t scratch_bytes, Launch launch) {
  // Tokens, each with one head, that there is room for. A context of one part takes none.
  const int64_t one = int64_t(call.places) * int64_t(size * sizeof(float) + sizeof(State));
  const int64_t room = call.places == 1 ? int64_t(call.tokens) * call.heads : int64_t(scratch_bytes) / one;
  const int64_t heads = room < call.heads ? room / share * share : call.heads;
  if (heads == 0) return cudaErrorInvalidValue;
  const int64_t together = heads < call.heads ? 1 : room / heads;
  for (int64_t token = 0; token < call.tokens; token += together) {
    for (int64_t head = 0; head < call.heads; head += heads) {
      call.first_tile = int(token), call.tiles = int(call.tokens - token < together ? call.tokens - token : together);
      call.first_head = int(head), call.some_heads = int(call.heads - head < heads ? call.heads - head : heads);
      const cudaError_t error = launch(call);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

template <int D>
cudaError_t launch(Attention call, size_t scratch_bytes, cudaStream_t stream) {
  const int share = call.heads / call.kv_heads, chunks = (share + kHeads - 1) / kHeads;
  const int64_t most = call.sequence_pages > 0 ? (int64_t(call.sequence_pages) * LSK_PAGE + kPart - 1) / kPart : 1;
  call.places = int(most);
  return in_pieces(call, D, share, scratch_bytes, [&](const Attention& call) {
    const int64_t blocks = int64_t(call.tiles) * chunks * (call.some_heads / share);
    // Four waves, if there are so many parts: contexts are of any length.
    const int64_t wanted = int64_t(scratch_bytes / kScratch) * Shape<D>::kResident * 4 / blocks + 1;
    const int splits = int(wanted < most ? wanted : most);
    if (blocks * splits > INT_MAX || int64_t(call.tiles) * call.some_heads > INT_MAX) return cudaErrorInvalidValue;
    const cudaError_t error =
        lsk_launch(call.bend > 0.0f ? decode<D, true> : decode<D, false>, dim3(unsigned(blocks * splits)), dim3(32),
                   Shape<D>::kBytes, stream, call, splits);
    if (error != cudaSuccess || most == 1) return error;
    return lsk_launch(combine<D>, dim3(unsigned(call.tiles * call.some_heads)), dim3(D), 0, stream, call);
  });
}

}  // namespace

cudaError_t attention_decode(Attention call, int size, size_t scratch_bytes, cudaStream_t stream) {
  return with_size(size, [&](auto d) { return launch<decltype(d)::value>(call, scratch_bytes, stream); });
}

}  // namespace lsk

size_t lsk_attention_scratch(int multiprocessors) {
  return multiprocessors > 0 ? size_t(multiprocessors) * lsk::kScratch : 0;
}

cudaError_t lsk_attention(lsk_bf16* out, const lsk_bf16* q, const lsk_bf16* keys, const lsk_bf16* values,
                          const uint32_t* q_offsets, const uint32_t* kv_lens, const uint32_t* pages, int sequences,
                          int sequence_pages, int tokens, int heads, int kv_heads, int size, float scale,
                          int64_t window, float soft_cap, void* scratch, size_t scratch_bytes, cudaStream_t stream) {
  constexpr float kLog2E = 1.44269504088896341f;
  // With a cap, scores become cap · tanh(scale / cap · score).
  const float bend = soft_cap != 0.0f ? scale / soft_cap * 2.0f * kLog2E : 0.0f;
  // A greatest score is found before it is scaled, so the scale keeps order.
  const bool valid = sequences >= 0 && tokens >= 0 && heads > 0 && kv_heads > 0 && heads % kv_heads == 0 &&
                     sequence_pages >= 0 && int64_t(sequences) * sequence_pages <= INT_MAX &&
                     sequence_pages <= INT_MAX / LSK_PAGE && scale > 0.0f && window >= 0 && soft_cap >= 0.0f &&
                     isfinite(bend);
  if (!valid) return cudaErrorInvalidValue;
  if (tokens == 0) return cudaSuccess;
  lsk::Attention call = {};
  call.out = out;
  call.q = q, call.keys = keys, call.values = values;
  call.q_offsets = q_offsets, call.kv_lens = kv_lens, call.pages = pages;
  call.sequences = sequences, call.sequence_pages = sequence_pages;
  call.tokens = tokens, call.heads = heads, call.kv_heads = kv_heads;
  call.scale = (soft_cap > 0.0f ? soft_cap : scale) * kLog2E, call.bend = bend;
  call.window = window == 0 || window > INT_MAX ? INT_MAX : int(window);
  call.scratch = static_cast<float*>(scratch);
  if (scratch == nullptr) scratch_bytes = 0;
  return tokens <= (sequences > 8 ? sequences : 8) ? lsk::attention_decode(call, size, scratch_bytes, stream)
                                                   : lsk::attention_prefill(call, size, scratch_bytes, stream);
}

static const Loader loader([] {
  return lsk::with_sizes([](auto d) {
    constexpr int D = decltype(d)::value;
    return load_kernels(lsk::decode<D, false>, lsk::decode<D, true>, lsk::combine<D>);
  });
});
