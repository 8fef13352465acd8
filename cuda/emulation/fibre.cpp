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

namespace emulation {

namespace {

// The stack that was left for the one that runs, which has not noticed yet.
__thread Stack* leaving;

}  // namespace

void arrive([[maybe_unused]] Stack& here) {
#ifdef __SANITIZE_ADDRESS__
  const bool known = leaving != nullptr;
  __sanitizer_finish_switch_fiber(here.fake, known ? &leaving->bottom : nullptr, known ? &leaving->bytes : nullptr);
#endif
  leaving = nullptr;
}

void announce([[maybe_unused]] Stack* from, [[maybe_unused]] const Stack& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from != nullptr ? &from->fake : nullptr, to.bottom, to.bytes);
#endif
}

void change(Stack& from, Stack& to) {
  leaving = &from;
  announce(&from, to);
  emulation_switch(&from.left, to.left);
  arrive(from);
}

}  // namespace emulation
