// The kernels for x86-64 with AVX-512.
#if defined(__x86_64__)
#define TORCHPROBE_AVX512
#include "isa_begin.h"
#include "observe_kernel.h"
#include "overlap_kernel.h"
#include "exponents_kernel.h"
#include "isa_end.h"

namespace torchprobe::cpu {
const ObserveKernels ObserveKernels::avx512 = cpu::observe_kernels("AVX-512");
const OverlapKernels OverlapKernels::avx512 = {LANES, cpu::paint, cpu::count, cpu::tally};
const ExponentKernels ExponentKernels::avx512 = cpu::exponent_kernels();
}  // namespace torchprobe::cpu
#endif
