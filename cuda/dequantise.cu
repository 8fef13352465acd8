// Matrices of quantised weights that several tensors make → F32 or BF16. src/quantised tells the formats, and its weights.rs
// computes the same bits.
//
// Weights of FP8 and NF4 are made in the order in which their codes lie, row after row. Of the formats with zeros a thread makes a
// patch, eight rows of eight columns: eight words of codes, one of zeros for each group, and eight scales that most often lie
// side by side. Neighbouring threads make neighbouring columns, so that they write whole rows side by side.
#include "elementwise.cuh"

namespace {

// Divides numbers below 2^31.
struct Divisor {
  uint32_t factor = 0;
  int shift = 31;

  // By 1 up to 2^31. The factor is 2^shift over it, rounded up. What that adds to a quotient is less than a number below 2^31
  // times one over 2^shift, which is less than one over the divisor: too little to reach the next whole number.
  explicit Divisor(int64_t by) {
    while (by > int64_t(1) << (shift - 31)) ++shift;
    factor = uint32_t(((uint64_t(1) << shift) + uint64_t(by) - 1) / uint64_t(by));
  }
  __device__ uint32_t of(uint32_t number) const { return uint32_t(uint64_t(number) * factor >> shift); }
};

// What a Divisor may divide by, and one more than what it may divide.
constexpr int64_t kMost = int64_t(1) << 31;

// FP8, N neighbours of a row at a time, one or eight: a unit.
template <typename Scale, typename Out, int N>
struct Fp8 {
  struct Loaded {
    Vec<__nv_fp8_e4m3, N> codes;
    Scale scale;
  };
  static constexpr int kPer = 1;
  Out* out;
  const __nv_fp8_e4m3* codes;
  const Scale* scales;
  uint32_t of_row, blocks_of_row;  // units and blocks
  Divisor by_row, by_block_rows, by_block;

  Fp8(void* out, const void* const inputs[], const lsk_recipe& recipe)
      : out(static_cast<Out*>(out)),
        codes(static_cast<const __nv_fp8_e4m3*>(inputs[0])),
        scales(static_cast<const Scale*>(inputs[1])),
        of_row(uint32_t(recipe.columns / N)),
        blocks_of_row(uint32_t((recipe.columns + recipe.block_columns - 1) / recipe.block_columns)),
        by_row(recipe.columns / N),
        by_block_rows(recipe.block_rows),
        by_block(recipe.block_columns / N) {}

  __device__ Loaded load(size_t i) const {
    const uint32_t row = by_row.of(uint32_t(i)), unit = uint32_t(i) - row * of_row;
    return {::load<N>(codes + i * N), scales[size_t(by_block_rows.of(row)) * blocks_of_row + by_block.of(unit)]};
  }
  __device__ void finish(size_t i, const Loaded& loaded) const {
    float weights[N];
    widen(loaded.codes, weights);
    const float scale = widen(loaded.scale);
#pragma unroll
    for (int j = 0; j < N; ++j) weights[j] *= scale;
    if constexpr (N == 8) {
      store_eight(out + i * 8, weights);
    } else {
      narrow(weights[0], out + i);
    }
  }
};

// What a code of NF4 stands for. In global memory, since the threads of a warp look up different ones.
__device__ const float kNf4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

// Scales of NF4, by the number of their block: plain ones, and those that are quantised too.
struct PlainScales {
  using Loaded = float;
  const float* scales;

  PlainScales(const void* const inputs[], const lsk_recipe&) : scales(static_cast<const float*>(inputs[1])) {}
  __device__ Loaded load(uint32_t block) const { return scales[block]; }
  __device__ float finish(float scale) const { return scale; }
};

struct NestedScales {
  struct Loaded {
    uint8_t code;
    float scale;
  };
  static constexpr uint32_t kNested = 256;
  const uint8_t* codes;
  const float *scales, *numbers;
  float offset;

