// How a launch is run: see emulation.h for what it promises.
#include "emulation.h"

#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "fibre.h"

#ifndef __x86_64__
#error "the emulation changes stacks in x86-64 assembly: write emulation_switch for this processor"
#endif

asm(R"(
    .text
    .hidden emulation_switch
    .hidden emulation_land
    .globl emulation_switch
    .globl emulation_land
    .type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
emulation_land:
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_switch, . - emulation_switch
)");

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace emulation {

__thread int lane;

namespace {

constexpr int kMostThreads = 1024, kLanes = 32;
constexpr size_t kMostShared = 227 * 1024, kSharedUnasked = 48 * 1024;
constexpr int kStatics = 4;
constexpr unsigned char kPoison = 0xff;

// Where dynamic shared memory begins, and what is looked at before it.
constexpr size_t kSharedAlign = 128;

uint64_t mix(uint64_t x) {
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
    while (std::__gcd(step, n) != 1) ++step;
    return {n, mix(seed + 1) % n, step};
  }
  uint64_t at(uint64_t i) const { return uint64_t((static_cast<unsigned __int128>(i) * step + first) % n); }
};

// What a thread waits for, if anything.
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

// One operation of a warp. Lanes may be several operations apart.
struct Operation {
  uint64_t number = 0;  // from 1 on; 0: none
  unsigned arrived = 0, reading = 0;
  const char *what = nullptr, *file = nullptr;
  int line = 0;
  alignas(kEntry) char entries[kLanes * kEntry];
};

struct Warp {
  static constexpr int kRing = 8;
  Operation ring[kRing];
  State states[kLanes];
  int cursor = 0;              // place in the order of lanes
  int open = 0;                // lanes that are neither done nor at the block's barrier
  uint64_t most = 0, least_done = ~uint64_t(0);  // operations that a lane has begun, and that one has ended with
};

class Engine {
 public:
  Engine() : shared_(kMostShared + kSharedAlign + 4096 - (kMostShared + kSharedAlign) % 4096), signal_stack_(1 << 16) {}

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
  [[noreturn]] void stuck(int warp);
  bool can_run(int warp, int lane) const;
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
  Order blocks_, warp_order_, lane_order_;
  bool shuffled_ = false;
  uint64_t random_ = 0;

  Stack host_;
  std::vector<std::unique_ptr<Fibre>> fibres_;
  Fibre* idle_ = nullptr;

  Guarded shared_;
  char* dynamic_ = nullptr;
  std::unique_ptr<Guarded> statics_[kStatics];
  const void* tags_[kStatics] = {};
  char* static_at_[kStatics] = {};

  cudaError_t error_ = cudaSuccess;
  Guarded signal_stack_;
  int signal_ = 0, signal_code_ = 0;
  const void *fault_ = nullptr, *instruction_ = nullptr;
};

// What runs on this thread of the host, while a fibre does.
__thread Engine* active __attribute__((tls_model("initial-exec")));
// The stack that was left for the one that runs, which has not noticed yet.
__thread Stack* leaving __attribute__((tls_model("initial-exec")));

void change(Stack& from, Stack& to) {
  leaving = &from;
  to.announce(&from);
  emulation_switch(&from.left, to.left);
  from.landed(leaving);
  leaving = nullptr;
}

// --- Which thread runs.

bool Engine::can_run(int warp, int lane) const {
  const Warp& w = warps_[warp];
  const Thread& thread = threads_[warp * kLanes + lane];
  switch (w.states[lane]) {
    case State::kNew:
    case State::kRuns: return true;
    case State::kValues: return (thread.needed & ~w.ring[(thread.operations - 1) % Warp::kRing].arrived) == 0;
    case State::kPlace: {
      const Operation& operation = w.ring[thread.operations % Warp::kRing];
      return operation.reading == 0 || operation.number == thread.operations + 1;
    }
    default: return false;
  }
}

// The thread to go on with: of the same warp as long as one can, then of the next. Null: the block is done.
Thread* Engine::pick() {
  // Now and then another warp before its time.
  if (shuffled_ && warp_count_ > 1 && random() % 16 == 0) warp_place_ = int(random() % warp_count_);
  for (int tried = 0;;) {
    const int warp = int(warp_order_.at(warp_place_));
    Warp& w = warps_[warp];
    if (w.open > 0) {
      for (int i = 0; i < kLanes; ++i) {
        w.cursor = (w.cursor + 1) % kLanes;
        const int lane = int(lane_order_.at(w.cursor));
        if (can_run(warp, lane)) return &at(warp, lane);
      }
      stuck(warp);
    }
    warp_place_ = warp_place_ + 1 == warp_count_ ? 0 : warp_place_ + 1;
    if (++tried < warp_count_) continue;
    if (alive_ == 0) return nullptr;
    // All that are left are at the barrier.
    for (int i = 0; i < count_; ++i) {
      if (state_of(threads_[i]) != State::kBarrier) continue;
      state_of(threads_[i]) = State::kRuns;
      ++warps_[threads_[i].warp].open;
    }
    tried = 0;
    warp_place_ = 0;
  }
}

void Engine::stuck(int warp) {
  const Warp& w = warps_[warp];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Thread& thread = at(warp, lane);
    if (w.states[lane] != State::kValues && w.states[lane] != State::kPlace) continue;
    for (int other = 0; other < kLanes; ++other) {
      const Thread& late = at(warp, other);
      if (w.states[other] == State::kDone || late.operations >= thread.operations) continue;
      wrong(cudaErrorLaunchFailure, "lane %d waits for ever in %s at %s:%d: lane %d waits in %s at %s:%d", lane,
            thread.what, thread.file, thread.line, other, late.what, late.file, late.line);
    }
  }
  wrong(cudaErrorLaunchFailure, "the lanes of warp %d wait for each other for ever", warp);
}

