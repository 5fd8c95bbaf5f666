// Which instruction set the kernels may use on this machine.
#pragma once

#include <cstdlib>
#include <string>

namespace torchprobe::cpu {

enum class Isa { Baseline, Avx2, Avx512, Avx512Popcount };

// The widest that this processor has; TORCHPROBE_ISA=baseline|avx2|avx512 asks for less.
inline Isa choose_isa() {
#if defined(__x86_64__)
  const char* asked = std::getenv("TORCHPROBE_ISA");
  const std::string limit = asked ? asked : "";
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

}  // namespace torchprobe::cpu