  NestedScales(const void* const inputs[], const lsk_recipe& recipe)
      : codes(static_cast<const uint8_t*>(inputs[1])),
        scales(static_cast<const float*>(inputs[2])),
        numbers(static_cast<const float*>(inputs[3])),
        offset(recipe.offset) {}
  __device__ Loaded load(uint32_t block) const { return {codes[block], scales[block / kNested]}; }
  // Rounded twice: one instruction for both steps would give other bits.
  __device__ float finish(const Loaded& loaded) const { return __fmul_rn(numbers[loaded.code], loaded.scale) + offset; }
};

// NF4, eight neighbours at a time: a unit.
template <typename Scales, typename Out>
struct Nf4 {
  struct Loaded {
    uint32_t codes;
    typename Scales::Loaded scale;
  };
  static constexpr int kPer = 1;
  Out* out;
  const uint32_t* codes;
  Scales scales;
  Divisor by_block;

  Nf4(void* out, const void* const inputs[], const lsk_recipe& recipe)
      : out(static_cast<Out*>(out)),
        codes(static_cast<const uint32_t*>(inputs[0])),
        scales(inputs, recipe),
        by_block(recipe.block_columns / 8) {}

  __device__ Loaded load(size_t i) const { return {codes[i], scales.load(by_block.of(uint32_t(i)))}; }
  __device__ void finish(size_t i, const Loaded& loaded) const {
    const float scale = scales.finish(loaded.scale);
    float weights[8];
#pragma unroll
    // The upper half of a byte is the first.
    for (int j = 0; j < 8; ++j) weights[j] = kNf4[loaded.codes >> 4 * (j ^ 1) & 15] * scale;
    store_eight(out + i * 8, weights);
  }
};

// Threads of a block that make patches side by side, and one below the other.
constexpr int kSide = 16, kThreads = kSide * kSide;

// The scales of eight rows. Those of 32 bytes are two units, since they need not be aligned for one access.
template <typename Scale>
struct Scales {
  static constexpr int kWide = 16 / sizeof(Scale), kUnits = 8 / kWide;
  Vec<Scale, kWide> units[kUnits];

  __device__ Scale& at(int row) { return units[row / kWide].at[row % kWide]; }
};

// Of the formats with zeros: the tensors, and the matrix's sizes.
template <typename Scale>
struct Matrix {
  const uint32_t* codes;
  const Scale* scales;
  const uint32_t* zeros;  // null: each is 8
  const uint32_t* order;  // the group of each column, or null
  uint32_t rows, octets;  // of columns, in a row
  uint32_t groups, group_octets;
  uint32_t pitch;  // of a table of all groups. Odd, so that rows of it begin in different banks
  float added;  // to each zero

  Matrix(const void* const inputs[], const lsk_recipe& recipe)
      : codes(static_cast<const uint32_t*>(inputs[0])),
        scales(static_cast<const Scale*>(inputs[1])),
        zeros(recipe.zeros ? static_cast<const uint32_t*>(inputs[2]) : nullptr),
        order(recipe.order ? static_cast<const uint32_t*>(inputs[recipe.zeros ? 3 : 2]) : nullptr),
        rows(uint32_t(recipe.rows)),
        octets(uint32_t(recipe.columns / 8)),
        groups(uint32_t(recipe.columns / recipe.block_columns)),
        group_octets(uint32_t(recipe.block_columns / 8)),
        pitch(groups | 1),
        added(float(recipe.zero)) {}

  // The groups of N columns, by the order. One that there is not is the last.
  template <int N>
  __device__ void groups_of(uint32_t column, uint32_t (&of)[N]) const {
#pragma unroll
    for (int from = 0; from < N; from += 4) {
      const Vec<uint32_t, 4> four = load<4>(order + column + from);
#pragma unroll
      for (int i = 0; i < 4; ++i) of[from + i] = four.at[i] < groups ? four.at[i] : groups - 1;
    }
  }
};

// A patch: its number among the rows' eights, and among the columns'.
struct Patch {
  uint32_t down, across;
};

// compressed-tensors' int4: everything row by row, but that a word has the zeros of eight rows.
struct Rows {
  static constexpr bool kShared = false, kMayHaveOrder = true;
  // The matrix's rows are a multiple of the first; the second is how many patches of a warp are side by side; with an order
  // the third is how many of a block are below each other.
  static constexpr int kRows = 1, kBeside = 16, kBelow = 1;
  // Scales of so many bytes and more are read from a table where groups are mixed.
  static constexpr size_t kTabled = 2;

