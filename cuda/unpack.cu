// Packed weights (docs/packed.md) → BF16. A warp decodes a block, some rows of 256 weights at a time. A lane has eight
// neighbours of each row, its share: it reads eight bytes of their rest, and writes sixteen.
//
// The codes of a share stand in the nibbles of a word, so that all eight are treated at once. A weight's nibble becomes its
// place in the table: its first code; where that is an escape, 1 + its second code more; where that is one too, 1 + its
// third code more. So places are 0 to 2, 4 to 6 and 8 to 14, and 15 is an exponent without a code. Where further codes of a
// share begin is the number of escapes before it.
#include "bits.cuh"

namespace {

constexpr int kBlock = 4096, kMostWeights = 64 * kBlock, kFirst = kBlock, kSecond = kBlock + kBlock / 4;
constexpr int kShare = 8, kRow = 32 * kShare;
// Rows that a warp decodes together; warps of a thread block, of which so many share a multiprocessor.
constexpr int kRows = 4, kWarps = 4, kResident = 8;
// The most parts of a launch: parameters have 4 KiB.
constexpr int kParts = 1000;
constexpr uint32_t kOnes = 0x11111111;

// Where parts begin, in units of 16 bytes, and the last ends.
struct Begins {
  uint32_t at[kParts + 1];
};

// Exponents by place, turned right by a bit: as a weight's upper byte has them, but for the sign.
struct Table {
  uint32_t at[4];
};

// A block that lies within its part.
struct Planes {
  const char* begin;
  int bytes, first_escapes, second_escapes, third, exponents;

  // 32 bits from a bit of the block on. Of those beyond its end, any.
  __device__ uint32_t window(uint32_t bit) const {
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(begin);
    const int word = int(bit / 32), last = bytes / 4 - 1;
    return __funnelshift_r(words[min(word, last)], words[min(word + 1, last)], bit);
  }
};

// Finds a block in a part of so many blocks. Whether it lies within the part, and its planes in it.
__device__ inline bool find(const uint4* part, uint32_t units, int blocks, int block, Planes* planes) {
  const uint32_t index_units = (blocks + 1) / 2;
  if (units < index_units) return false;
  const uint2* const entries = reinterpret_cast<const uint2*>(part);
  const uint2 entry = entries[block];
  const uint32_t end = block + 1 < blocks ? entries[block + 1].x : units - index_units;
  if (entry.x > end || end > units - index_units) return false;
  planes->begin = reinterpret_cast<const char*>(part + index_units + entry.x);
  planes->bytes = int((end - entry.x) * 16);
  planes->first_escapes = entry.y % 65536;
  planes->second_escapes = entry.y / 65536;
  planes->third = kSecond + (planes->first_escapes + 3) / 4;
  planes->exponents = planes->third + (3 * planes->second_escapes + 7) / 8;
  return planes->first_escapes <= kBlock && planes->second_escapes <= planes->first_escapes &&
         planes->exponents <= planes->bytes;
}

// A row's field in a word of counts.
constexpr int kField = 32 / kRows;

// A number for each row.
struct Ranks {
  int at[kRows];
};

// How many escapes come before this lane's shares. `before` is how many came before these rows, and becomes how many came
// before the next ones.
__device__ inline Ranks rank(const uint32_t (&flags)[kRows], int lane, int* before) {
  uint32_t counts = 0;
#pragma unroll
  for (int row = 0; row < kRows; ++row) counts |= uint32_t(__popc(flags[row])) << (kField * row);
  uint32_t sums = counts;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kWarp, sums, distance);
    if (lane >= distance) sums += other;
  }
  // Of the lanes before: 248 fit a field, a whole row's 256 do not.
  sums -= counts;
  const uint32_t most = __shfl_sync(kWarp, sums, 31), last = __shfl_sync(kWarp, counts, 31);
  Ranks ranks;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    constexpr uint32_t kMask = (1u << kField) - 1;
    const int shift = kField * row;
    ranks.at[row] = *before + int(sums >> shift & kMask);
    *before += int((most >> shift & kMask) + (last >> shift & kMask));
  }
  return ranks;
}

// Eight codes of two bits, a nibble each.
__device__ inline uint32_t spread(uint32_t codes) {
  codes = permute(codes, 0, 0x4140);
  codes = join(0x0f0f0f0f, codes, codes << 4);
  return join(0x33333333, codes, codes << 2);
}