// Makes a thread the one that runs. One that has not begun yet gets a fibre: `own`, or else an idle one.
void Engine::run_next(Thread* next, Fibre* own) {
  running_ = next;
  state_of(*next) = State::kRuns;
  threadIdx = next->index;
  lane = next->lane;
  if (next->fibre != nullptr) return;
  if (own == nullptr && idle_ == nullptr) {
    fibres_.emplace_back(own = new Fibre);
    own->begin(fibre_main);
  } else if (own == nullptr) {
    own = idle_;
    idle_ = own->next;
  }
  next->fibre = own;
}

void Engine::change_to(Thread* next) {
  Thread* const last = running_;
  Fibre* const from = last->fibre;
  run_next(next);
  if (next != last) change(*from, *next->fibre);
}

void Engine::wait(State state) {
  state_of(*running_) = state;
  change_to(pick());
}

// The running thread has returned.
void Engine::done() {
  Thread& thread = *running_;
  Warp& w = warps_[thread.warp];
  thread.groups.push_back(thread.copies.size());
  copy_until(thread.groups.size());
  if (thread.operations > 0) w.ring[(thread.operations - 1) % Warp::kRing].reading &= ~(1u << thread.lane);
  if (thread.operations < w.most) {
    const Operation& operation = w.ring[thread.operations % Warp::kRing];
    wrong(cudaErrorLaunchFailure, "lane %d exits, others are in %s at %s:%d", thread.lane, operation.what,
          operation.file, operation.line);
  }
  w.least_done = std::min(w.least_done, thread.operations);
  w.states[thread.lane] = State::kDone;
  --w.open;
  --alive_;
}

// Runs threads from their first line to their last, one after another unless one waits.
void Engine::fibre_main() {
  Engine& engine = *active;
  engine.running_->fibre->landed(leaving);
  leaving = nullptr;
  for (;;) {
    engine.grid_->run();
    engine.done();
    Fibre* const self = engine.running_->fibre;
    engine.running_->fibre = nullptr;
    Thread* const next = engine.pick();
    if (next != nullptr && next->fibre == nullptr) {
      engine.run_next(next, self);
      continue;
    }
    self->next = engine.idle_;
    engine.idle_ = self;
    if (next != nullptr) engine.run_next(next);
    change(*self, next != nullptr ? static_cast<Stack&>(*next->fibre) : engine.host_);
  }
}

// --- What threads wait at.

void Engine::sync_block(const char* file, int line) {
  Thread& thread = *running_;
  thread.what = "__syncthreads", thread.file = file, thread.line = line;
  // Threads that came before wait at the same one.
  for (int i = 0; i < count_; ++i) {
    const Thread& other = threads_[i];
    if (state_of(other) != State::kBarrier) continue;
    if (other.line != line || strcmp(other.file, file) != 0) {
      wrong(cudaErrorLaunchFailure, "__syncthreads at %s:%d, other threads are in that at %s:%d", file, line,
            other.file, other.line);
    }
    break;
  }
  --warps_[thread.warp].open;
  wait(State::kBarrier);
}