  // Where in a word a row's zero is.
  __device__ static int place(int row) { return row; }

  // A row of a patch; beyond the last it is that one.
  template <typename Scale>
  __device__ static size_t row_of(const Matrix<Scale>& matrix, Patch patch, uint32_t r) {
    const uint32_t row = patch.down * 8 + r;
    return row < matrix.rows ? row : matrix.rows - 1;
  }
  template <typename Scale>
  __device__ static void codes(const Matrix<Scale>& matrix, Patch patch, uint32_t (&words)[8]) {
#pragma unroll
    for (int r = 0; r < 8; ++r) words[r] = matrix.codes[row_of(matrix, patch, r) * matrix.octets + patch.across];
  }
  __device__ static uint32_t code(const uint32_t (&words)[8], int row, int column) { return words[row] >> 4 * column; }

  template <typename Scale>
  __device__ static void scales(const Matrix<Scale>& matrix, Patch patch, uint32_t group, Scales<Scale>& scales) {
#pragma unroll
    for (int r = 0; r < 8; ++r) scales.at(r) = matrix.scales[row_of(matrix, patch, r) * matrix.groups + group];
  }
  template <typename Scale>
  __device__ static uint32_t zeros(const Matrix<Scale>& matrix, Patch patch, uint32_t group) {
    return matrix.zeros[size_t(patch.down) * matrix.groups + group];
  }
};

// GPTQ and AWQ: scales and zeros of a group lie side by side.
struct ByGroup {
  static constexpr int kRows = 8;

  template <typename Scale>
  __device__ static void scales(const Matrix<Scale>& matrix, Patch patch, uint32_t group, Scales<Scale>& scales) {
    const Scale* const from = matrix.scales + size_t(group) * matrix.rows + patch.down * 8;
#pragma unroll
    for (int u = 0; u < scales.kUnits; ++u) scales.units[u] = load<Scales<Scale>::kWide>(from + u * scales.kWide);
  }
  template <typename Scale>
  __device__ static uint32_t zeros(const Matrix<Scale>& matrix, Patch patch, uint32_t group) {
    return matrix.zeros[size_t(group) * (matrix.rows / 8) + patch.down];
  }
};

// A word has eight columns of a row, and the words of eight rows lie side by side.
struct Gptq : ByGroup {
  static constexpr bool kShared = false, kMayHaveOrder = true;
  // What a warp reads lies together where its patches are below each other, what it writes where they are side by side.
  static constexpr int kBeside = 4, kBelow = 4;
  static constexpr size_t kTabled = 4;

  __device__ static int place(int row) { return row; }

  template <typename Scale>
  __device__ static void codes(const Matrix<Scale>& matrix, Patch patch, uint32_t (&words)[8]) {
    const uint32_t* const from = matrix.codes + size_t(patch.across) * matrix.rows + patch.down * 8;
    const Vec<uint32_t, 4> upper = load<4>(from), lower = load<4>(from + 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = upper.at[i], words[4 + i] = lower.at[i];
  }
  __device__ static uint32_t code(const uint32_t (&words)[8], int row, int column) { return words[row] >> 4 * column; }
};

// A word has eight rows of a column. Those of a patch are far apart, but beside those of the patches below: they are fetched
// together, through shared memory.
struct Awq : ByGroup {
  static constexpr bool kShared = true, kMayHaveOrder = false;
  static constexpr int kBeside = kSide;
  // Words of eight columns, and two more: so neighbouring threads read from different banks.
  static constexpr int kPitch = 8 * kSide + 2;

  __device__ static int place(int row) { return row % 2 * 4 + row / 2; }

