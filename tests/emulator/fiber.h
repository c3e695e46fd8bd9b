// Fibers: the threads of the emulated machine, switched by hand on one host thread.
//
// A fiber is entered once through ucontext, which gives it a stack; after that, it is switched with _setjmp and _longjmp, because
// swapcontext makes two system calls each time. Needs _FORTIFY_SOURCE off: its longjmp refuses to go to another stack.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <deque>
#include <new>

namespace emulator {

class Fibers {
 public:
  // What every fiber runs, again each time it is resumed after its end.
  explicit Fibers(void (*body)()) : body_(body) { instance_ = this; }

  // Fibers 0 to count - 1 exist and start at the beginning of the body when next resumed.
  void prepare(size_t count) {
    while (fibers_.size() < count) fibers_.push_back({.stack = make_stack()});
    for (Fiber& fiber : fibers_) fiber.is_entered = fiber.is_entered && fiber.is_at_end;
  }

  // Runs a fiber until it suspends itself or ends.
  __attribute__((noinline)) void resume(size_t idx) {
    current_ = &fibers_[idx];
    if (_setjmp(scheduler_) != 0) return;
    if (current_->is_entered) _longjmp(current_->registers, 1);
    current_->is_entered = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = current_->stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Fibers::enter, 0);
    setcontext(&context);
  }

  // Goes back to the caller of resume. Returns when this fiber is resumed.
  __attribute__((noinline)) void suspend() {
    if (_setjmp(current_->registers) == 0) _longjmp(scheduler_, 1);
  }

 private:
  static constexpr size_t kStackBytes = 64 * 1024;

  struct Fiber {
    char* stack;
    jmp_buf registers = {};
    bool is_entered = false;
    bool is_at_end = false;
  };

  static void enter() {
    for (;;) {
      Fiber* const self = instance_->current_;
      self->is_at_end = false;
      instance_->body_();
      self->is_at_end = true;
      instance_->suspend();
    }
  }

  // Below each stack lies a page that nobody may touch, so that an overflow is a crash and not a wrong result.
  static char* make_stack() {
    const size_t guard_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* const memory = mmap(nullptr, guard_bytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard_bytes, PROT_NONE) != 0) throw std::bad_alloc();
    return static_cast<char*>(memory) + guard_bytes;
  }

  static inline Fibers* instance_ = nullptr;
  void (*body_)();
  std::deque<Fiber> fibers_;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_ = {};
};

}  // namespace emulator