const char* Engine::offer(const char* what, unsigned needed, const void* value, size_t bytes, const char* file,
                          int line) {
  Thread& thread = *running_;
  Warp& w = warps_[thread.warp];
  const unsigned bit = 1u << thread.lane;
  thread.what = what, thread.file = file, thread.line = line;
  if (thread.operations > 0) w.ring[(thread.operations - 1) % Warp::kRing].reading &= ~bit;
  if (thread.operations >= w.least_done) {
    wrong(cudaErrorLaunchFailure, "%s at %s:%d with lanes that have exited", what, file, line);
  }
  const uint64_t number = thread.operations + 1;
  Operation& operation = w.ring[thread.operations % Warp::kRing];
  while (operation.number != number && operation.reading != 0) wait(State::kPlace);
  if (operation.number != number) {
    operation.number = number;
    operation.arrived = 0;
    operation.reading = ~0u;
    operation.what = what, operation.file = file, operation.line = line;
  } else if (operation.line != line || strcmp(operation.what, what) != 0 || strcmp(operation.file, file) != 0) {
    wrong(cudaErrorLaunchFailure, "%s at %s:%d, other lanes are in %s at %s:%d", what, file, line, operation.what,
          operation.file, operation.line);
  }
  memcpy(operation.entries + thread.lane * kEntry, value, bytes);
  operation.arrived |= bit;
  thread.operations = number;
  w.most = std::max(w.most, number);
  thread.needed = needed;
  if ((needed & ~operation.arrived) != 0) wait(State::kValues);
  return operation.entries;
}

// Carries out this thread's copies up to the end of a group, counted from the oldest.
void Engine::copy_until(size_t group) {
  Thread& thread = *running_;
  if (group == 0) return;
  const size_t end = thread.groups[group - 1];
  for (size_t i = 0; i < end; ++i) {
    const Copy& copy = thread.copies[i];
    if (copy.valid) {
      memcpy(copy.shared, copy.global, 16);
    } else {
      memset(copy.shared, 0, 16);
    }
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + end);
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + group);
  for (size_t& other : thread.groups) other -= end;
}

// --- Memory.

char* Engine::static_shared(const void* tag, size_t bytes) {
  for (int i = 0; i < kStatics; ++i) {
    if (tags_[i] == tag) return static_at_[i];
    if (tags_[i] != nullptr) continue;
    if (bytes > kSharedUnasked) break;
    if (!statics_[i]) statics_[i].reset(new Guarded(kSharedUnasked));
    tags_[i] = tag;
    static_at_[i] = statics_[i]->end() - (bytes + 15) / 16 * 16;
    memset(static_at_[i], kPoison, (bytes + 15) / 16 * 16);
    return static_at_[i];
  }
  wrong(cudaErrorLaunchFailure, "more static shared variables than the emulation has places for");
}

bool Engine::check_row(const void* row) const {
  const auto* const at = static_cast<const char*>(row);
  return reinterpret_cast<uintptr_t>(row) % 16 == 0 && at >= dynamic_ && at + 16 <= dynamic_ + grid_->shared_bytes;
}

bool Engine::canaries_whole() const {
  const auto poisoned = [](const char* from, const char* to) {
    return std::all_of(from, to, [](char x) { return static_cast<unsigned char>(x) == kPoison; });
  };
  return poisoned(dynamic_ - kSharedAlign, dynamic_) && poisoned(dynamic_ + grid_->shared_bytes, shared_.end());
}

// --- What goes wrong.

void Engine::print_where() const {
  const uint3 block = blockIdx, thread = threadIdx;
  fprintf(stderr, " [thread (%u, %u, %u) of block (%u, %u, %u), %s", thread.x, thread.y, thread.z, block.x, block.y,
          block.z, grid_->parameters);
  Dl_info info;
  for (const void* const code : {grid_->kernel, instruction_}) {
    if (code == nullptr || dladdr(code, &info) == 0) continue;
    fprintf(stderr, "; addr2line -Cfe %s %#zx", info.dli_fname,
            size_t(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase)));
  }
  fprintf(stderr, "]\n");
}

void Engine::wrong(cudaError_t error, const char* format, ...) {
  flockfile(stderr);
  fprintf(stderr, "CUDA emulation: ");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  print_where();
  funlockfile(stderr);
  error_ = error;
  Fibre* const self = running_->fibre;
  change(*self, host_);
  abort();  // Nobody comes back here.
}