  // All threads of a block call it, also for patches that there are not. Beside or below the matrix, any words will do.
  template <typename Scale>
  __device__ static void codes(const Matrix<Scale>& matrix, Patch patch, uint32_t (&words)[8]) {
    LSK_SHARED(uint32_t, tile, kSide * kPitch);
    const uint32_t side = threadIdx.x % kSide, from = threadIdx.x / kSide, of_column = matrix.rows / 8;
    const size_t first = size_t(patch.across - side) * 8 * of_column + patch.down - from + side;
    const size_t count = size_t(matrix.octets) * 8 * of_column;
#pragma unroll
    for (uint32_t column = from; column < 8 * kSide; column += kSide) {
      const size_t at = first + size_t(column) * of_column;
      if (at < count) tile[column / 8 * kPitch + column % 8 * kSide + side] = matrix.codes[at];
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 8; ++c) words[c] = tile[side * kPitch + c * kSide + from];
  }
  __device__ static uint32_t code(const uint32_t (&words)[8], int row, int column) {
    return words[column] >> 4 * place(row);
  }
};

// The lowest four bits, and 2^23: less another such number it is exact.
__device__ inline float number_of(uint32_t code) { return __uint_as_float(0x4b000000 | (code & 15)); }

template <typename Format, typename Scale, typename Out>
__global__ void __launch_bounds__(kThreads) patches(Out* out, const Matrix<Scale> matrix) {
  const uint32_t tiles = (matrix.octets + kSide - 1) / kSide;
  constexpr uint32_t kBeside = Format::kBeside, kBelow = 32 / kBeside, kWarpsBeside = kSide / kBeside;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Patch patch = {blockIdx.x / tiles * kSide + warp / kWarpsBeside * kBelow + lane / kBeside,
                       blockIdx.x % tiles * kSide + warp % kWarpsBeside * kBeside + lane % kBeside};
  uint32_t words[8];
  if constexpr (Format::kShared) Format::codes(matrix, patch, words);
  if (patch.across >= matrix.octets || patch.down * 8 >= matrix.rows) return;
  if constexpr (!Format::kShared) Format::codes(matrix, patch, words);

  Scales<Scale> scales;
  const uint32_t group = patch.across / matrix.group_octets;
  Format::scales(matrix, patch, group, scales);
  const uint32_t zeros = matrix.zeros == nullptr ? 0x88888888 : Format::zeros(matrix, patch, group);
  out += size_t(patch.down) * 8 * matrix.octets * 8 + patch.across * 8;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    if (patch.down * 8 + r >= matrix.rows) return;
    const float zero = number_of(zeros >> 4 * Format::place(r)) + matrix.added, scale = widen(scales.at(r));
    float weights[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) weights[c] = (number_of(Format::code(words, r, c)) - zero) * scale;
    store_eight(out + size_t(r) * matrix.octets * 8, weights);
  }
}

// The same of columns whose groups are mixed. A thread makes patches of eight rows and 16 bytes of each, column after column:
// each has its own scales, for which there is no room at once. With a table a block first puts the scales and zeros of its
// rows, of all groups, in shared memory. From there eight rows are read at once, and of any groups.
//
// One kind asks for as many registers as it can have: left to itself the compiler gives it too few.
template <typename Format, typename Scale, typename Out, bool kTable>
__global__ void __launch_bounds__(2 * kThreads, kTable || Format::kRows == 8 || sizeof(Out) == 2 ? 0 : 1)
    mixed(Out* out, const Matrix<Scale> matrix) {
  constexpr uint32_t kColumns = 16 / sizeof(Out), kParts = 8 / kColumns, kUnits = sizeof(Scale) / 2;
  constexpr uint32_t kBelow = Format::kBelow;
  LSK_DYNAMIC_SHARED(shared);
  auto* const scale_table = reinterpret_cast<Vec<Scale, 8 / kUnits>*>(shared);
  auto* const zero_table = reinterpret_cast<uint32_t*>(scale_table + kBelow * kUnits * matrix.pitch);

  const uint32_t across = matrix.octets * kParts, beside = blockDim.x / kBelow, strips = (across + beside - 1) / beside;
  const uint32_t top = blockIdx.x / strips * kBelow, below = threadIdx.x % kBelow, down = top + below;
  const uint32_t at = blockIdx.x % strips * beside + threadIdx.x / kBelow;
  const bool inside = at < across && down * 8 < matrix.rows;
  const Patch patch = {down, at / kParts};
  uint32_t words[8], groups[kColumns];
  if (inside) {
    Format::codes(matrix, patch, words);
    matrix.groups_of(at * kColumns, groups);
#pragma unroll
    for (int r = 0; r < 8; ++r) words[r] >>= at % kParts * kColumns * 4;
  }
  if constexpr (kTable) {
    for (uint32_t i = threadIdx.x; i < kBelow * matrix.groups; i += blockDim.x) {
      const uint32_t eight = i % kBelow, group = i / kBelow;
      const Patch left = {top + eight, 0};
      if (left.down * 8 >= matrix.rows) continue;
      Scales<Scale> scales;
      Format::scales(matrix, left, group, scales);
#pragma unroll
      for (uint32_t u = 0; u < kUnits; ++u) scale_table[(eight * kUnits + u) * matrix.pitch + group] = scales.units[u];
      if (matrix.zeros != nullptr) zero_table[eight * matrix.pitch + group] = Format::zeros(matrix, left, group);
    }
    __syncthreads();
  }
  if (!inside) return;
  uint32_t zeros = 0x88888888;
  Vec<Out, kColumns> made[8];
#pragma unroll
  for (uint32_t c = 0; c < kColumns; ++c) {
    Scales<Scale> scales;
    if constexpr (kTable) {
#pragma unroll
      for (uint32_t u = 0; u < kUnits; ++u) scales.units[u] = scale_table[(below * kUnits + u) * matrix.pitch + groups[c]];
      if (matrix.zeros != nullptr) zeros = zero_table[below * matrix.pitch + groups[c]];
    } else {
      Format::scales(matrix, patch, groups[c], scales);
      if (matrix.zeros != nullptr) zeros = Format::zeros(matrix, patch, groups[c]);
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const float zero = number_of(zeros >> 4 * Format::place(r)) + matrix.added;
      narrow((number_of(Format::code(words, r, c)) - zero) * widen(scales.at(r)), &made[r].at[c]);
    }
  }
  out += size_t(down) * 8 * matrix.octets * 8 + at * kColumns;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    if (down * 8 + r >= matrix.rows) return;
    store(out + size_t(r) * matrix.octets * 8, made[r]);
  }
}

