// The kernels for x86-64 with AVX-512.
#if defined(__x86_64__)
#define TORCHPROBE_AVX512
#include "isa_begin.h"
#include "observe_kernel.h"
#include "overlap_kernel.h"
#include "isa_end.h"

namespace torchprobe::cpu {
const ObserveKernels ObserveKernels::avx512 = {"AVX-512", cpu::observe, cpu::merge};
const OverlapKernels OverlapKernels::avx512 = {LANES, cpu::paint, cpu::count, cpu::tally};
}  // namespace torchprobe::cpu
#endif
