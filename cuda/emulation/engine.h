// What runs one launch at a time: the threads of a block, and what they wait for.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <vector>

#include "emulation.h"
#include "fibre.h"

namespace emulation {

constexpr int kMostThreads = 1024, kLanes = 32;

// A block's dynamic shared memory, with leave and without, its alignment, and what it holds until it is written: NaN.
constexpr size_t kMostShared = 227 * 1024, kSharedUnasked = 48 * 1024, kSharedAlign = 128;
constexpr unsigned char kPoison = 0xff;

// Static shared variables of a kernel, at most.
constexpr int kStatics = 4;

inline uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// An order of 0 .. n: each once, in steps.
struct Order {
  uint64_t n = 1, first = 0, step = 1;

  static Order of(uint64_t n, uint64_t seed) {
    if (seed % 4 == 0 || n < 2) return {n, 0, 1};
    if (seed % 4 == 1) return {n, n - 1, n - 1};
    uint64_t step = 1 + mix(seed) % (n - 1);
    while (std::gcd(step, n) != 1) ++step;
    return {n, mix(seed + 1) % n, step};
  }
  uint64_t at(uint64_t i) const { return uint64_t((static_cast<unsigned __int128>(i) * step + first) % n); }
};

// What a thread waits for, if anything: other lanes' values, a place for its own, or the block.
enum class State : uint8_t { kNew, kRuns, kValues, kPlace, kBarrier, kDone };

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

struct Thread {
  uint3 index;
  int warp, lane;
  Fibre* fibre = nullptr;
  uint64_t operations = 0;  // of its warp that it took part in
  unsigned needed = 0;      // lanes that it waits for
  // The barrier or operation that it came to last.
  const char* what = nullptr;
  const char* file = nullptr;
  int line = 0;
  // Copies not carried out yet, and where each committed group of them ends.
  std::vector<Copy> copies;
  std::vector<size_t> groups;
};

// One operation of a warp. Those that have not read yet what they came for keep it from being used for another.
struct Operation {
  uint64_t number = 0;  // from 1 on; 0: none
  unsigned arrived = 0, reading = 0;
  const char *what = nullptr, *file = nullptr;
  int line = 0;
  alignas(kEntry) char entries[kLanes * kEntry];

  bool free_for(uint64_t other) const { return reading == 0 || number == other; }
};

struct Warp {
  // Lanes may be so many operations apart.
  static constexpr int kRing = 8;
  Operation ring[kRing];
  State states[kLanes];
  int cursor = 0;           // place in the order of lanes
  int open = 0;             // lanes that are neither done nor at the block's barrier
  uint64_t most = 0;        // operations that a lane took part in, at most
  uint64_t least_done = 0;  // and lanes that are done, at least

  // Operation `number` of this warp, from 1 on.
  Operation& of(uint64_t number) { return ring[number % kRing]; }
  const Operation& of(uint64_t number) const { return ring[number % kRing]; }
};

class Engine {
 public:
  cudaError_t run(const Grid& grid, uint64_t seed);

  void sync_block(const char* file, int line);
  const char* offer(const char* what, unsigned needed, const void* value, size_t bytes, const char* file, int line);
  char* static_shared(const void* tag, size_t bytes);
  char* dynamic_shared() const { return dynamic_; }
  Thread& thread() { return *running_; }
  void copy_until(size_t group);
  // Ends the launch. Called by the thread that runs.
  [[noreturn]] void wrong(cudaError_t error, const char* format, ...) __attribute__((format(printf, 3, 4)));
  // The same, from a signal handler.
  void trapped(int signal, const siginfo_t* info, ucontext_t* context);
  bool check_row(const void* row) const;

 private:
  void prepare(const Grid& grid, uint64_t seed);
  bool run_block();
  void report_trap() const;
  bool canaries_whole() const;

  [[noreturn]] static void fibre_main();
  void done();
  Thread* pick();
  Thread* pick_lane(int warp);
  Thread* pick_awaited();
  [[noreturn]] void stuck(int warp);
  bool can_run(int warp, int lane) const {
    const Warp& w = warps_[warp];
    const Thread& thread = threads_[warp * kLanes + lane];
    switch (w.states[lane]) {
      case State::kNew:
      case State::kRuns: return true;
      case State::kValues: return (thread.needed & ~w.of(thread.operations).arrived) == 0;
      case State::kPlace: return w.of(thread.operations + 1).free_for(thread.operations + 1);
      default: return false;
    }
  }
  void run_next(Thread* next, Fibre* own = nullptr);
  void change_to(Thread* next);
  void wait(State state);
  void print_where() const;
  Thread& at(int warp, int lane) { return threads_[warp * kLanes + lane]; }
  State& state_of(const Thread& thread) { return warps_[thread.warp].states[thread.lane]; }
  uint64_t random() { return random_ = mix(random_); }

  const Grid* grid_ = nullptr;
  int count_ = 0, warp_count_ = 0;  // of a block
  std::vector<Thread> threads_;
  std::unique_ptr<Warp[]> warps_{new Warp[kMostThreads / kLanes]};
  Thread* running_ = nullptr;
  int warp_place_ = 0;  // in the order of warps
  int alive_ = 0;
  Order blocks_;
  int warp_order_[kMostThreads / kLanes], lane_order_[kLanes];
  int turn_ = 0;  // where the order of awaited lanes begins
  bool backward_ = false, shuffled_ = false;
  uint64_t random_ = 0;

  Stack host_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  Fibre* idle_ = nullptr;

  Guarded shared_{kMostShared + kSharedAlign};
  char* dynamic_ = nullptr;
  std::unique_ptr<Guarded> statics_[kStatics];
  const void* tags_[kStatics] = {};
  char* static_at_[kStatics] = {};

  cudaError_t error_ = cudaSuccess;
  Guarded signal_stack_{1 << 16};
  int signal_ = 0, signal_code_ = 0;
  const void *fault_ = nullptr, *instruction_ = nullptr;
};

// What runs on this thread of the host, while a fibre does.
extern __thread Engine* active LSK_OF_THREAD;

}  // namespace emulation
