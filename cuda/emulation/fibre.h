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

// Memory between two pages that can't be accessed; whole pages.
class Guarded {
 public:
  explicit Guarded(size_t least) : bytes_((least + kPage - 1) / kPage * kPage) {
    void* const map = mmap(nullptr, bytes_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED || mprotect(static_cast<char*>(map) + kPage, bytes_, PROT_READ | PROT_WRITE) != 0) {
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

// A stack that was left. Its bounds are for the address sanitizer.
struct Stack {
  void* left = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;
};

// Leaves one stack for another.
void change(Stack& from, Stack& to);

// For those who come to a stack in another way: what the address sanitizer is told before (null: what is on the stack
// that is left is given up) and after.
void announce(Stack* from, const Stack& to);
void arrive(Stack& here);

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
