// The kernels for x86-64 with AVX2.
#if defined(__x86_64__)
#define TORCHPROBE_AVX2
#include "isa_begin.h"
#include "observe_kernel.h"
#include "overlap_kernel.h"
#include "exponents_kernel.h"
#include "isa_end.h"

namespace torchprobe::cpu {
const ObserveKernels ObserveKernels::avx2 = cpu::observe_kernels("AVX2");
const OverlapKernels OverlapKernels::avx2 = {LANES, cpu::paint, cpu::count, cpu::tally};
const ExponentKernels ExponentKernels::avx2 = cpu::exponent_kernels();
}  // namespace torchprobe::cpu
#endif
