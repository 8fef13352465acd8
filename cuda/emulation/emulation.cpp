// Launches: what they are given, how they begin, end, and go wrong.
#include "emulation.h"

#include <dlfcn.h>
#include <stdarg.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "engine.h"

namespace emulation {

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
  const char* const parameters = strchr(grid_->parameters, '[');
  fprintf(stderr, ", in thread (%u, %u, %u) of block (%u, %u, %u) of a kernel %s", thread.x, thread.y, thread.z, block.x,
          block.y, block.z, parameters != nullptr ? parameters : "");
  Dl_info info;
  for (const void* const code : {grid_->kernel, instruction_}) {
    if (code == nullptr || dladdr(code, &info) == 0) continue;
    fprintf(stderr, "; addr2line -Cfe %s %#zx", info.dli_fname,
            size_t(static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase)));
  }
  fprintf(stderr, "\n");
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
  announce(nullptr, host_);
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

namespace {

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

}  // namespace

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
  backward_ = seed % 4 == 1 || (shuffled_ && random() % 2 == 0);
  turn_ = shuffled_ ? int(random() % kLanes) : 0;
  const uint64_t direction = seed % 4;
  const Order warps = Order::of(warp_count_, direction + 4 * (mix(seed ^ 1) >> 8));
  const Order lanes = Order::of(kLanes, direction + 4 * (mix(seed ^ 2) >> 8));
  for (int i = 0; i < warp_count_; ++i) warp_order_[i] = int(warps.at(i));
  for (int i = 0; i < kLanes; ++i) lane_order_[i] = int(lanes.at(i));
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
  running_ = nullptr;
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
    const uint64_t row = block / grid.size.x;
    blockIdx = {unsigned(block % grid.size.x), unsigned(row % grid.size.y), unsigned(row / grid.size.y)};
    if (!run_block()) break;
    if (grid.shared_bytes > 0 && !canaries_whole()) {
      flockfile(stderr);
      fprintf(stderr, "CUDA emulation: the block wrote outside its %zu bytes of shared memory", grid.shared_bytes);
      print_where();
      funlockfile(stderr);
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

namespace {

// What launches share. Never destroyed: streams may still run when the process ends.
struct Shared {
  std::mutex lock;
  std::vector<std::unique_ptr<Engine>> engines;  // without a launch
  std::map<const void*, int> allowed;            // dynamic shared memory that kernels may have
};

Shared& shared() {
  static Shared* const shared = new Shared;
  return *shared;
}

}  // namespace

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool grid_fits = grid.x > 0 && grid.x <= INT32_MAX && grid.y > 0 && grid.y <= 65535 && grid.z > 0 &&
                         grid.z <= 65535;
  if (!grid_fits || threads == 0 || threads > kMostThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes <= kSharedUnasked) return cudaSuccess;
  const std::lock_guard<std::mutex> guard(shared().lock);
  const auto known = shared().allowed.find(kernel);
  const size_t allowed = known != shared().allowed.end() ? size_t(known->second) : kSharedUnasked;
  return config.dynamicSmemBytes <= allowed ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMostShared) return cudaErrorInvalidValue;
  const std::lock_guard<std::mutex> guard(shared().lock);
  shared().allowed[kernel] = bytes;
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
  std::unique_lock<std::mutex> lock(shared().lock);
  if (!shared().engines.empty()) {
    engine = std::move(shared().engines.back());
    shared().engines.pop_back();
  }
  lock.unlock();
  if (!engine) engine.reset(new Engine);
  const cudaError_t error = engine->run(*owned, seed);
  lock.lock();
  shared().engines.push_back(std::move(engine));
  return error;
}

void emulation_discard(void* grid) { delete static_cast<emulation::Grid*>(grid); }
