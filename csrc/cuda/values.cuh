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
extern __shared__ __align__(16) unsigned char shared_memory[];

// f(0) … f(N − 1), one after the other in the machine code: arrays that f indexes stay in registers.
template <int N, class F>
__device__ inline void each(F f) {
#pragma unroll
  for (int i = 0; i < N; ++i) f(i);
}

// The type in which an element is worked on.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class To, class From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// A number near x that S has.
template <class S>
__device__ inline S narrow(Compute<S> x) {
  if constexpr (std::is_same_v<S, BFloat16>) return {uint16_t(__float_as_uint(x) >> 16)};
  else if constexpr (std::is_same_v<S, Float16>) return {__half_as_ushort(__float2half_rn(x))};
  else return x;
}

template <class T>
__device__ inline bool is_finite(T x) {
  return x - x == 0;
}
// The second one may be nan, and is then passed over.
template <class T>
__device__ inline T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__device__ inline T larger(T a, T b) {
  return b > a ? b : a;
}
// As one instruction; either may be nan.
__device__ inline float smaller(float a, float b) { return fminf(a, b); }
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }

// N neighbors that are copied at once, 16 bytes at a time.
template <class S, int N>
struct alignas(N * sizeof(S) < 16 ? N * sizeof(S) : 16) Pack {
  S value[N];
};

// Two elements; those of 16 bits share a register, the first in its lower half, and are widened and compared together.
template <class S, bool Packed = sizeof(S) == 2>
struct Pair {
  S first, second;
  __device__ static Pair of(S a, S b) { return {a, b}; }
  __device__ static Pair at(const S* memory) { return {memory[0], memory[1]}; }
  __device__ Pair where(bool a, bool b, Pair other) const { return {a ? first : other.first, b ? second : other.second}; }
};
template <class S>
struct Pair<S, true> {
  uint32_t bits;
  __device__ static Pair of(S a, S b) { return {a.bits | uint32_t(b.bits) << 16}; }
  __device__ static Pair at(const S* memory) { return bits_as<Pair>(*reinterpret_cast<const Pack<S, 2>*>(memory)); }
  __device__ Pair where(bool a, bool b, Pair other) const {
    const uint32_t mine = (a ? 0xffffu : 0) | (b ? 0xffff0000u : 0);
    return {(bits & mine) | (other.bits & ~mine)};
  }
  using Native = std::conditional_t<std::is_same_v<S, BFloat16>, __nv_bfloat162, __half2>;
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
template <class S>
__device__ inline Pair<S> twice(Compute<S> x) {
  return Pair<S>::of(narrow<S>(x), narrow<S>(x));
}

// Both of two elements.
template <class S>
__device__ inline Pair<S> smaller(Pair<S> a, Pair<S> b) {
  if constexpr (sizeof(S) > 2) return {smaller(a.first, b.first), smaller(a.second, b.second)};
  else return bits_as<Pair<S>>(__hmin2(bits_as<typename Pair<S>::Native>(a), bits_as<typename Pair<S>::Native>(b)));
}
template <class S>
__device__ inline Pair<S> larger(Pair<S> a, Pair<S> b) {
  if constexpr (sizeof(S) > 2) return {larger(a.first, b.first), larger(a.second, b.second)};
  else return bits_as<Pair<S>>(__hmax2(bits_as<typename Pair<S>::Native>(a), bits_as<typename Pair<S>::Native>(b)));
}
// The least and the greatest of many elements, each in the room of one T: a Pair as long as it is packed.
template <class S>
struct Extremes {
  std::conditional_t<sizeof(S) == 2, Pair<S>, S> low, high;

  __device__ static Extremes of(Pair<S> low, Pair<S> high) {
    if constexpr (sizeof(S) > 2) return {smaller(low.first, low.second), larger(high.first, high.second)};
    else return {low, high};
  }
  __device__ void add(const Extremes& other) { low = smaller(low, other.low), high = larger(high, other.high); }
};
template <class S>
__device__ inline void widen(const Extremes<S>& x, Compute<S>& low, Compute<S>& high) {
  if constexpr (sizeof(S) > 2) {
    low = x.low, high = x.high;
  } else {
    Compute<S> other_low, other_high;
    widen(x.low, low, other_low), widen(x.high, high, other_high);
    low = smaller(low, other_low), high = larger(high, other_high);
  }
}

// Between these the fourth powers of scaled deviations are safe to sum up.
template <class T>
constexpr T LOWEST = sizeof(T) == 8 ? T(0x1p-200) : T(0x1p-28);
template <class T>
constexpr T HIGHEST = sizeof(T) == 8 ? T(0x1p200) : T(0x1p26);

// The mean may lie so many standard deviations from what powers are taken about, squared: beyond it, moments about the mean lose more than
// 1e-5 to cancellation.
constexpr double FARTHEST = 2.25;

// 2^-e with x·2^-e in [1, 2); x finite and not negative. Kept within the normal range.
__device__ inline float inverse_power(float x) {
  const int exponent = int(__float_as_uint(x) >> 23);
  return __uint_as_float(uint32_t(254 - (exponent < 1 ? 1 : exponent > 253 ? 253 : exponent)) << 23);
}
__device__ inline double inverse_power(double x) {
  const int exponent = int(uint64_t(__double_as_longlong(x)) >> 52);
  return __longlong_as_double(int64_t(2046 - (exponent < 1 ? 1 : exponent > 2045 ? 2045 : exponent)) << 52);
}

// Of the middle two, halfway: one outlier among four values does no harm.
template <class T>
__device__ inline T median(T a, T b, T c, T d) {
  return larger(smaller(a, b), smaller(c, d)) / 2 + smaller(larger(a, b), larger(c, d)) / 2;
}

// What the lane has whose number differs in these bits.
template <class T>
__device__ inline T other_lane(T x, int bits) {
  return __shfl_xor_sync(ALL_LANES, x, bits);
}
// Over the 32 lanes of a warp; every lane gets the result, the same in whatever order the lanes run.
template <class T>
__device__ inline T warp_sum(T x) {
  for (int m = 16; m; m /= 2) x += other_lane(x, m);
  return x;
}
template <class T>
__device__ inline T warp_max(T x) {
  for (int m = 16; m; m /= 2) x = larger(x, other_lane(x, m));
  return x;
}
// Of the middle values of the lanes, in groups of four, and of these again.
template <class T>
__device__ inline T middle_of_lanes(T x) {
  for (int m = 1; m < 16; m *= 4) x = median(x, other_lane(x, m), other_lane(x, 2 * m), other_lane(x, 3 * m));
  return x / 2 + other_lane(x, 16) / 2;
}

// Copies one element or pack to shared memory. What fits the hardware's asynchronous copy is only ordered: it is there after
// __pipeline_wait_prior.
template <class P>
__device__ inline void fetch(P* shared, const P* global) {
  if constexpr (sizeof(P) >= 4) __pipeline_memcpy_async(shared, global, sizeof(P));
  else *shared = *global;
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

}  // namespace torchprobe::cuda
