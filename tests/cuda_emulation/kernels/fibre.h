// Fibres: stacks that a thread of the host changes between by hand.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" {
// Leaves this stack for another: stores where it was left, and keeps what a call keeps.
void emulation_switch(void** left, void* to);
// Its latter half, to be jumped to with the stack pointer `to`.
void emulation_land();
}

namespace emulation {

// Memory between two pages that can't be accessed.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    void* const map = mmap(nullptr, bytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED || mprotect(static_cast<char*>(map) + kPage, bytes, PROT_READ | PROT_WRITE) != 0) {
      perror("CUDA emulation: cannot map memory");
      abort();
    }
    begin_ = static_cast<char*>(map) + kPage;
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(begin_ - kPage, bytes_ + 2 * kPage); }

  char* begin() const { return begin_; }
  char* end() const { return begin_ + bytes_; }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kPage = 4096;
  char* begin_;
  size_t bytes_;
};

// A stack that was left. The address sanitizer must know the bounds of the one it comes to.
struct Stack {
  void* left = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;

  // What the address sanitizer is told before a change to this stack, and after it. `save`: where from, or null if what
  // is there is given up.
  void announce([[maybe_unused]] Stack* save) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(save != nullptr ? &save->fake : nullptr, bottom, bytes);
#endif
  }
  void landed([[maybe_unused]] Stack* from) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, from != nullptr ? &from->bottom : nullptr,
                                    from != nullptr ? &from->bytes : nullptr);
#endif
  }
};

struct Fibre : Stack {
#ifdef __SANITIZE_ADDRESS__
  Guarded memory{1 << 20};
#else
  Guarded memory{1 << 16};
#endif
  Fibre* next = nullptr;  // of those without work

  // Will begin in `entry`, which never returns.
  void begin(void (*entry)()) {
    bottom = memory.begin();
    bytes = memory.bytes();
    fake = nullptr;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory.begin(), memory.bytes());
#endif
    // As emulation_switch leaves a stack: six registers, and where to go on; above it the place where `entry` would
    // return to.
    auto* const words = reinterpret_cast<uint64_t*>(memory.end()) - 8;
    for (int word = 0; word < 8; ++word) words[word] = 0;
    words[6] = reinterpret_cast<uint64_t>(entry);
    left = words;
  }
};

}  // namespace emulation