// Puts codes of so many bits, with which a window begins, into the nibbles that have a flag, in their order. The others
// become zero.
template <int kBits>
__device__ inline uint32_t deal(uint32_t flags, uint32_t window) {
  // Codes of three bits: the fifth goes to where the upper half begins.
  if (kBits == 3) window = choose(0xfff, window, window << 4);
  constexpr uint32_t kBytes = kBits == 3 ? 0x6240 : 0x5140;
  // A code in each byte, below others.
  const uint32_t even = permute(window, window >> kBits, kBytes);
  const uint32_t odd = permute(window >> 2 * kBits, window >> 3 * kBits, kBytes);
  const uint32_t low = permute(even, odd, 0x5410), high = permute(even, odd, 0x7632);
  // Each nibble has the number of flags before it.
  const uint32_t ranks = flags * 0x11111110;
  const uint32_t first = permute(low, high, ranks), second = permute(low, high, ranks >> 16);
  const uint32_t nibbles = permute(choose(0x0f0f0f0f, first, first >> 4), choose(0x0f0f0f0f, second, second >> 4), 0x6420);
  return nibbles & flags * ((1 << kBits) - 1);
}

// The exponents of the weights whose places are the lower four nibbles, or the upper.
__device__ inline uint32_t look_up(const Table& table, uint32_t places, bool upper) {
  const uint32_t which = (places & 0x77777777) >> (upper ? 16 : 0);
  const uint32_t low = permute(table.at[0], table.at[1], which), high = permute(table.at[2], table.at[3], which);
  // A nibble's highest bit, eight times: it is the sign of a byte here, or there.
  return choose(permute(places, places << 4, upper ? 0xbfae : 0x9d8c), high, low);
}

// Fills in exponents that have no code. Whether they are there.
__device__ inline bool fill_in(const Planes& planes, uint32_t flags, int rank, uint32_t (&exponents)[2]) {
  uint64_t both = exponents[0] | uint64_t(exponents[1]) << 32;
  int at = planes.exponents + rank;
  for (; flags != 0; flags &= flags - 1, ++at) {
    if (at >= planes.bytes) return false;
    const uint32_t exponent = static_cast<uint8_t>(planes.begin[at]);
    both |= uint64_t((exponent >> 1 | exponent << 7) & 0xff) << (__ffs(int(flags)) - 1) * 2;
  }
  exponents[0] = uint32_t(both), exponents[1] = uint32_t(both >> 32);
  return true;
}

// Eight weights from their exponents and the rest.
__device__ inline uint4 weights_of(const uint32_t (&exponents)[2], uint2 rest) {
  const uint32_t kSign = 0x80808080;
  const uint32_t upper[] = {choose(kSign, rest.x, exponents[0]), choose(kSign, rest.y, exponents[1])};
  const uint32_t lower[] = {choose(kSign, exponents[0], rest.x), choose(kSign, exponents[1], rest.y)};
  return {permute(lower[0], upper[0], 0x5140), permute(lower[0], upper[0], 0x7362), permute(lower[1], upper[1], 0x5140),
          permute(lower[1], upper[1], 0x7362)};
}

// Writes eight weights, or as many as there are.
__device__ inline void write(lsk_bf16* out, const uint4& weights, int count) {
  if (count >= kShare) {
    __stcs(reinterpret_cast<uint4*>(out), weights);
    return;
  }
  const uint32_t words[] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    if (i < count) reinterpret_cast<uint16_t*>(out)[i] = uint16_t(words[i / 2] >> 16 * (i % 2));
  }
}

// What a lane reads of some rows without having to know how many escapes come before.
struct Loaded {
  uint2 rest[kRows];
  uint32_t codes[kRows];

  __device__ void load(const Planes& planes, int row, int lane) {
    const uint2* const rests = reinterpret_cast<const uint2*>(planes.begin) + (row * 32 + lane);
    const uint16_t* const firsts = reinterpret_cast<const uint16_t*>(planes.begin + kFirst) + (row * 32 + lane);
#pragma unroll
    for (int i = 0; i < kRows; ++i) rest[i] = __ldcs(rests + i * 32), codes[i] = __ldcs(firsts + i * 32);
  }
};

