// The kernels of overlap_tally_ for any processor: 128-bit vectors of the compiler's own (SSE2 on x86-64, NEON on Arm).
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "overlap.h"

namespace torchprobe::cpu {
namespace {
#include "overlap_kernel.h"
}  // namespace
const OverlapKernels overlap_baseline = {0, paint, count, tally};
}  // namespace torchprobe::cpu
