// The kernels for any processor.
#include "isa_begin.h"
#include "observe_kernel.h"
#include "overlap_kernel.h"
#include "exponents_kernel.h"
#include "isa_end.h"

namespace torchprobe::cpu {
const ObserveKernels ObserveKernels::baseline = cpu::observe_kernels("baseline (128-bit)");
const OverlapKernels OverlapKernels::baseline = {0, cpu::paint, cpu::count, cpu::tally};
const ExponentKernels ExponentKernels::baseline = cpu::exponent_kernels();
}  // namespace torchprobe::cpu
