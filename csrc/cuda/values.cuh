// Elements, and the few operations that the kernels do on them alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "plan.h"

namespace torchprobe::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// The type in which an element is worked on.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// N neighbours that are copied at once, 16 bytes at a time.
template <class S, int N>
struct alignas(N * sizeof(S) < 16 ? N * sizeof(S) : 16) Pack {
  S value[N];
};

template <class To, class From>
__device__ inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Two elements; those of 16 bits share a register, the first in its lower half, and are widened and compared together.
template <class S, bool Packed = sizeof(S) == 2>
struct Pair {
  S first, second;
  __device__ static Pair of(S a, S b) { return {a, b}; }
  __device__ static Pair at(const S* memory) { return {memory[0], memory[1]}; }
};
template <class S>
struct Pair<S, true> {
  uint32_t bits;
  __device__ static Pair of(S a, S b) { return {a.bits | uint32_t(b.bits) << 16}; }
  __device__ static Pair at(const S* memory) {
    Pair pair;
    memcpy(&pair, memory, sizeof pair);
    return pair;
  }
};

template <class S>
__device__ inline void widen(Pair<S> x, S& first, S& second) {
  first = x.first, second = x.second;
}
__device__ inline void widen(Pair<BFloat16> x, float& first, float& second) {
  first = __uint_as_float(x.bits << 16), second = __uint_as_float(x.bits & 0xffff0000u);
}
__device__ inline void widen(Pair<Float16> x, float& first, float& second) {
  const float2 both = __half22float2(bits_as<__half2>(x));
  first = both.x, second = both.y;
}

// What was widened, as it was.
__device__ inline void narrow(float x, BFloat16& to) { to.bits = uint16_t(__float_as_uint(x) >> 16); }
__device__ inline void narrow(float x, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float low = 0x1p-20f, high = 0x1p24f;  // between these, the fourth powers of scaled deviations are safe to sum
};
template <>
struct Limits<double> {
  static constexpr double low = 0x1p-200, high = 0x1p200;
};

// A vector's mean comes from a sum in T: it must not be farther from 0 than so many standard deviations. With 16-bit elements the part of the
// mean that does not fit into a float is neglected, too.
template <class S>
constexpr double farthest_mean = sizeof(S) == 8 ? 0x1p20 : sizeof(S) == 4 ? 256 : 32;

template <class T>
__device__ inline bool is_finite(T x) {
  return x - x == 0;
}

// 2^-e with x·2^-e in [1, 2); x finite and not negative. Kept within the normal range.
__device__ inline float inverse_power(float x) {
  const int exponent = int(__float_as_uint(x) >> 23);
  return __uint_as_float(uint32_t(254 - (exponent < 1 ? 1 : exponent > 253 ? 253 : exponent)) << 23);
}
__device__ inline double inverse_power(double x) {
  const int exponent = int(uint64_t(__double_as_longlong(x)) >> 52);
  return __longlong_as_double(int64_t(2046 - (exponent < 1 ? 1 : exponent > 2045 ? 2045 : exponent)) << 52);
}

template <class T>
__device__ inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__device__ inline T larger(T a, T b) {
  return b > a ? b : a;
}
// As one instruction; a nan is passed over.
__device__ inline float smaller(float a, float b) { return fminf(a, b); }
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline Pair<BFloat16> smaller(Pair<BFloat16> a, Pair<BFloat16> b) {
  return bits_as<Pair<BFloat16>>(__hmin2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
}
__device__ inline Pair<BFloat16> larger(Pair<BFloat16> a, Pair<BFloat16> b) {
  return bits_as<Pair<BFloat16>>(__hmax2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
}
__device__ inline Pair<Float16> smaller(Pair<Float16> a, Pair<Float16> b) {
  return bits_as<Pair<Float16>>(__hmin2(bits_as<__half2>(a), bits_as<__half2>(b)));
}
__device__ inline Pair<Float16> larger(Pair<Float16> a, Pair<Float16> b) {
  return bits_as<Pair<Float16>>(__hmax2(bits_as<__half2>(a), bits_as<__half2>(b)));
}

// Of the middle two, halfway: one outlier among four values does no harm.
template <class T>
__device__ inline T median(T a, T b, T c, T d) {
  return larger(smaller(a, b), smaller(c, d)) / 2 + smaller(larger(a, b), larger(c, d)) / 2;
}

// Over the 32 lanes of a warp; every lane gets the result, the same in whatever order the lanes run.
template <class T>
__device__ inline T warp_sum(T x) {
  for (int m = 16; m; m /= 2) x += __shfl_xor_sync(ALL_LANES, x, m);
  return x;
}
template <class T>
__device__ inline T warp_max(T x) {
  for (int m = 16; m; m /= 2) x = larger(x, __shfl_xor_sync(ALL_LANES, x, m));
  return x;
}

// Copies one element or pack to shared memory. What fits the hardware's asynchronous copy is only ordered: it is there after
// __pipeline_wait_prior.
template <class P>
__device__ inline void fetch(P* shared, const P* global) {
  if constexpr (sizeof(P) == 4 || sizeof(P) == 8 || sizeof(P) == 16)
    __pipeline_memcpy_async(shared, global, sizeof(P));
  else
    *shared = *global;
}

// Offset of vector `v` in elements. Not inlined: divisions are long.
static __device__ __noinline__ int64_t offset_of(const Call& call, int64_t v) {
  int64_t offset = 0;
#pragma unroll 1
  for (int d = call.dims - 1; d > 0; --d) {
    const int64_t rest = v < INT32_MAX && call.size[d] < INT32_MAX ? int64_t(uint32_t(v) / uint32_t(call.size[d])) : v / call.size[d];
    offset += (v - rest * call.size[d]) * call.stride[d];
    v = rest;
  }
  return call.dims ? offset + v * call.stride[0] : 0;
}

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class T>
__device__ inline T* shared(uint32_t at) {
  return reinterpret_cast<T*>(shared_memory + at);
}

}  // namespace torchprobe::cuda
