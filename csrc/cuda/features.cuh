// The moments of single features, as one thread sums them up.
#pragma once

#include "values.cuh"

namespace torchprobe::cuda {

// The extremes of N features; a nan is passed over.
template <class S, int N, bool Packed>
struct Extremes {
  using T = Compute<S>;
  T lowest[N], highest[N];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < N; ++i) lowest[i] = T(INFINITY), highest[i] = -T(INFINITY);
  }
  __device__ T low(int i) const { return lowest[i]; }
  __device__ T high(int i) const { return highest[i]; }
  __device__ void lower(int i, T x) { lowest[i] = smaller(lowest[i], x); }
  __device__ void raise(int i, T x) { highest[i] = larger(highest[i], x); }
};
// Elements of 16 bits can be compared as they come, two features at a time.
template <class S, int N>
struct Extremes<S, N, true> {
  Pair<S> lowest[N / 2], highest[N / 2];

  // x for feature i, and for its neighbour what changes nothing.
  __device__ static Pair<S> alone(int i, float x, float nothing) {
    S mine, other;
    narrow(x, mine), narrow(nothing, other);
    return i % 2 ? Pair<S>::of(other, mine) : Pair<S>::of(mine, other);
  }
  __device__ static float one_of(Pair<S> pair, int i) {
    float first, second;
    widen(pair, first, second);
    return i % 2 ? second : first;
  }
  __device__ void clear() {
#pragma unroll
    for (int k = 0; k < N / 2; ++k) lowest[k] = alone(0, INFINITY, INFINITY), highest[k] = alone(0, -INFINITY, -INFINITY);
  }
  __device__ float low(int i) const { return one_of(lowest[i / 2], i); }
  __device__ float high(int i) const { return one_of(highest[i / 2], i); }
  __device__ void lower(int i, float x) { lowest[i / 2] = smaller(lowest[i / 2], alone(i, x, INFINITY)); }
  __device__ void raise(int i, float x) { highest[i / 2] = larger(highest[i / 2], alone(i, x, -INFINITY)); }
  // Of features i and i + 1; i is even.
  __device__ void add(int i, Pair<S> x) { lowest[i / 2] = smaller(lowest[i / 2], x), highest[i / 2] = larger(highest[i / 2], x); }
};

// N features: the sums of the powers of (x − shift)·scale, Σ|x|·scale, and the extremes of x.
template <class S, int N, bool Packed>
struct Features {
  static constexpr bool PACKED = Packed;
  using T = Compute<S>;
  T scale[N], offset[N];  // offset = −shift·scale, which is exact: scale is a power of two
  T s1[N], s2[N], s3[N], s4[N], abs_sum[N];
  Extremes<S, N, Packed> extremes;

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < N; ++i) s1[i] = s2[i] = s3[i] = s4[i] = abs_sum[i] = 0;
    extremes.clear();
  }

  __device__ void set_shift(int i, T shift, T scale_) { scale[i] = scale_, offset[i] = -(shift * scale_); }
  __device__ T shift(int i) const { return -offset[i] * inverse_power(scale[i]); }

  // Everything but the extremes.
  __device__ void add(int i, T x) {
    const T d = fma(x, scale[i], offset[i]), q = d * d;
    abs_sum[i] = fma(T(fabs(x)), scale[i], abs_sum[i]);
    s1[i] += d;
    s2[i] += q;
    s3[i] = fma(q, d, s3[i]);
    s4[i] = fma(q, q, s4[i]);
  }

  // Hands the seven numbers of a feature to another thread, `step` apart, and takes in those of another.
  static constexpr int NUMBERS = 7;
  __device__ void hand_on(T* to, int step, int i) const {
    const T all[NUMBERS] = {s1[i], s2[i], s3[i], s4[i], extremes.low(i), extremes.high(i), abs_sum[i]};
#pragma unroll
    for (int k = 0; k < NUMBERS; ++k) to[k * step] = all[k];
  }
  __device__ void take_in(const T* from, int step, int i) {
    s1[i] += from[0];
    s2[i] += from[step];
    s3[i] += from[2 * step];
    s4[i] += from[3 * step];
    extremes.lower(i, from[4 * step]);
    extremes.raise(i, from[5 * step]);
    abs_sum[i] += from[6 * step];
  }

  // Whether the sums of feature i are not to be trusted: a value is not finite, the scale did not suit, or the shift lies so far
  // out that the moments about the mean would cancel.
  __device__ bool unsuited(int i, T inverse_n) const {
    const T low = extremes.low(i), high = extremes.high(i);
    const T top = fma(high, scale[i], offset[i]), bottom = -fma(low, scale[i], offset[i]), largest = larger(top, bottom);
    const T m = s1[i] * inverse_n, variance = s2[i] * inverse_n - m * m;
    const bool varies = low != high;
    return !is_finite(abs_sum[i]) || !(largest <= Limits<T>::high) || (varies && (largest < Limits<T>::low || m * m > 6 * variance));
  }
};

}  // namespace torchprobe::cuda
