// The kurtosis of whole vectors.
#pragma once

#include "values.cuh"

namespace torchprobe::cuda {

// Sums of the powers of (x − shift)·scale of one vector, about a shift close to its mean.
struct Powers {
  double s1, s2, s3, s4;
};

__device__ inline void add_vector(Tally& to, double kurtosis, uint32_t* histogram) {
  if (to.vectors == 0) to.pivot = kurtosis;
  const double delta = kurtosis - to.pivot;
  to.vectors += 1;
  to.sum += delta;
  to.squares += delta * delta;
  int bin = int(__double_as_longlong(kurtosis) >> 46) - (1023 << layout::BINS_PER_OCTAVE_LOG2);
  bin = bin < 0 ? 0 : bin >= int(layout::BINS) ? int(layout::BINS) - 1 : bin;
  atomicAdd(histogram + bin, 1u);
}

__device__ inline Summary summed_up(const Tally& t) {
  const double mean = t.vectors > 0 ? t.sum / t.vectors : 0;
  return {t.vectors, t.constant, t.invalid, t.pivot + mean, larger(t.squares - t.sum * mean, 0.0)};
}

__device__ inline Summary merged(const Summary& a, const Summary& b) {
  const double n = a.vectors + b.vectors, share = n > 0 ? b.vectors / n : 0, delta = b.mean - a.mean;
  return {n, a.constant + b.constant, a.invalid + b.invalid, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.vectors * share)};
}

// Whether one of n values can deviate by more than sigma standard deviations.
__device__ inline bool outliers_possible(const Call& call) {
  const double n = double(call.features);
  return (n - 1) / sqrt(n) > call.outlier_sigma;
}

// One vector by one warp, two passes in double: right for whatever values.
template <class S>
__device__ __noinline__ void exact_vector(const Call& call, const S* x, uint32_t* outliers, uint32_t* histogram, Tally& tally) {
  const int lane = threadIdx.x % 32;
  const int64_t n = call.features, stride = call.feature_stride;
  const double first = double(widen(x[0])) / 2;
  double largest = 0;
  bool finite = true;
  auto half = [&](int64_t j) { return double(widen(x[j * stride])) / 2 - first; };  // no difference of halves overflows
  for (int64_t j = lane; j < n; j += 32) {
    const double h = half(j);
    finite &= is_finite(h);
    largest = larger(largest, fabs(h));
  }
  finite = __all_sync(ALL_LANES, finite);
  largest = warp_max(largest);
  if (!finite || largest == 0) {
    if (lane == 0) (finite ? tally.constant : tally.invalid) += 1;
    return;
  }
  const double scale = inverse_power(largest);
  double sum = 0, s2 = 0, s4 = 0;
  for (int64_t j = lane; j < n; j += 32) sum += half(j) * scale;
  const double mean = warp_sum(sum) / double(n);
  for (int64_t j = lane; j < n; j += 32) {
    const double d = half(j) * scale - mean, q = d * d;
    s2 += q, s4 += q * q;
  }
  s2 = warp_sum(s2), s4 = warp_sum(s4);
  if (lane == 0) add_vector(tally, double(n) * (s4 / s2) / s2, histogram);
  if (!outliers_possible(call)) return;
  const double limit = call.outlier_sigma * sqrt(s2 / double(n));
  for (int64_t j = lane; j < n; j += 32)
    if (fabs(half(j) * scale - mean) > limit) atomicAdd(outliers + j, 1u);
}

// One vector by one warp, for activations so wide that a block cannot hold them: one read, about the mean of the first elements. N neighbours
// in memory come at a time; more than one only where in_vectors (plan.cpp) allows it.
template <class S, int N>
__device__ __noinline__ void wide_vector(const Call& call, const S* x, uint32_t* outliers, uint32_t* histogram, Tally& tally) {
  using T = Compute<S>;
  constexpr int FIRST = 1024, LINE = 2048 * 32;  // elements that the shift is the mean of; that are summed up in T
  const int lane = threadIdx.x % 32;
  const int64_t n = call.features, stride = call.feature_stride, first = n < FIRST ? n : FIRST;
  T sum = 0, largest = 0;
  for (int64_t j = lane; j < first; j += 32) {
    sum += widen(x[j * stride]);
    largest = larger(largest, T(fabs(widen(x[j * stride]) - widen(x[0]))));
  }
  const T shift = warp_sum(sum) / T(first);
  largest = warp_max(largest);
  const T scale = largest > 0 && is_finite(largest) ? inverse_power(largest) : T(1), offset = -(shift * scale);
  Powers mine{};
  for (int64_t begin = 0; begin < n; begin += LINE) {
    const int64_t end = n < begin + LINE ? n : begin + LINE;
    T s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma unroll 8
    for (int64_t j = begin + lane * N; j < end; j += 32 * N) {
      const Pack<S, N> pack = *reinterpret_cast<const Pack<S, N>*>(x + j * stride);
      T values[N];
      if constexpr (N == 1)
        values[0] = widen(pack.value[0]);
      else
#pragma unroll
        for (int k = 0; k < N; k += 2) widen(Pair<S>::at(pack.value + k), values[k], values[k + 1]);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const T d = fma(values[k], scale, offset), q = d * d;
        s1 += d, s2 += q, s3 = fma(q, d, s3), s4 = fma(q, q, s4);
      }
    }
    mine.s1 += s1, mine.s2 += s2, mine.s3 += s3, mine.s4 += s4;
  }
  const Powers all{warp_sum(mine.s1), warp_sum(mine.s2), warp_sum(mine.s3), warp_sum(mine.s4)};
  const double inverse_n = 1 / double(n), m = all.s1 * inverse_n, mm = m * m, m2 = all.s2 - all.s1 * m, variance = m2 * inverse_n;
  const double raw = all.s2 * inverse_n, mean = double(shift) + m / double(scale), std = sqrt(variance) / double(scale);
  const bool regular = raw >= double(Limits<T>::low) * double(Limits<T>::low) && raw <= double(Limits<T>::high) * double(Limits<T>::high) &&
                       mm * 16 <= variance && is_finite(all.s4) && fabs(mean) <= farthest_mean<S> * std;
  if (!regular) {
    exact_vector(call, x, outliers, histogram, tally);
    return;
  }
  if (lane == 0)
    add_vector(tally, double(n) * (all.s4 - 4 * m * all.s3 + 6 * mm * all.s2 - 3 * double(n) * mm * mm) / (m2 * m2), histogram);
  // About the shift, an outlier deviates by a quarter of a standard deviation less than about the mean.
  const double reach = call.outlier_sigma > 0.25 ? call.outlier_sigma - 0.25 : 0, fourth = reach * reach * variance * reach * reach * variance;
  if (!outliers_possible(call) || (reach > 0 && mine.s4 < 0.999 * fourth)) return;
  for (int64_t first_of_pack = lane * N; first_of_pack < n; first_of_pack += 32 * N)
    for (int64_t j = first_of_pack; j < first_of_pack + N; ++j)
      if (fabs(double(widen(x[j * stride])) - mean) > call.outlier_sigma * std) atomicAdd(outliers + j, 1u);
}

}  // namespace torchprobe::cuda
