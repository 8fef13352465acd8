// Quantised weights in blocks → F32 or BF16. src/dtype/blocks.rs says what a block holds, and computes the same bits.
//
// A thread block takes a tile of whole blocks. Their bytes, which are too odd in number to be read from global memory as they
// are, go to shared memory by wide copies; from there each thread takes eight neighbouring weights at a time, its share. The
// codes of a share are brought to a byte each, four to a word, all at once.
#include "bits.cuh"
#include "mma.cuh"

namespace {

constexpr int kTile = 8192, kThreads = 256, kShare = 8;

// Eight neighbours: scale * (code - the type's kBias) + least. Products are exact in F32 (a scale of 11 bits, times 12 at most),
// so that it does not matter whether the compiler makes one instruction of both steps. To add -0 changes nothing.
struct Share {
  uint2 codes;
  float scale;
  float least = -0.0f;
};

__device__ inline float half_at(const char* at) { return widen(*reinterpret_cast<const __half*>(at)); }

__device__ inline uint32_t byte_at(const char* at) { return static_cast<unsigned char>(*at); }

// Eight bytes of a block, aligned to 8 or 4 where the length of blocks, kBytes, is a multiple of that. Otherwise they are taken
// from three aligned words, of which the last may lie behind the tile.
template <int kBytes>
__device__ inline uint2 eight_at(const char* at) {
  if constexpr (kBytes % 8 == 0) {
    return *reinterpret_cast<const uint2*>(at);
  } else if constexpr (kBytes % 4 == 0) {
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(at);
    return {words[0], words[1]};
  } else {
    const int off = int(reinterpret_cast<uintptr_t>(at) % 4);
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(at - off);
    return {__funnelshift_r(words[0], words[1], 8 * off), __funnelshift_r(words[1], words[2], 8 * off)};
  }
}

// Some bits of each byte, those of the mask once they are shifted.
__device__ inline uint2 bits_of(uint2 bytes, uint32_t shift, uint32_t mask) {
  return {bytes.x >> shift & mask, bytes.y >> shift & mask};
}

__device__ inline uint2 either(uint2 a, uint2 b) { return {a.x | b.x, a.y | b.y}; }

__device__ inline uint2 times(uint2 bytes, uint32_t factor) { return {bytes.x * factor, bytes.y * factor}; }

// The codes of a share of 32 weights: those of the first half are in the lower halves of 16 bytes, the others in the upper ones.
template <int kBytes>
__device__ inline uint2 by_halves(const char* codes, uint32_t part) {
  return bits_of(eight_at<kBytes>(codes + part % 2 * kShare), part / 2 * 4, 0x0f0f0f0f);
}

// Eight bits as the fifth ones of eight codes.
__device__ inline uint2 fifths(uint32_t bits) {
  return {(bits & 15) * 0x02040810 & 0x10101010, (bits >> 4) * 0x02040810 & 0x10101010};
}

// What four codes of four bits stand for, by a table of 16 bytes.
__device__ inline uint32_t look_up(const uint32_t (&table)[4], uint32_t codes) {
  const uint32_t which = permute(codes | codes >> 4, 0, 0x4420);
  const uint32_t low = permute(table[0], table[1], which & 0x7777), high = permute(table[2], table[3], which & 0x7777);
  // A code's highest bit, eight times: it is the sign of a byte here.
  return choose(permute(codes << 4, 0, 0xba98), high, low);
}

__device__ inline uint2 look_up(const uint32_t (&table)[4], uint2 codes) {
  return {look_up(table, codes.x), look_up(table, codes.y)};
}

// Numbers from -128 to 127, 128 more each, as four bytes.
constexpr int kSigned = 128;
__device__ constexpr uint32_t four(int a, int b, int c, int d) {
  return uint32_t(a + kSigned) | uint32_t(b + kSigned) << 8 | uint32_t(c + kSigned) << 16 | uint32_t(d + kSigned) << 24;
}

__device__ inline uint2 iq4(uint2 codes) {
  const uint32_t table[] = {four(-127, -104, -83, -65), four(-49, -35, -22, -10), four(1, 13, 25, 38), four(53, 69, 89, 113)};
  return look_up(table, codes);
}

// Twice the numbers of E2M1.
__device__ inline uint2 e2m1(uint2 codes) {
  const uint32_t table[] = {four(0, 1, 2, 3), four(4, 6, 8, 12), four(0, -1, -2, -3), four(-4, -6, -8, -12)};
  return look_up(table, codes);
}

// A type of blocks: how many weights and bytes a block has, how much greater its codes are than what they stand for, and a share
// of a block by its number.
template <int kWeightsOf, int kBytesOf, int kBiasOf>
struct Blocks {
  static constexpr int kWeights = kWeightsOf, kBytes = kBytesOf, kBias = kBiasOf;
  static_assert(kTile / kWeights * kBytes % 16 == 0, "tiles begin where wide copies may");
};

struct Q4_0 : Blocks<32, 18, 8> {
  __device__ static Share share(const char* block, uint32_t part) {
    return {by_halves<kBytes>(block + 2, part), half_at(block)};
  }
};

struct Q4_1 : Blocks<32, 20, 0> {
  __device__ static Share share(const char* block, uint32_t part) {
    return {by_halves<kBytes>(block + 4, part), half_at(block), half_at(block + 2)};
  }
};

struct Q5_0 : Blocks<32, 22, 16> {
  __device__ static Share share(const char* block, uint32_t part) {
    return {either(by_halves<kBytes>(block + 6, part), fifths(byte_at(block + 2 + part))), half_at(block)};
  }
};

struct Q5_1 : Blocks<32, 24, 0> {
  __device__ static Share share(const char* block, uint32_t part) {
    const uint2 codes = either(by_halves<kBytes>(block + 8, part), fifths(byte_at(block + 4 + part)));
    return {codes, half_at(block), half_at(block + 2)};
  }
};

struct Q8_0 : Blocks<32, 34, kSigned> {
  __device__ static Share share(const char* block, uint32_t part) {
    const uint2 codes = eight_at<kBytes>(block + 2 + part * kShare);
    return {{codes.x ^ 0x80808080, codes.y ^ 0x80808080}, half_at(block)};
  }
};

struct IQ4_NL : Blocks<32, 18, kSigned> {
  __device__ static Share share(const char* block, uint32_t part) {
    return {iq4(by_halves<kBytes>(block + 2, part)), half_at(block)};
  }
};

struct MXFP4 : Blocks<32, 17, kSigned> {
  __device__ static Share share(const char* block, uint32_t part) {
    // Half of 2^(exponent - 127), since the codes' numbers are doubled; the least two are subnormal.
    const uint32_t exponent = byte_at(block);
    const uint32_t scale = exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23;
    return {e2m1(by_halves<kBytes>(block + 1, part)), __uint_as_float(scale)};
  }
};

// The scale of 32 weights and what is taken off them, by six bits each of the twelve bytes, for 256 weights, behind `block`.
__device__ inline void six_bits(const char* block, uint32_t at, float* scale, float* least) {
  const char* const packed = block + 4 + at % 4;
  const uint32_t low = byte_at(packed), mid = byte_at(packed + 4), high = byte_at(packed + 8);
  const bool first = at < 4;
  const uint32_t scales = first ? low & 63 : (high & 15) | low >> 6 << 4;
  const uint32_t minimums = first ? mid & 63 : high >> 4 | mid >> 6 << 4;
  *scale = half_at(block) * float(int(scales));
  *least = -(half_at(block + 2) * float(int(minimums)));
}

struct Q4_K : Blocks<256, 144, 0> {
  __device__ static Share share(const char* block, uint32_t part) {
    const uint32_t at = part / 4;
    const uint2 codes = eight_at<kBytes>(block + 16 + at / 2 * 32 + part % 4 * kShare);
    Share share = {bits_of(codes, at % 2 * 4, 0x0f0f0f0f), 0};
    six_bits(block, at, &share.scale, &share.least);
    return share;
  }
};

struct Q5_K : Blocks<256, 176, 0> {
  __device__ static Share share(const char* block, uint32_t part) {
    const uint32_t at = part / 4;
    const uint2 codes = eight_at<kBytes>(block + 48 + at / 2 * 32 + part % 4 * kShare);
    const uint2 fifths = bits_of(eight_at<kBytes>(block + 16 + part % 4 * kShare), at, 0x01010101);
    Share share = {either(bits_of(codes, at % 2 * 4, 0x0f0f0f0f), times(fifths, 16)), 0};
    six_bits(block, at, &share.scale, &share.least);
    return share;
  }
};

// The types below have a scale for 16 weights.

struct Q2_K : Blocks<256, 84, 0> {
  __device__ static Share share(const char* block, uint32_t part) {
    const uint32_t at = part / 2;
    const uint2 codes = eight_at<kBytes>(block + 16 + at / 8 * 32 + part % 4 * kShare);
    const uint32_t scales = byte_at(block + at);
    return {bits_of(codes, at % 8 / 2 * 2, 0x03030303), half_at(block + 80) * float(int(scales & 15)),
            -(half_at(block + 82) * float(int(scales >> 4)))};
  }
};

struct Q3_K : Blocks<256, 110, 4> {
  __device__ static Share share(const char* block, uint32_t part) {
    const uint32_t at = part / 2;
    const char* const scales = block + 96;
    const uint32_t low = byte_at(scales + at % 8) >> at / 8 * 4 & 15, high = byte_at(scales + 8 + at % 4) >> at / 4 * 2 & 3;
    const uint2 codes = bits_of(eight_at<kBytes>(block + 32 + at / 8 * 32 + part % 4 * kShare), at % 8 / 2 * 2, 0x03030303);
    const uint2 thirds = bits_of(eight_at<kBytes>(block + part % 4 * kShare), at / 2, 0x01010101);
    return {either(codes, times(thirds, 4)), half_at(block + 108) * float(int(low | high << 4) - 32)};
  }
};

struct Q6_K : Blocks<256, 210, 32> {
  __device__ static Share share(const char* block, uint32_t part) {
    // Of 128 weights, four times 32: the lower halves of 64 bytes, then the upper ones.
    const uint32_t large = part / 16, quarter = part / 4 % 4, eighth = part % 4 * kShare;
    const uint2 codes = eight_at<kBytes>(block + large * 64 + quarter % 2 * 32 + eighth);
    const uint2 upper = eight_at<kBytes>(block + 128 + large * 32 + eighth);
    const int scale = static_cast<signed char>(block[192 + part / 2]);
    return {either(bits_of(codes, quarter / 2 * 4, 0x0f0f0f0f), times(bits_of(upper, quarter * 2, 0x03030303), 16)),
            half_at(block + 208) * float(scale)};
  }
};

struct IQ4_XS : Blocks<256, 136, kSigned> {
  __device__ static Share share(const char* block, uint32_t part) {
    const uint32_t at = part / 4;
    const uint32_t low = byte_at(block + 4 + at / 2) >> at % 2 * 4 & 15;
    const uint32_t high = byte_at(block + 2 + at / 4) >> at % 4 * 2 & 3;
    return {iq4(by_halves<kBytes>(block + 8 + at * 16, part % 4)), half_at(block) * float(int(low | high << 4) - 32)};
  }
};

// The weights of a share. A byte becomes a number as the last bits of 2^23 + byte.
template <int kBias>
__device__ inline void expand_share(const Share& share, float (&weights)[kShare]) {
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const uint32_t bits = permute(i < 4 ? share.codes.x : share.codes.y, 0x4b000000, 0x7440 + i % 4);
    weights[i] = share.scale * (__uint_as_float(bits) - float((1 << 23) + kBias)) + share.least;
  }
}

