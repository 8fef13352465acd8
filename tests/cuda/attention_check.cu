// Attention against a plain one in double: ragged batches over a cache that is NaN wherever it must not be read. Then
// its speed. Exits 1 if anything is wrong.
//
//   nvcc -O3 -gencode arch=compute_90,code=sm_90 tests/cuda/attention_check.cu cuda/attention_*.cu -o attention_check
//   attention_check [--small] [--no-timing]
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <random>
#include <vector>

#include "../../cuda/kernels.h"

namespace {

using Bf16 = uint16_t;

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}

float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  memcpy(&y, &bits, sizeof(y));
  return y;
}

Bf16 narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return Bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr Bf16 kNan = 0x7fff;

template <typename T>
struct Device {
  T* data = nullptr;
  size_t count;
  explicit Device(size_t count) : count(count) {
    must(cudaMalloc(reinterpret_cast<void**>(&data), std::max<size_t>(count, 1) * sizeof(T)), "cudaMalloc");
  }
  explicit Device(const std::vector<T>& from) : Device(from.size()) {
    must(cudaMemcpy(data, from.data(), count * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data); }
  std::vector<T> read() const {
    std::vector<T> host(count);
    must(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
  }
  lsk_bf16* bf16() const { return reinterpret_cast<lsk_bf16*>(data); }
};

int multiprocessors() {
  int count = 0;
  must(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), "cudaDeviceGetAttribute");
  return count;
}

int pages_of(int tokens) { return (tokens + LSK_PAGE - 1) / LSK_PAGE; }

struct Case {
  int size, heads, kv_heads;
  std::vector<int> tokens, past;  // of each sequence
  int capacity;  // of each sequence's pages, rounded up
  int64_t window;
  float sharpness;  // scale · sqrt(size)
  size_t scratch = SIZE_MAX;  // at most so many bytes
};

// Returns the greatest error relative to the greatest element of the same row, or infinity.
double check(const Case& c, float soft_cap, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const int sequences = int(c.tokens.size()), each = pages_of(c.capacity);
  const int kv_heads = c.kv_heads, heads = c.heads, size = c.size;
  std::vector<uint32_t> offsets{0}, kv_lens, pages;
  for (int s = 0; s < sequences; ++s) {
    offsets.push_back(offsets.back() + c.tokens[s]);
    kv_lens.push_back(c.tokens[s] + c.past[s]);
  }
  // Pages in any order, and one that is nobody's.
  for (int page = 0; page <= sequences * each; ++page) pages.push_back(page);
  std::shuffle(pages.begin(), pages.end(), random);
  const size_t elements = pages.size() * kv_heads * LSK_PAGE * size;
  pages.pop_back();
  // Where a key of a sequence lies in the cache.
  const auto at = [&](int s, int kv_head, int key) {
    return ((size_t(pages[s * each + key / LSK_PAGE]) * kv_heads + kv_head) * LSK_PAGE + key % LSK_PAGE) * size;
  };
  const int tokens = int(offsets.back());
  std::vector<Bf16> q(size_t(tokens) * heads * size), keys(elements, kNan), values(elements, kNan);
  // Random numbers are slow to make: a table of them, read from random places.
  std::vector<Bf16> table(1 << 16);
  for (Bf16& x : table) x = narrow(normal(random));
  const auto fill = [&](Bf16* to, size_t count) {
    for (size_t i = 0; i < count; i += size) {
      const size_t from = random() % (table.size() - size);
      std::copy_n(&table[from], std::min<size_t>(size, count - i), to + i);
    }
  };
  fill(q.data(), q.size());
  for (int s = 0; s < sequences; ++s) {
    for (int g = 0; g < kv_heads; ++g) {
      for (int key = 0; key < int(kv_lens[s]); ++key) fill(&keys[at(s, g, key)], size), fill(&values[at(s, g, key)], size);
    }
  }
  const float scale = c.sharpness / sqrtf(float(size));
  constexpr size_t kGuard = 1024;
  const size_t scratch_bytes = std::min(c.scratch, lsk_attention_scratch(multiprocessors()));
  const Device<Bf16> device_q(q), device_keys(keys), device_values(values);
  const Device<Bf16> out(std::vector<Bf16>(q.size() + kGuard, kNan));
  const Device<uint32_t> device_offsets(offsets), device_lens(kv_lens), device_pages(pages);
  const Device<uint8_t> scratch(std::vector<uint8_t>(scratch_bytes + kGuard, 0xff));
  must(lsk_attention(out.bf16(), device_q.bf16(), device_keys.bf16(), device_values.bf16(), device_offsets.data,
                     device_lens.data, device_pages.data, sequences, each, tokens, heads, kv_heads, size, scale, c.window,
                     soft_cap, scratch.data, scratch_bytes, nullptr),
       "lsk_attention");
  must(cudaDeviceSynchronize(), "the kernel");
  const std::vector<Bf16> got = out.read();
  const std::vector<uint8_t> after = scratch.read();
  for (size_t i = q.size(); i < got.size(); ++i) {
    if (got[i] != kNan) return INFINITY;
  }
  for (size_t i = scratch_bytes; i < after.size(); ++i) {
    if (after[i] != 0xff) return INFINITY;
  }
  for (size_t i = 0; i < q.size(); ++i) {
    if (!isfinite(widen(got[i]))) return INFINITY;
  }
  // A token alone has the same bits as among the others.
  for (int round = 0; round < 3 && tokens > 0; ++round) {
    const int token = int(random() % tokens);
    const int s = int(std::upper_bound(offsets.begin(), offsets.end(), uint32_t(token)) - offsets.begin()) - 1;
    const uint32_t length = kv_lens[s] - (offsets[s + 1] - token) + 1;
    const Device<uint32_t> one(std::vector<uint32_t>{0, 1}), lens(std::vector<uint32_t>{length});
    const Device<uint32_t> own(std::vector<uint32_t>(pages.begin() + s * each, pages.begin() + (s + 1) * each));
    const size_t row = size_t(heads) * size;
    const Device<Bf16> query(std::vector<Bf16>(q.begin() + token * row, q.begin() + (token + 1) * row)), alone(row);
    must(lsk_attention(alone.bf16(), query.bf16(), device_keys.bf16(), device_values.bf16(), one.data, lens.data,
                       own.data, 1, each, 1, heads, kv_heads, size, scale, c.window, soft_cap, scratch.data,
                       scratch_bytes, nullptr),
         "lsk_attention of one token");
    must(cudaDeviceSynchronize(), "the kernel");
    if (!std::equal(got.begin() + token * row, got.begin() + (token + 1) * row, alone.read().begin())) {
      printf("other bits: token %d of %d\n", token, tokens);
      return INFINITY;
    }
  }
  // Few rows of large cases: each sequence's first and last tokens and some between, and for each of them some heads.
  double worst = 0;
  std::vector<double> scores, expected(size);
  for (int s = 0; s < sequences; ++s) {
    std::vector<int> chosen;
    for (int i = 0; i < c.tokens[s]; ++i) {
      if (c.tokens[s] <= 16 || i < 2 || i >= c.tokens[s] - 2 || random() % c.tokens[s] < 8) chosen.push_back(i);
    }
    for (const int i : chosen) {
      for (int head = int(random() % 3); head < heads; head += 1 + int(random() % 3)) {
        const int end = int(kv_lens[s]) - c.tokens[s] + i + 1;
        const int begin = c.window > 0 ? int(std::max<int64_t>(0, end - c.window)) : 0;
        const int kv_head = int(int64_t(head) * kv_heads / heads);
        const size_t row = (size_t(offsets[s] + i) * heads + head) * size;
        double greatest = -INFINITY, sum = 0, error = 0, most = 0;
        scores.clear();
        for (int key = begin; key < end; ++key) {
          double dot = 0;
          for (int d = 0; d < size; ++d) dot += double(widen(q[row + d])) * widen(keys[at(s, kv_head, key) + d]);
          const double score = dot * scale;
          scores.push_back(soft_cap > 0 ? soft_cap * tanh(score / soft_cap) : score);
          greatest = std::max(greatest, scores.back());
        }
        std::fill(expected.begin(), expected.end(), 0);
        for (int key = begin; key < end; ++key) {
          const double weight = exp(scores[key - begin] - greatest);
          sum += weight;
          for (int d = 0; d < size; ++d) expected[d] += weight * widen(values[at(s, kv_head, key) + d]);
        }
        for (int d = 0; d < size; ++d) {
          most = std::max(most, fabs(expected[d] / sum));
          error = std::max(error, fabs(expected[d] / sum - widen(got[row + d])));
        }
        worst = std::max(worst, error / most);
      }
    }
  }
  return worst;
}

bool check_all(bool small) {
  std::vector<Case> cases;
  const int sizes[] = {32, 64, 96, 128, 256};
  const int groupings[][2] = {{28, 4}, {14, 2}, {8, 8}, {16, 1}, {6, 3}, {40, 2}, {1, 1}};
  std::mt19937 random(7);
  const auto below = [&](int n) { return int(random() % n); };
  const auto add = [&](int size, const int* grouping, std::vector<int> tokens, std::vector<int> past, int64_t window) {
    int longest = 0;
    for (size_t s = 0; s < tokens.size(); ++s) longest = std::max(longest, tokens[s] + past[s]);
    const float sharpness = below(2) ? 1.0f : 4.0f;
    cases.push_back({size, grouping[0], grouping[1], tokens, past, longest + below(3) * below(300), window, sharpness});
  };
  const int context = small ? 400 : 5000, block = small ? 150 : 600, rounds = small ? 2 : 12;
  for (const int size : sizes) {
    for (int round = 0; round < rounds; ++round) {
      const int* const grouping = groupings[below(small ? 1 : 7)];
      const int* const other = groupings[small ? 4 + below(3) : below(7)];
      const auto window = [&]() -> int64_t { return below(2) ? 0 : below(3) ? 1 + below(context) : 1 + below(5); };
      // Decode: one token each, some sequences empty; then several tokens of one.
      std::vector<int> tokens, past;
      for (int s = 1 + below(small ? 3 : 40); s > 0; --s) {
        tokens.push_back(below(4) > 0);
        past.push_back(below(context));
      }
      add(size, grouping, tokens, past, window());
      add(size, other, {1 + below(8)}, {below(context)}, window());
      // Prefill: one sequence, whole or on top of a context; then several, some empty.
      add(size, other, {9 + below(block)}, {0}, window());
      add(size, other, {9 + below(block)}, {below(context)}, window());
      tokens.clear(), past.clear();
      for (int s = 1 + below(small ? 4 : 40); s > 0; --s) {
        tokens.push_back(below(4) ? below(small ? 40 : 100) : 0);
        past.push_back(below(2) ? below(context) : 0);
      }
      tokens.push_back(20), past.push_back(3);
      add(size, other, tokens, past, window());
    }
    add(size, groupings[6], {1}, {0}, 0);
    add(size, groupings[4], {64}, {0}, 0);
    add(size, groupings[4], {129}, {64}, 64);
    // Room for one tile of one head, and for the parts of the heads of one token that share a key head.
    const size_t one = size_t(size) * sizeof(float) + 8, row = size_t(size) * sizeof(float) + 32;
    const int past = small ? 700 : 4000, capacity = small ? 800 : 4100;
    cases.push_back({size, 6, 3, {200}, {past - 100}, capacity, 0, 1.0f, row * (size > 128 ? 64 : 128)});
    cases.push_back({size, 6, 3, {3, 1}, {past, past - 9}, capacity, 0, 1.0f, one * 2 * (size_t(capacity) / 512 + 1)});
  }
  cases.push_back({64, 2, 1, std::vector<int>(70, 1), std::vector<int>(70, 9), 10, 0, 1.0f});
  cases.push_back({64, 2, 1, {0, 0}, {3, 0}, 10, 0, 1.0f});
  bool good = true;
  for (size_t i = 0; i < cases.size(); ++i) {
    const Case& c = cases[i];
    int tokens = 0, longest = 0;
    for (size_t s = 0; s < c.tokens.size(); ++s) {
      tokens += c.tokens[s];
      longest = std::max(longest, c.tokens[s] + c.past[s]);
    }
    // Without a soft cap of the scores, and with one that most of them feel.
    const double error = std::max(check(c, 0.0f, unsigned(i)), check(c, 2.0f, unsigned(i)));
    const bool fine = error <= 1e-2;
    printf("%s size %3d heads %2d/%d sequences %2zu tokens %3d context %4d of %4d window %4lld sharpness %g: %.2e\n",
           fine ? "ok  " : "FAIL", c.size, c.heads, c.kv_heads, c.tokens.size(), tokens, longest, c.capacity,
           (long long)c.window, double(c.sharpness), error);
    fflush(stdout);
    good &= fine;
  }
  // What is refused, and what is nothing to do.
  lsk_bf16* const none = nullptr;
  const auto call = [&](int tokens, int heads, int kv_heads, int size, float scale) {
    return lsk_attention(none, none, none, none, nullptr, nullptr, nullptr, 1, 1, tokens, heads, kv_heads, size, scale,
                         0, 0.0f, nullptr, 0, nullptr);
  };
  const bool refuses = call(1, 4, 2, 80, 1) == cudaErrorInvalidValue &&
                       call(20, 4, 2, 80, 1) == cudaErrorInvalidValue &&
                       call(1, 3, 2, 64, 1) == cudaErrorInvalidValue && call(1, 4, 2, 64, 0) == cudaErrorInvalidValue &&
                       call(0, 4, 2, 64, 1) == cudaSuccess;
  if (!refuses) printf("FAIL: invalid calls\n");
  printf("%zu cases: %s\n", cases.size(), good && refuses ? "all right" : "WRONG");
  return good && refuses;
}

// Milliseconds of the fastest of some runs.
double time_one(int sequences, int tokens, int past, int capacity, int heads, int kv_heads, int size) {
  const int total = sequences * tokens, each = pages_of(capacity);
  const size_t elements = size_t(sequences) * each * kv_heads * LSK_PAGE * size;
  std::vector<Bf16> q(size_t(total) * heads * size), cache(elements);
  std::mt19937 random(1);
  for (Bf16& x : q) x = narrow(float(random() % 2001) / 1000 - 1);
  constexpr size_t kPeriod = 1 << 20;
  for (size_t i = 0; i < elements; ++i) {
    cache[i] = i < kPeriod ? narrow(float(random() % 2001) / 1000 - 1) : cache[i - kPeriod];
  }
  std::vector<uint32_t> offsets{0}, kv_lens, pages;
  for (int s = 0; s < sequences; ++s) {
    offsets.push_back((s + 1) * tokens);
    kv_lens.push_back(tokens + past);
  }
  for (int page = 0; page < sequences * each; ++page) pages.push_back(page);
  std::shuffle(pages.begin(), pages.end(), random);
  const Device<Bf16> device_q(q), keys(cache), values(cache), out(q.size());
  const Device<uint32_t> device_offsets(offsets), device_lens(kv_lens), device_pages(pages);
  const size_t scratch_bytes = lsk_attention_scratch(multiprocessors());
  const Device<uint8_t> scratch(scratch_bytes), cold(256 << 20);  // what drives the cache out of L2
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin), "cudaEventCreate");
  must(cudaEventCreate(&end), "cudaEventCreate");
  float best = INFINITY;
  for (int run = 0; run < 12; ++run) {
    must(cudaMemsetAsync(cold.data, run, cold.count, nullptr), "cudaMemsetAsync");
    must(cudaEventRecord(begin, nullptr), "cudaEventRecord");
    must(lsk_attention(out.bf16(), device_q.bf16(), keys.bf16(), values.bf16(), device_offsets.data, device_lens.data,
                       device_pages.data, sequences, each, total, heads, kv_heads, size, 1 / sqrtf(float(size)), 0, 0.0f,
                       scratch.data, scratch_bytes, nullptr),
         "lsk_attention");
    must(cudaEventRecord(end, nullptr), "cudaEventRecord");
    must(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    must(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    best = std::min(best, ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return best;
}

// GB/s of a copy on the device, bytes read and written.
double copy_speed() {
  const Device<uint8_t> from(size_t(1) << 30), to(size_t(1) << 30);
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin), "cudaEventCreate");
  must(cudaEventCreate(&end), "cudaEventCreate");
  float best = INFINITY;
  for (int run = 0; run < 8; ++run) {
    must(cudaEventRecord(begin, nullptr), "cudaEventRecord");
    must(cudaMemcpyAsync(to.data, from.data, from.count, cudaMemcpyDeviceToDevice, nullptr), "cudaMemcpyAsync");
    must(cudaEventRecord(end, nullptr), "cudaEventRecord");
    must(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    must(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    best = std::min(best, ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return 2e-6 * double(from.count) / best;
}

void time_prefill(int sequences, int tokens, int past, int heads, int kv_heads, int size) {
  const double ms = time_one(sequences, tokens, past, tokens + past, heads, kv_heads, size);
  // Two products of 2 · size operations for each pair of a token and a key that it sees.
  const double pairs = double(sequences) * (double(tokens) * past + double(tokens) * (tokens + 1) / 2);
  printf("prefill size %3d heads %d/%d batch %2d tokens %5d after %6d: %8.3f ms %6.1f TFLOP/s\n", size, heads, kv_heads,
         sequences, tokens, past, ms, pairs * heads * 4 * size / ms * 1e-9);
}

void time_decode(int sequences, int context, int capacity, int heads, int kv_heads, int size, double copy) {
  const double ms = time_one(sequences, 1, context - 1, capacity, heads, kv_heads, size);
  const double speed = 4e-6 * sequences * context * double(kv_heads) * size / ms;
  printf("decode  size %3d heads %d/%d batch %2d context %6d of %6d: %8.4f ms %6.0f GB/s, %.2f of a copy\n", size,
         heads, kv_heads, sequences, context, capacity, ms, speed, speed / copy);
}

}  // namespace

int main(int count, char** arguments) {
  bool small = false, timing = true;
  for (int i = 1; i < count; ++i) {
    small |= strcmp(arguments[i], "--small") == 0;
    timing &= strcmp(arguments[i], "--no-timing") != 0;
  }
  if (!check_all(small)) return 1;
  if (!timing) return 0;
  for (const int tokens : {1024, 4096, 8192, 16384}) time_prefill(1, tokens, 0, 28, 4, 128);
  for (const int past : {0, 3840, 32512}) time_prefill(1, 256, past, 28, 4, 128);
  time_prefill(16, 512, 0, 28, 4, 128);
  for (const int size : {32, 64, 96, 256}) time_prefill(1, 8192, 0, 16, 4, size);
  const double copy = copy_speed();
  printf("copy: %.0f GB/s\n", copy);
  for (const int context : {512, 4096, 32768, 131072}) time_decode(1, context, 131072, 28, 4, 128, copy);
  time_decode(1, 32768, 32768, 32, 8, 128, copy);
  time_decode(8, 4096, 8192, 28, 4, 128, copy);
  time_decode(32, 4096, 4096, 28, 4, 128, copy);
  for (const int size : {32, 64, 96, 256}) time_decode(1, 65536, 65536, 16, 4, size, copy);
  time_decode(1, 32768, 32768, 8, 8, 128, copy);
  return 0;
}
