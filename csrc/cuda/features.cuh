// The moments of single features, as one thread sums them up.
#pragma once

#include "values.cuh"

namespace torchprobe::cuda {

// N features: the sums of the powers of (x − shift)·scale, the extremes of x, and Σ|x|·scale.
template <class T, int N>
struct Features {
  T scale[N], offset[N];  // offset = −shift·scale, which is exact: scale is a power of two
  T s1[N], s2[N], s3[N], s4[N], low[N], high[N], abs_sum[N];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      s1[i] = s2[i] = s3[i] = s4[i] = abs_sum[i] = 0;
      low[i] = T(INFINITY), high[i] = -T(INFINITY);
    }
  }

  __device__ void set_shift(int i, T shift, T scale_) { scale[i] = scale_, offset[i] = -(shift * scale_); }
  __device__ T shift(int i) const { return -offset[i] * inverse_power(scale[i]); }

  __device__ void add(int i, T x) {
    const T d = fma(x, scale[i], offset[i]), q = d * d;
    low[i] = smaller(low[i], x);
    high[i] = larger(high[i], x);
    abs_sum[i] = fma(T(fabs(x)), scale[i], abs_sum[i]);
    s1[i] += d;
    s2[i] += q;
    s3[i] = fma(q, d, s3[i]);
    s4[i] = fma(q, q, s4[i]);
  }

  // Hands the seven numbers of a feature to another thread, `step` apart, and takes in those of another.
  static constexpr int NUMBERS = 7;
  __device__ void hand_on(T* to, int step, int i) const {
    const T all[NUMBERS] = {s1[i], s2[i], s3[i], s4[i], low[i], high[i], abs_sum[i]};
#pragma unroll
    for (int k = 0; k < NUMBERS; ++k) to[k * step] = all[k];
  }
  __device__ void take_in(const T* from, int step, int i) {
    s1[i] += from[0];
    s2[i] += from[step];
    s3[i] += from[2 * step];
    s4[i] += from[3 * step];
    low[i] = smaller(low[i], from[4 * step]);
    high[i] = larger(high[i], from[5 * step]);
    abs_sum[i] += from[6 * step];
  }

  // Whether the sums of feature i are not to be trusted: a value is not finite, the scale did not suit, or the shift lies so far
  // out that the moments about the mean would cancel.
  __device__ bool unsuited(int i, T inverse_n) const {
    const T top = fma(high[i], scale[i], offset[i]), bottom = -fma(low[i], scale[i], offset[i]), largest = larger(top, bottom);
    const T m = s1[i] * inverse_n, variance = s2[i] * inverse_n - m * m;
    const bool varies = low[i] != high[i];
    return !is_finite(abs_sum[i]) || !(largest <= Limits<T>::high) || (varies && (largest < Limits<T>::low || m * m > 6 * variance));
  }
};

}  // namespace torchprobe::cuda