__device__ inline bool is_wide(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// A tile's bytes, copied by the whole thread block.
__device__ inline void fetch(char* tile, const char* from, int bytes) {
  const int wide = is_wide(from) ? bytes / 16 * 16 : 0;
#pragma unroll 1  // three times at most
  for (int at = int(threadIdx.x) * 16; at < wide; at += kThreads * 16) cp_async_16(tile + at, from + at, true);
  for (int at = wide + int(threadIdx.x); at < bytes; at += kThreads) tile[at] = from[at];
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
}

template <typename Type>
constexpr int kTileBytes = kTile / Type::kWeights * Type::kBytes;

template <typename Type, typename Out>
__global__ void __launch_bounds__(kThreads) expand(Out* out, const char* blocks, size_t n) {
  LSK_DYNAMIC_SHARED(tile);
  const size_t first = size_t(blockIdx.x) * kTile;
  const int weights = n - first < kTile ? int(n - first) : kTile;
  fetch(tile, blocks + size_t(blockIdx.x) * kTileBytes<Type>, weights / Type::kWeights * Type::kBytes);
  // Shares of a thread are the same part of several blocks.
  constexpr uint32_t kParts = Type::kWeights / kShare;
  static_assert(kThreads % kParts == 0, "threads share out whole blocks");
  const char* const block = tile + threadIdx.x / kParts * Type::kBytes;
  out += first;
  const bool wide = is_wide(out);
#pragma unroll
  for (int i = 0; i < kTile / (kThreads * kShare); ++i) {
    const int at = (i * kThreads + int(threadIdx.x)) * kShare;
    if (at >= weights) return;
    float values[kShare];
    const Share share = Type::share(block + i * (kThreads / kParts * Type::kBytes), threadIdx.x % kParts);
    expand_share<Type::kBias>(share, values);
    if (wide) {
      store_eight(out + at, values);
    } else {
#pragma unroll
      for (int j = 0; j < kShare; ++j) narrow(values[j], out + at + j);
    }
  }
}

template <typename Type, typename Out>
cudaError_t launch(void* out, const void* blocks, size_t n, cudaStream_t stream) {
  if (n % Type::kWeights != 0) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  // With a word that the last share may read.
  return lsk_launch(expand<Type, Out>, dim3(unsigned((n + kTile - 1) / kTile)), dim3(kThreads), kTileBytes<Type> + 4, stream,
                    static_cast<Out*>(out), static_cast<const char*>(blocks), n);
}

template <typename Out>
cudaError_t launch_to(void* out, const void* blocks, int type, size_t n, cudaStream_t stream) {
  switch (type) {
    case LSK_Q4_0: return launch<Q4_0, Out>(out, blocks, n, stream);
    case LSK_Q4_1: return launch<Q4_1, Out>(out, blocks, n, stream);
    case LSK_Q5_0: return launch<Q5_0, Out>(out, blocks, n, stream);
    case LSK_Q5_1: return launch<Q5_1, Out>(out, blocks, n, stream);
    case LSK_Q8_0: return launch<Q8_0, Out>(out, blocks, n, stream);
    case LSK_Q2_K: return launch<Q2_K, Out>(out, blocks, n, stream);
    case LSK_Q3_K: return launch<Q3_K, Out>(out, blocks, n, stream);
    case LSK_Q4_K: return launch<Q4_K, Out>(out, blocks, n, stream);
    case LSK_Q5_K: return launch<Q5_K, Out>(out, blocks, n, stream);
    case LSK_Q6_K: return launch<Q6_K, Out>(out, blocks, n, stream);
    case LSK_IQ4_NL: return launch<IQ4_NL, Out>(out, blocks, n, stream);
    case LSK_IQ4_XS: return launch<IQ4_XS, Out>(out, blocks, n, stream);
    case LSK_MXFP4: return launch<MXFP4, Out>(out, blocks, n, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename... Types>
cudaError_t load_all() {
  const cudaError_t error = load_kernels(expand<Types, float>...);
  return error != cudaSuccess ? error : load_kernels(expand<Types, __nv_bfloat16>...);
}

}  // namespace

cudaError_t lsk_expand(void* out, int out_dtype, const void* blocks, int type, size_t n, cudaStream_t stream) {
  switch (out_dtype) {
    case LSK_F32: return launch_to<float>(out, blocks, type, n, stream);
    case LSK_BF16: return launch_to<__nv_bfloat16>(out, blocks, type, n, stream);
    default: return cudaErrorInvalidValue;
  }
}

static const Loader loader([] {
  return load_all<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4>();
});
