// The kernels of observe_ for any processor: 128-bit vectors of the compiler's own (SSE2 on x86-64, NEON on Arm).
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "layout.h"
#include "observe.h"

namespace torchprobe::cpu {
namespace {
#include "observe_kernel.h"
}  // namespace
const Kernels kernels_baseline = {"baseline (128-bit)", observe, merge};
}  // namespace torchprobe::cpu