template <typename Format, typename Scale, typename Out>
cudaError_t launch_mixed(Out* out, const Matrix<Scale>& matrix, cudaStream_t stream) {
  constexpr int64_t kColumns = 16 / sizeof(Out), kBelow = Format::kBelow;
  // With a larger table too few blocks would fit in a multiprocessor.
  const size_t table = kBelow * size_t(matrix.pitch) * (8 * sizeof(Scale) + sizeof(uint32_t));
  constexpr bool kTable = sizeof(Scale) >= Format::kTabled;
  const bool fits = kTable && table <= 48 * 1024;
  // More threads share a larger table.
  const int64_t threads = fits && matrix.groups > 64 ? 2 * kThreads : kThreads, beside = threads / kBelow;
  const int64_t across = matrix.octets * int64_t(8 / kColumns), bands = (int64_t(matrix.rows) + 8 * kBelow - 1) / (8 * kBelow);
  const int64_t count = bands * ((across + beside - 1) / beside);
  if (count >= kMost) return cudaErrorInvalidValue;
  return lsk_launch(fits ? mixed<Format, Scale, Out, kTable> : mixed<Format, Scale, Out, false>, dim3(unsigned(count)),
                    dim3(unsigned(threads)), fits ? table : 0, stream, out, matrix);
}

template <typename Format, typename Scale, typename Out>
cudaError_t launch_patches(void* out, const void* const inputs[], const lsk_recipe& recipe, cudaStream_t stream) {
  const auto tiles = [](int64_t count) { return (count + 8 * kSide - 1) / (8 * kSide); };
  const int64_t count = tiles(recipe.rows) * tiles(recipe.columns);
  const bool whole = recipe.block_columns % 8 == 0 && recipe.columns % recipe.block_columns == 0;
  if (!whole || recipe.rows % Format::kRows != 0 || count >= kMost) return cudaErrorInvalidValue;
  const Matrix<Scale> matrix(inputs, recipe);
  if constexpr (Format::kMayHaveOrder) {
    if (recipe.order) return launch_mixed<Format>(static_cast<Out*>(out), matrix, stream);
  }
  return lsk_launch(patches<Format, Scale, Out>, dim3(unsigned(count)), dim3(kThreads), 0, stream,
                    static_cast<Out*>(out), matrix);
}

