// The kernels for x86-64 with AVX-512 and its instruction that counts bits, which only overlap_tally_ needs.
#if defined(__x86_64__)
#define TORCHPROBE_AVX512
#define TORCHPROBE_VPOPCNT
#include "isa_begin.h"
#include "overlap_kernel.h"
#include "isa_end.h"

namespace torchprobe::cpu {
const OverlapKernels OverlapKernels::avx512_popcount = {LANES, cpu::paint, cpu::count, cpu::tally};
}  // namespace torchprobe::cpu
#endif
