// The kernels of observe_ for x86 with AVX2, FMA and F16C. Run only where the processor has it: see observe.cpp.
#if defined(__x86_64__)

// Headers first: what they define must not be compiled for this instruction set, or the linker might use it everywhere.
#include <immintrin.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "layout.h"
#include "observe.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define TORCHPROBE_AVX2
namespace torchprobe::cpu {
namespace {
#include "observe_kernel.h"
}  // namespace
const Kernels kernels_avx2 = {"AVX2", observe, merge};
}  // namespace torchprobe::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
