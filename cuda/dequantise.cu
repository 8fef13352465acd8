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

// Of the formats with zeros: the tensors, and the matrix's sizes.
template <typename Scale>
struct Matrix {
  const uint32_t* codes;
  const Scale* scales;
  const uint32_t* zeros;  // null: each is 8
  const uint32_t* order;  // the group of each column, or null
  uint32_t rows, octets;  // of columns, in a row
  uint32_t groups, group_octets;
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
        added(float(recipe.zero)) {}

  // The groups of eight columns, by the order. One that there is not is the last.
  __device__ void groups_of(uint32_t octet, uint32_t (&of)[8]) const {
#pragma unroll
    for (int half = 0; half < 8; half += 4) {
      const Vec<uint32_t, 4> four = load<4>(order + size_t(octet) * 8 + half);
#pragma unroll
      for (int i = 0; i < 4; ++i) of[half + i] = four.at[i] < groups ? four.at[i] : groups - 1;
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
  // The matrix's rows are a multiple of the first; the second is how many patches of a warp are side by side.
  static constexpr int kRows = 1, kBeside = 16;

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
  __device__ static void scales(const Matrix<Scale>& matrix, Patch patch, uint32_t group, float (&scales)[8]) {
#pragma unroll
    for (int r = 0; r < 8; ++r) scales[r] = widen(matrix.scales[row_of(matrix, patch, r) * matrix.groups + group]);
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
  __device__ static void scales(const Matrix<Scale>& matrix, Patch patch, uint32_t group, float (&scales)[8]) {
    // Two accesses where one would be of 32 bytes, for which they need not be aligned.
    constexpr int kWide = sizeof(Scale) == 2 ? 8 : 4;
#pragma unroll
    for (int r = 0; r < 8; r += kWide) {
      float wide[kWide];
      widen(load<kWide>(matrix.scales + size_t(group) * matrix.rows + patch.down * 8 + r), wide);
#pragma unroll
      for (int i = 0; i < kWide; ++i) scales[r + i] = wide[i];
    }
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
  static constexpr int kBeside = 4;

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

template <typename Format, typename Scale, typename Out, bool kOrder>
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

  uint32_t groups[8] = {patch.across / matrix.group_octets};
  if constexpr (kOrder) matrix.groups_of(patch.across, groups);
  float scales[8];
  uint32_t zeros;
  const auto begin = [&](uint32_t group) {
    Format::scales(matrix, patch, group, scales);
    zeros = matrix.zeros == nullptr ? 0x88888888 : Format::zeros(matrix, patch, group);
  };
  const auto weight = [&](int r, int c) {
    const float zero = number_of(zeros >> 4 * Format::place(r)) + matrix.added;
    return (number_of(Format::code(words, r, c)) - zero) * scales[r];
  };
  out += size_t(patch.down) * 8 * matrix.octets * 8 + patch.across * 8;
  const auto row = [&](int r) { return out + size_t(r) * matrix.octets * 8; };
  const int rows = matrix.rows - patch.down * 8 < 8 ? int(matrix.rows - patch.down * 8) : 8;
  if constexpr (!kOrder) {
    begin(groups[0]);
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      if (r >= rows) return;
      float weights[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) weights[c] = weight(r, c);
      store_eight(row(r), weights);
    }
  } else {
    // Column after column, since each has its own scales, for which a thread has no room at once. Rows are kept as they will be stored.
    constexpr int kWide = 16 / sizeof(Out);
    Vec<Out, kWide> made[8][8 / kWide];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      begin(groups[c]);
#pragma unroll
      for (int r = 0; r < 8; ++r) narrow(weight(r, c), &made[r][c / kWide].at[c % kWide]);
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      if (r >= rows) return;
#pragma unroll
      for (int i = 0; i < 8 / kWide; ++i) store(row(r) + i * kWide, made[r][i]);
    }
  }
}

template <typename Format, typename Scale, typename Out>
cudaError_t launch_patches(void* out, const void* const inputs[], const lsk_recipe& recipe, cudaStream_t stream) {
  const auto tiles = [](int64_t count) { return (count + 8 * kSide - 1) / (8 * kSide); };
  const int64_t count = tiles(recipe.rows) * tiles(recipe.columns);
  const bool whole = recipe.block_columns % 8 == 0 && recipe.columns % recipe.block_columns == 0;
  if (!whole || recipe.rows % Format::kRows != 0 || count >= kMost) return cudaErrorInvalidValue;
  auto kernel = patches<Format, Scale, Out, false>;
  if constexpr (Format::kMayHaveOrder) {
    if (recipe.order) kernel = patches<Format, Scale, Out, true>;
  }
  return lsk_launch(kernel, dim3(unsigned(count)), dim3(kThreads), 0, stream, static_cast<Out*>(out),
                    Matrix<Scale>(inputs, recipe));
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
  return load_kernels(elementwise<Fp8<Scale, Out, 8>>, elementwise<Fp8<Scale, Out, 1>>, patches<Rows, Scale, Out, false>,
                      patches<Rows, Scale, Out, true>, patches<Gptq, Scale, Out, false>, patches<Gptq, Scale, Out, true>,
                      patches<Awq, Scale, Out, false>);
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
