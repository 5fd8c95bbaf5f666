// The second launch, about vectors: what the sums of each tell, a lane each. What is not to be trusted is computed again.
#pragma once

#include "values.cuh"

namespace torchprobe::cuda {

// A Summary while it is being counted: sums of the kurtosis minus the first one.
struct Tally {
  double vectors, constant, invalid, pivot, sum, squares;
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

// Counts an outlier of each lane that has one. Lanes with the same feature are added up first: a strong feature is an outlier of every vector.
__device__ inline void count_outliers(const Plan& plan, int64_t feature, bool found) {
  if (!__any_sync(ALL_LANES, found)) return;
  const unsigned same = __match_any_sync(ALL_LANES, static_cast<unsigned long long>(found ? feature : -1));
  if (found && int(threadIdx.x % 32) == __ffs(same) - 1)
    atomicAdd(plan.state + layout::HEADER + layout::OUTLIERS * plan.call.features + feature, double(__popc(same)));
}

template <class S>
__device__ inline void exact_vector(const Plan& plan, const S* x, uint32_t* histogram, Tally& tally) {
  const int lane = threadIdx.x % 32;
  const int64_t n = plan.call.features, stride = plan.call.feature_stride;
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
  if (!plan.outliers_possible) return;
  const double limit = plan.call.outlier_sigma * sqrt(s2 / double(n));
  for (int64_t begin = 0; begin < n; begin += 32) {
    const int64_t j = begin + lane;
    count_outliers(plan, j, j < n && fabs(half(j < n ? j : 0) * scale - mean) > limit);
  }
}

__device__ inline Summary summed_up(const Tally& t) {
  const double mean = t.vectors > 0 ? t.sum / t.vectors : 0;
  return {t.vectors, t.constant, t.invalid, t.pivot + mean, larger(t.squares - t.sum * mean, 0.0)};
}

__device__ inline Summary merged(const Summary& a, const Summary& b) {
  const double n = a.vectors + b.vectors, share = n > 0 ? b.vectors / n : 0, delta = b.mean - a.mean;
  return {n, a.constant + b.constant, a.invalid + b.invalid, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.vectors * share)};
}

// 32 vectors, of a warp.
template <class S>
struct Judge {
  static constexpr int C = columns_of(sizeof(S));
  using T = Compute<S>;
  const Plan& plan;
  const Call& call;
  const int lane;
  const int64_t vector;
  const S* x = nullptr;  // its first element
  double mean = 0, limit = INFINITY;
  bool irregular = false, search = false;  // all is to be computed again; all is to be looked at for outliers

  __device__ Judge(const Plan& plan, int64_t first) : plan(plan), call(plan.call), lane(threadIdx.x % 32), vector(first + lane) {}

  __device__ void judge(uint32_t* histogram, Tally& tally) {
    if (vector >= call.vectors || (call.mask && !call.mask[vector])) return;
    x = static_cast<const S*>(call.x) + offset_of(call, vector);
    Powers<double> all{};
    double bound = 0;
    for (int64_t slab = 0; slab < plan.slabs; ++slab) {
      const Powers<T> part = static_cast<const Powers<T>*>(plan.sums)[slab * call.vectors + vector];
      all.s1 += part.s1, all.s2 += part.s2, all.s3 += part.s3, all.s4 += part.s4;
      bound = larger(bound, double(static_cast<const Note<T>*>(plan.notes)[slab * call.vectors + vector].bound));
    }
    const Unit<T> unit = static_cast<const Unit<T>*>(plan.units)[vector / plan.tile_vectors];
    const double n = double(call.features), m = all.s1 / n, mm = m * m, m2 = all.s2 - all.s1 * m, variance = m2 / n;
    constexpr double lowest = LOWEST<T>, highest = HIGHEST<T>;
    irregular = !(variance >= lowest * lowest && all.s2 / n <= highest * highest && mm <= FARTHEST * variance && is_finite(all.s4));
    if (irregular) return;
    add_vector(tally, n * (all.s4 - 4 * m * all.s3 + 6 * mm * all.s2 - 3 * n * mm * mm) / (m2 * m2), histogram);
    const double sigma = call.outlier_sigma, reach = sigma * sqrt(variance) - fabs(m);
    mean = double(unit.shift) + m / double(unit.scale), limit = sigma * sqrt(variance) / double(unit.scale);
    search = plan.outliers_possible && !(reach > 0 && bound < 0.999 * reach * reach * reach * reach);
  }

  __device__ bool outlier(int64_t feature) const { return fabs(double(widen(x[feature * call.feature_stride])) - mean) > limit; }

  // The elements that are marked, of vectors whose other elements are known to be none.
  __device__ void check_marks() const {
    const bool mine = x && !irregular && !search;
    if (plan.layout == Layout::Rows) {
      for (int64_t slab = 0; slab < plan.slabs; ++slab) {
        unsigned marks = mine ? static_cast<const Note<T>*>(plan.notes)[slab * call.vectors + vector].marks : 0;
        for (; __any_sync(ALL_LANES, marks != 0); marks &= marks - 1)
#pragma unroll 1
          for (int i = 0; i < C; ++i) {
            const int64_t j = slab * plan.slab_features + (i / plan.pack * plan.across + __ffs(marks) - 1) * plan.pack + i % plan.pack;
            count_outliers(plan, j, marks && j < call.features && outlier(j));
          }
      }
      return;
    }
    // A lane of the first launch had packs of neighbors; 32 vectors are always of one of its warps.
    const int of_lane = int(vector % plan.warp_vectors / plan.pack % 32);
    const uint32_t* const all = plan.marks + vector / plan.warp_vectors * call.features;
    for (int64_t begin = 0; begin < call.features; begin += 32) {
      const uint32_t word = begin + lane < call.features ? all[begin + lane] : 0;
      for (unsigned rest = __ballot_sync(ALL_LANES, word != 0); rest; rest &= rest - 1) {
        const int c = __ffs(rest) - 1;
        const unsigned marks = __shfl_sync(ALL_LANES, word, c);
        count_outliers(plan, begin + c, mine && (marks >> of_lane & 1) && outlier(begin + c));
      }
    }
  }

  // Every element of some vectors. A warp reads what lies side by side.
  __device__ void look_at_all() {
    if (plan.layout == Layout::Channels) {
      if (__any_sync(ALL_LANES, search))
        for (int64_t j = 0; j < call.features; ++j) count_outliers(plan, j, search && outlier(j));
      return;
    }
    for (unsigned rest = __ballot_sync(ALL_LANES, search); rest; rest &= rest - 1) {
      Judge other = *this;
      const int from = __ffs(rest) - 1;
      other.x = static_cast<const S*>(call.x) + offset_of(call, vector - lane + from);
      other.mean = __shfl_sync(ALL_LANES, mean, from), other.limit = __shfl_sync(ALL_LANES, limit, from);
      for (int64_t begin = 0; begin < call.features; begin += 32) {
        const int64_t j = begin + lane;
        count_outliers(plan, j, j < call.features && other.outlier(j));
      }
    }
  }

  __device__ void run(uint32_t* histogram, Tally& tally) {
    judge(histogram, tally);
    if (plan.outliers_possible) check_marks(), look_at_all();
    for (unsigned rest = __ballot_sync(ALL_LANES, irregular); rest; rest &= rest - 1)
      exact_vector<S>(plan, static_cast<const S*>(call.x) + offset_of(call, vector - lane + __ffs(rest) - 1), histogram, tally);
  }
};

}  // namespace torchprobe::cuda
