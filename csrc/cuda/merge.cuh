// What the blocks found out, merged into the state. Every merge has its place in a fixed order, so the result is the same each time.
#pragma once

#include "vectors.cuh"

namespace torchprobe::cuda {

// One feature: moments about the mean, and what is simply added up.
struct Feature {
  double count, mean, m2, m3, m4, low, high, nonfinite, abs_sum, outliers;
};

// Chan et al. (1982) and Pébay (SAND2008-6212).
static __device__ __noinline__ Feature merged(const Feature& a, const Feature& b) {
  const double n = a.count + b.count, wa = n > 0 ? a.count / n : 0, wb = n > 0 ? b.count / n : 0;
  const double delta = b.mean - a.mean, delta2 = delta * delta, k2 = a.count * wb;
  return {n,
          a.count > 0 ? a.mean + delta * wb : b.mean,
          a.m2 + b.m2 + delta2 * k2,
          a.m3 + b.m3 + delta * (delta2 * k2 * (wa - wb) + 3 * (wa * b.m2 - wb * a.m2)),
          a.m4 + b.m4 + delta2 * (delta2 * k2 * (wa * wa - wa * wb + wb * wb) + 6 * (wa * wa * b.m2 + wb * wb * a.m2)) +
              4 * delta * (wa * b.m3 - wb * a.m3),
          a.count == 0 || (b.count > 0 && b.low < a.low) ? b.low : a.low,
          a.count == 0 || (b.count > 0 && b.high > a.high) ? b.high : a.high,
          a.nonfinite + b.nonfinite,
          a.abs_sum + b.abs_sum,
          a.outliers + b.outliers};
}

// What tiles recorded of feature j. Their powers are first turned into powers about one pivot, which takes no division: for hundreds of tiles
// the pivot, the shift of the first, is close enough to the mean, as a tile far from it would itself make for a large variance.
template <class T>
__device__ __noinline__ Feature recorded(const Plan& plan, int64_t first, int64_t last, int64_t j) {
  const int64_t features = plan.call.features;
  Feature f{};
  f.low = INFINITY, f.high = -INFINITY;
  double pivot = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
#pragma unroll 1
  for (int64_t tile = first; tile < last; ++tile) {
    const T* from = static_cast<const T*>(plan.records) + tile * RECORD * features + j;
    auto field = [&](int k) { return double(from[k * features]); };
    const double n = field(COUNT), low = field(LOW), high = field(HIGH), u = 1 / field(SCALE), u2 = u * u;
    const bool varies = low != high;  // if not, nothing that was rounded is to make it so
    const double a1 = varies ? field(S1) * u : 0, a2 = varies ? field(S2) * u2 : 0, a3 = varies ? field(S3) * (u2 * u) : 0,
                 a4 = varies ? field(S4) * (u2 * u2) : 0, shift = varies ? field(SHIFT) : low;
    if (f.count == 0) pivot = shift;
    const double d = n > 0 ? shift - pivot : 0, nd = n * d;
    s1 += a1 + nd;
    s2 += a2 + d * (2 * a1 + nd);
    s3 += a3 + d * (3 * a2 + d * (3 * a1 + nd));
    s4 += a4 + d * (4 * a3 + d * (6 * a2 + d * (4 * a1 + nd)));
    f.count += n, f.nonfinite += field(NONFINITE), f.abs_sum += field(ABS_SUM) * u;
    f.low = n > 0 ? smaller(f.low, low) : f.low, f.high = n > 0 ? larger(f.high, high) : f.high;
  }
  if (f.count == 0) {
    f.low = f.high = 0;
    return f;
  }
  const double n = f.count, m = s1 / n, mm = m * m;
  f.mean = pivot + m;
  f.m2 = larger(s2 - n * mm, 0.0);
  f.m3 = s3 - 3 * m * s2 + 2 * n * m * mm;
  f.m4 = larger(s4 - 4 * m * s3 + 6 * mm * s2 - 3 * n * mm * mm, 0.0);
  return f;
}

__device__ inline void add_to_state(const Plan& plan, int64_t j, const Feature& f) {
  double* at = plan.state + layout::HEADER + j;
  const int64_t n = plan.call.features;
  const Feature all = merged({at[layout::COUNT * n], at[layout::MEAN * n], at[layout::M2 * n], at[layout::M3 * n], at[layout::M4 * n],
                              at[layout::MIN * n], at[layout::MAX * n], at[layout::NONFINITE * n], at[layout::ABS_SUM * n], at[layout::OUTLIERS * n]},
                             f);
  at[layout::COUNT * n] = all.count, at[layout::MEAN * n] = all.mean;
  at[layout::M2 * n] = all.m2, at[layout::M3 * n] = all.m3, at[layout::M4 * n] = all.m4;
  at[layout::MIN * n] = all.low, at[layout::MAX * n] = all.high;
  at[layout::NONFINITE * n] = all.nonfinite, at[layout::ABS_SUM * n] = all.abs_sum, at[layout::OUTLIERS * n] = all.outliers;
}

__device__ inline void add_to_state(const Plan& plan, const Summary& s) {
  double* at = plan.state;
  const Summary all = merged({at[layout::VECTORS], at[layout::CONSTANT], at[layout::INVALID], at[layout::KURTOSIS_MEAN], at[layout::KURTOSIS_M2]}, s);
  at[layout::VECTORS] = all.vectors, at[layout::CONSTANT] = all.constant, at[layout::INVALID] = all.invalid;
  at[layout::KURTOSIS_MEAN] = all.mean, at[layout::KURTOSIS_M2] = all.m2;
}

// A call of one tile is merged by the block that read it.
template <class T>
__device__ __noinline__ void merge_only_tile(const Plan& plan) {
  __syncthreads();
  for (int64_t j = threadIdx.x; j < plan.call.features; j += blockDim.x) {
    Feature f = recorded<T>(plan, 0, 1, j);
    f.outliers = plan.outliers[j];
    add_to_state(plan, j, f);
  }
  for (int64_t bin = threadIdx.x; bin < layout::BINS; bin += blockDim.x) plan.state[layout::HISTOGRAM + bin] += plan.histograms[bin];
  if (threadIdx.x == 0) {
    add_to_state(plan, *plan.summary);
    plan.state[layout::CALLS] += 1;
  }
}

// The second launch. Blocks of 32 features (or bins) × MERGE_PARTS threads that share the tiles between them; the last block has the summaries.
template <class T>
__global__ void __launch_bounds__(32 * MERGE_PARTS) merge_tiles(const __grid_constant__ Plan plan) {
  const bool active = plan.tiles > 0 && *plan.active;
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int64_t feature_blocks = (plan.call.features + 31) / 32, block = blockIdx.x;

  if (block < feature_blocks) {
    if (!active) return;
    Feature* area = shared<Feature>(0);
    const int64_t j = block * 32 + lane;
    Feature f{};
    if (j < plan.call.features) {
      f = recorded<T>(plan, part * plan.tiles / MERGE_PARTS, (part + 1) * plan.tiles / MERGE_PARTS, j);
      for (int64_t s = part; s < plan.summaries; s += MERGE_PARTS) f.outliers += plan.outliers[s * plan.call.features + j];
    }
    area[threadIdx.x] = f;
    for (int half = MERGE_PARTS / 2; half; half /= 2) {
      __syncthreads();
      if (part < half) area[threadIdx.x] = merged(area[threadIdx.x], area[threadIdx.x + half * 32]);
    }
    if (part == 0 && j < plan.call.features) add_to_state(plan, j, area[lane]);
  } else if (block < feature_blocks + HISTOGRAM_BLOCKS) {
    if (!active) return;
    double* area = shared<double>(0);
    const int64_t bin = (block - feature_blocks) * 32 + lane;
    double count = 0;
    if (bin < layout::BINS)
      for (int64_t s = part; s < plan.summaries; s += MERGE_PARTS) count += plan.histograms[s * layout::BINS + bin];
    area[threadIdx.x] = count;
    __syncthreads();
    if (part == 0 && bin < layout::BINS) {
      for (int p = 1; p < MERGE_PARTS; ++p) count += area[p * 32 + lane];
      plan.state[layout::HISTOGRAM + bin] += count;
    }
  } else {
    Summary* area = shared<Summary>(0);
    Summary all{};
    if (active)
      for (int64_t s = threadIdx.x; s < plan.summaries; s += blockDim.x) all = merged(all, plan.summary[s]);
    area[threadIdx.x] = all;
    for (int half = 16 * MERGE_PARTS; half; half /= 2) {
      __syncthreads();
      if (int(threadIdx.x) < half) area[threadIdx.x] = merged(area[threadIdx.x], area[threadIdx.x + half]);
    }
    if (threadIdx.x == 0) {
      if (active) add_to_state(plan, area[0]);
      plan.state[layout::CALLS] += 1;
    }
  }
}

}  // namespace torchprobe::cuda
