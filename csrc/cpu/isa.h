// The instruction set that the kernels use on this machine.
#pragma once

#include <cstdlib>
#include <string>

namespace torchprobe::cpu {

enum class Isa { Baseline, Avx2, Avx512, Avx512Popcount };

// The widest set that this processor has. TORCHPROBE_ISA=baseline|avx2|avx512 sets an upper limit.
inline Isa choose_isa() {
#if defined(__x86_64__)
  const char* variable = std::getenv("TORCHPROBE_ISA");
  const std::string limit = variable ? variable : "";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (limit == "baseline" || !avx2) return Isa::Baseline;
  if (limit == "avx2" || !avx512) return Isa::Avx2;
  return limit != "avx512" && __builtin_cpu_supports("avx512vpopcntdq") ? Isa::Avx512Popcount : Isa::Avx512;
#else
  return Isa::Baseline;
#endif
}

// The kernels of one operator for this machine, chosen at the first call. Kernels is a table of functions, such as ObserveKernels, with one
// static member for each instruction set; the files kernels_*.cpp define them.
template <class Kernels>
const Kernels& choose() {
  static const Kernels& chosen = []() -> const Kernels& {
    switch (choose_isa()) {
#if defined(__x86_64__)
      case Isa::Avx512Popcount: return Kernels::avx512_popcount;
      case Isa::Avx512: return Kernels::avx512;
      case Isa::Avx2: return Kernels::avx2;
#endif
      default: return Kernels::baseline;
    }
  }();
  return chosen;
}

}  // namespace torchprobe::cpu