// By units of so many weights.
template <typename Operation>
cudaError_t launch_units(void* out, const void* const inputs[], const lsk_recipe& recipe, int per, cudaStream_t stream) {
  const int64_t weights = recipe.rows * recipe.columns;
  if (weights % per != 0 || recipe.block_columns % per != 0 || weights / per >= kMost) return cudaErrorInvalidValue;
  return launch_elementwise(Operation(out, inputs, recipe), size_t(weights / per), stream);
}

template <typename Out, typename Scale>
cudaError_t launch_scaled(void* out, const void* const inputs[], const lsk_recipe& recipe, cudaStream_t stream) {
  switch (recipe.scheme) {
    case LSK_FP8:
      if (recipe.columns % 8 == 0 && recipe.block_columns % 8 == 0) {
        return launch_units<Fp8<Scale, Out, 8>>(out, inputs, recipe, 8, stream);
      }
      return launch_units<Fp8<Scale, Out, 1>>(out, inputs, recipe, 1, stream);
    case LSK_ROWS: return launch_patches<Rows, Scale, Out>(out, inputs, recipe, stream);
    case LSK_GPTQ: return launch_patches<Gptq, Scale, Out>(out, inputs, recipe, stream);
    case LSK_AWQ: return launch_patches<Awq, Scale, Out>(out, inputs, recipe, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <typename Out>
cudaError_t launch_to(void* out, const void* const inputs[], const lsk_recipe& recipe, cudaStream_t stream) {
  for (const int64_t size : {recipe.rows, recipe.columns, recipe.block_rows, recipe.block_columns}) {
    if (size < 0 || size >= kMost) return cudaErrorInvalidValue;
  }
  if (recipe.rows == 0 || recipe.columns == 0) return cudaSuccess;
  if (recipe.block_rows == 0 || recipe.block_columns == 0) return cudaErrorInvalidValue;
  const bool nf4 = recipe.scheme == LSK_NF4;
  switch (recipe.scale) {
    case LSK_F32:
      if (nf4) return launch_units<Nf4<PlainScales, Out>>(out, inputs, recipe, 8, stream);
      return launch_scaled<Out, float>(out, inputs, recipe, stream);
    case LSK_F16: return launch_scaled<Out, __half>(out, inputs, recipe, stream);
    case LSK_BF16: return launch_scaled<Out, __nv_bfloat16>(out, inputs, recipe, stream);
    case LSK_U8:
      if (nf4) return launch_units<Nf4<NestedScales, Out>>(out, inputs, recipe, 8, stream);
      return cudaErrorInvalidValue;
    default: return cudaErrorInvalidValue;
  }
}

template <typename Out, typename Scale>
cudaError_t load_scaled() {
  return load_kernels(elementwise<Fp8<Scale, Out, 8>>, elementwise<Fp8<Scale, Out, 1>>, patches<Rows, Scale, Out>,
                      patches<Gptq, Scale, Out>, patches<Awq, Scale, Out>, mixed<Rows, Scale, Out, false>,
                      mixed<Rows, Scale, Out, true>, mixed<Gptq, Scale, Out, false>,
                      mixed<Gptq, Scale, Out, sizeof(Scale) >= Gptq::kTabled>);
}

template <typename Out>
cudaError_t load_to() {
  cudaError_t error = load_kernels(elementwise<Nf4<PlainScales, Out>>, elementwise<Nf4<NestedScales, Out>>);
  if (error == cudaSuccess) error = load_scaled<Out, float>();
  if (error == cudaSuccess) error = load_scaled<Out, __half>();
  return error != cudaSuccess ? error : load_scaled<Out, __nv_bfloat16>();
}

}  // namespace

cudaError_t lsk_dequantise(void* out, int out_dtype, const void* const inputs[4], const lsk_recipe* recipe,
                           cudaStream_t stream) {
  switch (out_dtype) {
    case LSK_F32: return launch_to<float>(out, inputs, *recipe, stream);
    case LSK_BF16: return launch_to<__nv_bfloat16>(out, inputs, *recipe, stream);
    default: return cudaErrorInvalidValue;
  }
}

static const Loader loader([] {
  const cudaError_t error = load_to<float>();
  return error != cudaSuccess ? error : load_to<__nv_bfloat16>();
});
