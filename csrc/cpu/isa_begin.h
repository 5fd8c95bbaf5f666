// What stands between this header and isa_end.h is compiled for one instruction set, in a namespace that only this translation unit sees:
//
//   TORCHPROBE_AVX2        x86-64 with AVX2, FMA and F16C
//   TORCHPROBE_AVX512      x86-64 with AVX-512 (F, BW, DQ, VL)
//   TORCHPROBE_VPOPCNT     in addition to TORCHPROBE_AVX512: the instruction that counts bits
//   none of these          128-bit vectors of the compiler: SSE2 on x86-64, NEON on Arm
//
// Define one of them first. Its code runs only on processors that have the set: see isa.h.

// Headers come before the pragma. Otherwise their inline functions would be compiled for this instruction set, and the linker might use them
// in the whole library.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "exponents.h"
#include "layout.h"
#include "observe.h"
#include "overlap.h"

#define TORCHPROBE_PRAGMA(TEXT) _Pragma(#TEXT)
#if defined(__clang__)
#define TORCHPROBE_TARGET(SETS) TORCHPROBE_PRAGMA(clang attribute push(__attribute__((target(SETS))), apply_to = function))
#else
#define TORCHPROBE_TARGET(SETS) TORCHPROBE_PRAGMA(GCC push_options) TORCHPROBE_PRAGMA(GCC target(SETS))
#endif

#if defined(TORCHPROBE_VPOPCNT)
TORCHPROBE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,avx512vpopcntdq")
#elif defined(TORCHPROBE_AVX512)
TORCHPROBE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt")
#elif defined(TORCHPROBE_AVX2)
TORCHPROBE_TARGET("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

#if defined(TORCHPROBE_AVX512) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // _mm512_undefined_ps in GCC's own headers
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace torchprobe::cpu {
namespace {
#include "simd.h"