void Engine::trapped(int signal, const siginfo_t* info, ucontext_t* context) {
  signal_ = signal;
  signal_code_ = info->si_code;
  fault_ = info->si_addr;
  instruction_ = reinterpret_cast<const void*>(context->uc_mcontext.gregs[REG_RIP]);
  error_ = signal == SIGSEGV || signal == SIGBUS ? cudaErrorIllegalAddress : cudaErrorLaunchFailure;
  // The host goes on where it began with the block.
  leaving = nullptr;
  host_.announce(nullptr);
  context->uc_mcontext.gregs[REG_RSP] = reinterpret_cast<greg_t>(host_.left);
  context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(&emulation_land);
}

void Engine::report_trap() const {
  flockfile(stderr);
  if (signal_ != SIGSEGV && signal_ != SIGBUS) {
    fprintf(stderr, "CUDA emulation: %s", strsignal(signal_));
  } else if (signal_code_ == SI_KERNEL) {
    fprintf(stderr, "CUDA emulation: an access that is not aligned, or to no address at all");
  } else {
    fprintf(stderr, "CUDA emulation: access to %p, where no memory is", fault_);
  }
  print_where();
  funlockfile(stderr);
}

struct sigaction before[NSIG];

void handle(int signal, siginfo_t* info, void* context) {
  if (active != nullptr) {
    Engine* const engine = active;
    active = nullptr;
    engine->trapped(signal, info, static_cast<ucontext_t*>(context));
    return;
  }
  const struct sigaction& old = before[signal];
  if (old.sa_flags & SA_SIGINFO) {
    old.sa_sigaction(signal, info, context);
  } else if (old.sa_handler == SIG_DFL || old.sa_handler == SIG_IGN) {
    // It comes again, and then ends the process.
    sigaction(signal, &old, nullptr);
  } else {
    old.sa_handler(signal);
  }
}

void install_handler() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(signal, &action, &before[signal]);
}

// --- A launch.

void Engine::prepare(const Grid& grid, uint64_t seed) {
  grid_ = &grid;
  error_ = cudaSuccess;
  signal_ = 0;
  instruction_ = nullptr;
  count_ = int(grid.block.x * grid.block.y * grid.block.z);
  warp_count_ = (count_ + kLanes - 1) / kLanes;
  // Lanes that the last warp lacks are there, and done.
  if (int(threads_.size()) < warp_count_ * kLanes) threads_.resize(warp_count_ * kLanes);
  for (int i = 0; i < warp_count_ * kLanes; ++i) {
    Thread& thread = threads_[i];
    const unsigned n = unsigned(i);
    thread.index = {n % grid.block.x, n / grid.block.x % grid.block.y, n / grid.block.x / grid.block.y};
    thread.warp = i / kLanes, thread.lane = i % kLanes;
  }
  blocks_ = Order::of(uint64_t(grid.size.x) * grid.size.y * grid.size.z, seed);
  random_ = mix(seed);
  shuffled_ = seed % 4 >= 2;
  const uint64_t direction = seed % 4;
  warp_order_ = Order::of(warp_count_, direction + 4 * (mix(seed ^ 1) >> 8));
  lane_order_ = Order::of(kLanes, direction + 4 * (mix(seed ^ 2) >> 8));
  dynamic_ = shared_.end() - (grid.shared_bytes + kSharedAlign - 1) / kSharedAlign * kSharedAlign;
  blockDim = grid.block;
  gridDim = grid.size;
}

bool Engine::run_block() {
  if (grid_->shared_bytes > 0) memset(dynamic_ - kSharedAlign, kPoison, shared_.end() - dynamic_ + kSharedAlign);
  std::fill(std::begin(tags_), std::end(tags_), nullptr);
  alive_ = count_;
  for (int warp = 0; warp < warp_count_; ++warp) {
    Warp& w = warps_[warp];
    w.open = std::min(kLanes, count_ - warp * kLanes);
    for (int lane = 0; lane < kLanes; ++lane) {
      w.states[lane] = lane < w.open ? State::kNew : State::kDone;
      if (w.most > 0) at(warp, lane).operations = 0;
    }
    if (w.most > 0) {
      for (Operation& operation : w.ring) operation.number = 0, operation.reading = 0;
    }
    w.most = 0;
    w.least_done = w.open < kLanes ? 0 : ~uint64_t(0);
    w.cursor = kLanes - 1;
  }
  warp_place_ = 0;
  run_next(pick());
  active = this;
  change(host_, *running_->fibre);
  active = nullptr;
  return error_ == cudaSuccess;
}

