// What is summed up of a feature: over lanes, over the warps of a block, and as the record of the tile. What cannot be trusted is computed again.
#pragma once

#include "walk.cuh"

namespace torchprobe::cuda {

// The first of several terms, and the others.
template <class T>
__device__ inline void begin(Powers<T>& sums, T d) {
  const T q = d * d;
  sums = {d, q, q * d, q * q};
}
template <class T>
__device__ inline void add(Powers<T>& sums, T d) {
  const T q = d * d;
  sums.s1 += d, sums.s2 += q, sums.s3 = fma(q, d, sums.s3), sums.s4 = fma(q, q, sums.s4);
}
template <class T>
__device__ inline void add(Powers<T>& to, const Powers<T>& from) {
  to.s1 += from.s1, to.s2 += from.s2, to.s3 += from.s3, to.s4 += from.s4;
}
template <class T>
__device__ inline void add_lane(Powers<T>& x, int bits) {
  add(x, Powers<T>{other_lane(x.s1, bits), other_lane(x.s2, bits), other_lane(x.s3, bits), other_lane(x.s4, bits)});
}

template <class T>
struct Totals {
  Powers<T> sums;
  T abs_sum, low, high, shift;

  __device__ void add(const Totals& from) {
    cuda::add(sums, from.sums);
    abs_sum += from.abs_sum, low = smaller(low, from.low), high = larger(high, from.high);
  }
  __device__ void add_lane(int bits) {
    cuda::add_lane(sums, bits);
    abs_sum += other_lane(abs_sum, bits), low = smaller(low, other_lane(low, bits)), high = larger(high, other_lane(high, bits));
  }
  // Whether the sums are not to be trusted: a value is not finite, the scale does not suit, or the shift lies so far out that the moments
  // about the mean would cancel.
  __device__ bool unsuited(T count, T scale) const {
    const T largest = larger(high - shift, shift - low) * scale, m = sums.s1 / count, variance = sums.s2 / count - m * m;
    return count > 0 &&
           (!is_finite(abs_sum) || !(largest <= HIGHEST<T>) || (low != high && (largest < LOWEST<T> || m * m > T(FARTHEST) * variance)));
  }
};

template <class T>
__device__ inline void record(const Plan& plan, int64_t tile, int64_t feature, const T (&fields)[RECORD]) {
  T* const to = static_cast<T*>(plan.records) + tile * RECORD * plan.call.features + feature;
  each<RECORD>([&](int k) { to[k * plan.call.features] = fields[k]; });
}

// The finite values of a feature in a tile, about their mean, in double: right for whatever values. Three passes: extremes, mean, powers.
template <class S>
__device__ __noinline__ void exact_feature(const Plan& plan, int64_t tile, int64_t feature) {
  using T = Compute<S>;
  const Call& call = plan.call;
  const int64_t first = tile * plan.tile_vectors, last = smaller(first + plan.tile_vectors, call.vectors);
  const S* const x = static_cast<const S*>(call.x) + feature * call.feature_stride;
  double low = INFINITY, high = -INFINITY, count = 0, kept = 0;
  auto each_finite = [&](auto f) {
#pragma unroll 1
    for (int64_t v = first + threadIdx.x % 32; v < last; v += 32) {
      if (call.mask && !call.mask[v]) continue;
      const double value = double(widen(x[offset_of(call, v)]));
      kept += 1;
      if (is_finite(value)) f(value);
    }
  };
  each_finite([&](double value) { count += 1, low = smaller(low, value), high = larger(high, value); });
  count = warp_sum(count), low = -warp_max(-low), high = warp_max(high);
  const T nonfinite = T(warp_sum(kept) - count);
  if (count == 0) low = high = 0;
  const T unit = inverse_power(T(larger(fabs(low), fabs(high))));
  double sum = 0, abs_sum = 0;
  each_finite([&](double value) { sum += value * double(unit); });
  const T mean = T(count > 0 ? warp_sum(sum) / count / double(unit) : 0.0);
  const double half = larger(high / 2 - double(mean) / 2, double(mean) / 2 - low / 2);  // no difference of halves overflows
  const T scale = half > 0 ? inverse_power(T(half)) / 2 : unit;
  Powers<double> sums{};
  each_finite([&](double value) { add(sums, (value - double(mean)) * double(scale)), abs_sum += fabs(value) * double(scale); });
  for (int m = 16; m; m /= 2) add_lane(sums, m);
  abs_sum = warp_sum(abs_sum);
  if (threadIdx.x % 32 == 0)
    record<T>(plan, tile, feature,
              {T(count), nonfinite, mean, scale, T(sums.s1), T(sums.s2), T(sums.s3), T(sums.s4), T(low), T(high), T(abs_sum)});
}

// Adds up what the warps know of some features, at most 32, one for each lane, and records it. `totals` are those of the first feature and
// warp; the next warp's are `pitch` further on.
template <class S, class T = Compute<S>>
__device__ inline void record_features(const Share& share, int64_t first, int n, const Totals<T>* totals, int pitch, T scale) {
  bool again = false;
  if (share.lane < n) {
    Totals<T> all = totals[share.lane];
    T count = T(share.counts()[0]);
    for (int w = 1; w < share.plan.warps; ++w) all.add(totals[w * pitch + share.lane]), count += T(share.counts()[w]);
    again = all.unsuited(count, scale);
    const T low = count > 0 ? all.low : T(0), high = count > 0 ? all.high : T(0);
    record<T>(share.plan, share.tile, first + share.lane,
              {count, 0, all.shift, scale, all.sums.s1, all.sums.s2, all.sums.s3, all.sums.s4, low, high, all.abs_sum});
  }
  __syncwarp();
  for (unsigned rest = __ballot_sync(ALL_LANES, again); rest; rest &= rest - 1)
    exact_feature<S>(share.plan, share.tile, first + __ffs(rest) - 1);
}

}  // namespace torchprobe::cuda
