// The kernels of overlap_tally_ for x86 with AVX-512 (F, BW, DQ, VL). Run only where the processor has it: see isa.h.
#if defined(__x86_64__)

// Headers first: what they define must not be compiled for this instruction set, or the linker might use it everywhere.
#include <immintrin.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "overlap.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // _mm512_undefined_ps of GCC's own headers
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

#define TORCHPROBE_AVX512
namespace torchprobe::cpu {
namespace {
#include "overlap_kernel.h"
}  // namespace
const OverlapKernels overlap_avx512 = {LANES, paint, count, tally};
}  // namespace torchprobe::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