cudaError_t Engine::run(const Grid& grid, uint64_t seed) {
  prepare(grid, seed);
  stack_t stack = {}, old = {};
  stack.ss_sp = signal_stack_.begin();
  stack.ss_size = signal_stack_.bytes();
  sigaltstack(&stack, &old);
  for (uint64_t i = 0; i < blocks_.n; ++i) {
    const uint64_t block = blocks_.at(i);
    blockIdx = {unsigned(block % grid.size.x), unsigned(block / grid.size.x % grid.size.y),
                     unsigned(block / grid.size.x / grid.size.y)};
    if (!run_block()) break;
    if (grid.shared_bytes > 0 && !canaries_whole()) {
      fprintf(stderr, "CUDA emulation: the block wrote outside its %zu bytes of shared memory", grid.shared_bytes);
      print_where();
      error_ = cudaErrorIllegalAddress;
      break;
    }
  }
  sigaltstack(&old, nullptr);
  if (signal_ != 0) report_trap();
  if (error_ != cudaSuccess) {
    // The fibres stand where they were left: they begin anew.
    idle_ = nullptr;
    for (const auto& fibre : fibres_) {
      fibre->begin(fibre_main);
      fibre->next = idle_;
      idle_ = fibre.get();
    }
    for (Thread& thread : threads_) {
      thread.fibre = nullptr;
      thread.operations = 0;
      thread.copies.clear();
      thread.groups.clear();
    }
  }
  return error_;
}

std::mutex engines_lock;
std::vector<std::unique_ptr<Engine>> engines;  // without a launch
std::map<const void*, int> allowed;            // shared memory that kernels may have

}  // namespace

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool grid_fits = grid.x > 0 && grid.x <= INT32_MAX && grid.y > 0 && grid.y <= 65535 && grid.z > 0 &&
                         grid.z <= 65535;
  if (!grid_fits || threads == 0 || threads > kMostThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes <= kSharedUnasked) return cudaSuccess;
  const std::lock_guard<std::mutex> guard(engines_lock);
  const auto known = allowed.find(kernel);
  return known != allowed.end() && config.dynamicSmemBytes <= size_t(known->second) ? cudaSuccess
                                                                                    : cudaErrorInvalidValue;
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMostShared) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> guard(engines_lock);
  allowed[kernel] = bytes;
  return cudaSuccess;
}

void sync_block(const char* file, int line) { active->sync_block(file, line); }

char* dynamic_shared() { return active->dynamic_shared(); }

void* static_shared(const void* tag, size_t bytes) { return active->static_shared(tag, bytes); }

void check_shared_row(const void* row, const char* what) {
  if (active->check_row(row)) return;
  active->wrong(cudaErrorIllegalAddress, "%s of %p, which is not 16 aligned bytes of shared memory", what, row);
}

void copy_async(void* shared, const void* global, bool valid) {
  check_shared_row(shared, "cp.async");
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    active->wrong(cudaErrorMisalignedAddress, "cp.async from %p, which is not aligned", global);
  }
  active->thread().copies.push_back({shared, global, valid});
}

void commit_copies() { active->thread().groups.push_back(active->thread().copies.size()); }

void wait_for_copies(int pending) {
  const size_t groups = active->thread().groups.size();
  if (groups > size_t(pending)) active->copy_until(groups - size_t(pending));
}

const char* offer(const char* what, unsigned mask, unsigned needed, const void* value, size_t bytes, const char* file,
                  int line) {
  if (mask != ~0u) active->wrong(cudaErrorLaunchFailure, "%s at %s:%d without all lanes", what, file, line);
  return active->offer(what, needed, value, bytes, file, line);
}

}  // namespace emulation

cudaError_t emulation_run(void* grid, uint64_t seed) {
  using namespace emulation;
  static std::once_flag installed;
  std::call_once(installed, install_handler);
  const std::unique_ptr<Grid> owned(static_cast<Grid*>(grid));
  std::unique_ptr<Engine> engine;
  {
    const std::lock_guard<std::mutex> guard(engines_lock);
    if (!engines.empty()) {
      engine = std::move(engines.back());
      engines.pop_back();
    }
  }
  if (!engine) engine.reset(new Engine);
  const cudaError_t error = engine->run(*owned, seed);
  const std::lock_guard<std::mutex> guard(engines_lock);
  engines.push_back(std::move(engine));
  return error;
}

void emulation_discard(void* grid) { delete static_cast<emulation::Grid*>(grid); }
