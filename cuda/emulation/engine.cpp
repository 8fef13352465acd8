// Which thread of a block runs, and what threads wait at.
#include "engine.h"

#include <algorithm>

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

namespace emulation {

__thread int lane;
__thread Engine* active;

namespace {

bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }

}  // namespace

// The next lane in their order after the last one that ran, that can run.
Thread* Engine::pick_lane(int warp) {
  Warp& w = warps_[warp];
  for (int i = 0; i < kLanes; ++i) {
    w.cursor = (w.cursor + 1) % kLanes;
    const int lane = lane_order_[w.cursor];
    if (can_run(warp, lane)) return &at(warp, lane);
  }
  return nullptr;
}

// One of those that the running thread waits for, if any can run.
Thread* Engine::pick_awaited() {
  const int warp = running_->warp;
  unsigned awaited = running_->needed & ~warps_[warp].of(running_->operations).arrived;
  while (awaited != 0) {
    const unsigned turned = awaited >> turn_ | awaited << (-turn_ & 31);
    const int lane = ((backward_ ? 31 - __builtin_clz(turned) : __builtin_ctz(turned)) + turn_) % kLanes;
    if (can_run(warp, lane)) return &at(warp, lane);
    awaited &= ~(1u << lane);
  }
  return nullptr;
}

// The thread to go on with: of the same warp as long as one can, then of the next. Null: the block is done.
Thread* Engine::pick() {
  // Who waits goes on as soon as it can, whatever others have not done yet.
  if (running_ != nullptr && state_of(*running_) == State::kValues) {
    if (Thread* const next = pick_awaited()) return next;
  }
  // Now and then another warp before its time.
  if (shuffled_ && warp_count_ > 1 && random() % 16 == 0) warp_place_ = int(random() % warp_count_);
  for (int tried = 0;;) {
    const int warp = warp_order_[warp_place_];
    if (warps_[warp].open > 0) {
      if (Thread* const next = pick_lane(warp)) return next;
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
  if (!thread.groups.empty() || !thread.copies.empty()) {
    thread.groups.push_back(thread.copies.size());
    copy_until(thread.groups.size());
  }
  if (thread.operations > 0) w.of(thread.operations).reading &= ~(1u << thread.lane);
  if (thread.operations < w.most) {
    const Operation& operation = w.of(thread.operations + 1);
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
  arrive(*engine.running_->fibre);
  for (;;) {
    engine.grid_->run();
    engine.done();
    Thread* const last = engine.running_;
    Fibre* const self = last->fibre;
    Thread* const next = engine.pick();
    last->fibre = nullptr;
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
    if (other.line != line || !same(other.file, file)) {
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
  if (thread.operations > 0) w.of(thread.operations).reading &= ~bit;
  if (thread.operations >= w.least_done) {
    wrong(cudaErrorLaunchFailure, "%s at %s:%d with lanes that have exited", what, file, line);
  }
  const uint64_t number = thread.operations + 1;
  Operation& operation = w.of(number);
  while (!operation.free_for(number)) wait(State::kPlace);
  if (operation.number != number) {
    operation.number = number;
    operation.arrived = 0;
    operation.reading = ~0u;
    operation.what = what, operation.file = file, operation.line = line;
  } else if (operation.line != line || !same(operation.what, what) || !same(operation.file, file)) {
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

}  // namespace emulation