// Decodes a block's first `count` weights. Whether its codes are what the index says, as far as this lane sees.
__device__ inline bool decode(const Planes& planes, const Table& table, int lane, int count, lsk_bf16* out) {
  int before[3] = {};
  bool good = true;
#pragma unroll 1
  for (int row = 0; row < kBlock / kRow; row += kRows) {
    Loaded loaded;
    loaded.load(planes, row, lane);
    uint32_t places[kRows], flags[kRows], without = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      places[i] = spread(loaded.codes[i]);
      flags[i] = places[i] & places[i] >> 1 & kOnes;
    }
    Ranks ranks = rank(flags, lane, &before[0]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t codes = deal<2>(flags[i], planes.window(8 * kSecond + 2 * ranks.at[i]));
      places[i] += flags[i] + codes;
      flags[i] = codes & codes >> 1 & kOnes;
    }
    ranks = rank(flags, lane, &before[1]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t codes = deal<3>(flags[i], planes.window(8 * planes.third + 3 * ranks.at[i]));
      places[i] += flags[i] + codes;
      flags[i] = codes & codes >> 1 & codes >> 2 & kOnes;
      without |= flags[i];
    }
    const bool fills_in = __ballot_sync(kWarp, without != 0) != 0;
    if (fills_in) ranks = rank(flags, lane, &before[2]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      uint32_t exponents[] = {look_up(table, places[i], false), look_up(table, places[i], true)};
      if (fills_in) good &= fill_in(planes, flags[i], ranks.at[i], exponents);
      const int at = (row + i) * kRow + lane * kShare;
      write(out + at, weights_of(exponents, loaded.rest[i]), count - at);
    }
  }
  return good && before[0] == planes.first_escapes && before[1] == planes.second_escapes;
}

// Thread block (x, y) decodes kWarps blocks of part y.
__global__ void __launch_bounds__(kWarps * 32, kResident)
    unpack(lsk_bf16* out, const uint4* __restrict__ packed, Begins begins, int part_weights, int last_weights, Table table,
           uint32_t* report) {
  const int part = int(blockIdx.y), lane = int(threadIdx.x) % 32;
  const int block = int(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  const int weights = part + 1 < int(gridDim.y) ? part_weights : last_weights;
  const int blocks = (weights + kBlock - 1) / kBlock;
  if (block >= blocks) return;
  const uint32_t begin = begins.at[part];
  Planes planes;
  out += int64_t(part) * part_weights + block * kBlock;
  const bool good = find(packed + begin, begins.at[part + 1] - begin, blocks, block, &planes) &&
                    decode(planes, table, lane, weights - block * kBlock, out);
  if (!good) *report = 1;
}

// One launch: up to kParts parts.
cudaError_t launch(lsk_bf16* out, const uint4* packed, const Begins& begins, int parts, int part_weights,
                   int last_weights, const Table& table, uint32_t* report, cudaStream_t stream) {
  const int most = parts > 1 ? part_weights : last_weights;
  const dim3 grid((most + kBlock * kWarps - 1) / (kBlock * kWarps), parts);
  return lsk_launch(unpack, grid, dim3(kWarps * 32), 0, stream, out, packed, begins, part_weights, last_weights, table,
                    report);
}

// By place, from the exponents by rank.
Table by_place(const uint8_t* exponents) {
  Table table = {};
  for (int rank = 0; rank < 13; ++rank) {
    const int place = rank + (rank >= 3) + (rank >= 6);
    const uint32_t turned = (exponents[rank] >> 1 | exponents[rank] << 7) & 0xff;
    table.at[place / 4] |= turned << 8 * (place % 4);
  }
  return table;
}

}  // namespace

cudaError_t lsk_unpack(lsk_bf16* out, const void* packed, const uint32_t* lengths, int64_t parts, int64_t part_weights,
                       int64_t weights, const uint8_t* table, uint32_t* report, cudaStream_t stream) {
  if (part_weights <= 0 || part_weights > kMostWeights || part_weights % kBlock != 0 || weights < 0 ||
      parts != weights / part_weights + (weights % part_weights != 0)) {
    return cudaErrorInvalidValue;
  }
  const uint4* from = static_cast<const uint4*>(packed);
  if (!aligned_for<8>(out) || !aligned_for<1>(from)) return cudaErrorInvalidValue;
  for (int64_t part = 0; part < parts; ++part) {
    if (lengths[part] % sizeof(uint4) != 0) return cudaErrorInvalidValue;
  }
  const Table places = by_place(table);
  for (int64_t first = 0; first < parts; first += kParts) {
    const int64_t rest = parts - first, count = rest < kParts ? rest : kParts;
    Begins begins;
    begins.at[0] = 0;
    for (int64_t i = 0; i < count; ++i) begins.at[i + 1] = begins.at[i] + lengths[first + i] / uint32_t(sizeof(uint4));
    const int64_t of_last = rest > kParts ? part_weights : weights - (parts - 1) * part_weights;
    const cudaError_t error = launch(out + first * part_weights, from, begins, int(count), int(part_weights), int(of_last),
                                     places, report, stream);
    if (error != cudaSuccess) return error;
    from += begins.at[count];
  }
  return cudaSuccess;
}

static const Loader loader([] { return load_kernels(unpack); });
