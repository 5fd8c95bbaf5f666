// The kernels for any processor.
#include "isa_begin.h"
#include "observe_kernel.h"
#include "overlap_kernel.h"
#include "isa_end.h"

namespace torchprobe::cpu {
const ObserveKernels ObserveKernels::baseline = {"baseline (128-bit)", cpu::observe, cpu::merge};
const OverlapKernels OverlapKernels::baseline = {0, cpu::paint, cpu::count, cpu::tally};
}  // namespace torchprobe::cpu
