// The float mode of a thread, in which the kernels compute.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace torchprobe::cpu {

// While it exists, subnormal numbers are numbers. torch.set_flush_denormal(True) makes a processor read them as 0, and with them the small
// numbers of float16, whose conversion passes through them.
class EveryNumber {
 public:
  EveryNumber() : before_(get()) {
    if (before_ & FLUSH) set(before_ & ~FLUSH);
  }
  ~EveryNumber() {
    if (before_ & FLUSH) set(before_);
  }
  EveryNumber(const EveryNumber&) = delete;
  EveryNumber& operator=(const EveryNumber&) = delete;

 private:
#if defined(__x86_64__) || defined(_M_X64)
  using Mode = unsigned;
  static constexpr Mode FLUSH = 0x8040;  // flush to zero, and denormals are zero
  static Mode get() { return _mm_getcsr(); }
  static void set(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__) && defined(__GNUC__)
  using Mode = uint64_t;
  static constexpr Mode FLUSH = (uint64_t(1) << 24) | (uint64_t(1) << 19);  // FZ and FZ16
  static Mode get() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode)::"memory");
    return mode;
  }
  static void set(Mode mode) { asm volatile("msr fpcr, %0" ::"r"(mode) : "memory"); }
#else
  using Mode = unsigned;
  static constexpr Mode FLUSH = 0;
  static Mode get() { return 0; }
  static void set(Mode) {}
#endif
  const Mode before_;
};

}  // namespace torchprobe::cpu
