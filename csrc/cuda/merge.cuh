// What the blocks found out, merged into the state. Every merge has its place in a fixed order, so the result is the same each time.
#pragma once

#include "judge.cuh"

namespace torchprobe::cuda {

// One feature: moments about the mean, and what is simply added up.
struct Feature {
  double count, mean, m2, m3, m4, low, high, nonfinite, abs_sum;
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
          a.abs_sum + b.abs_sum};
}

// What tiles recorded of feature j. Their powers are first turned into powers about one pivot, which takes no division: for hundreds of tiles
// the pivot, the shift of the first, is close enough to the mean, as a tile far from it would itself make for a large variance.
template <class T>
__device__ inline Feature recorded(const Plan& plan, int64_t first, int64_t last, int64_t j) {
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
                              at[layout::MIN * n], at[layout::MAX * n], at[layout::NONFINITE * n], at[layout::ABS_SUM * n]},
                             f);
  at[layout::COUNT * n] = all.count, at[layout::MEAN * n] = all.mean;
  at[layout::M2 * n] = all.m2, at[layout::M3 * n] = all.m3, at[layout::M4 * n] = all.m4;
  at[layout::MIN * n] = all.low, at[layout::MAX * n] = all.high;
  at[layout::NONFINITE * n] = all.nonfinite, at[layout::ABS_SUM * n] = all.abs_sum;
}

// Merges what threads have whose numbers differ by a multiple of `step`, in the order of these numbers.
template <class Value>
__device__ inline const Value& merge_threads(const Value& mine, int step) {
  Value* const area = reinterpret_cast<Value*>(shared_memory);
  area[threadIdx.x] = mine;
  for (int half = MERGE_THREADS / 2; half >= step; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) area[threadIdx.x] = merged(area[threadIdx.x], area[threadIdx.x + half]);
  }
  __syncthreads();
  return area[threadIdx.x % step];
}

// 32 features, whose tiles are shared out among the warps of the block.
template <class T>
__device__ void merge_features(const Plan& plan, int64_t first) {
  constexpr int PARTS = MERGE_THREADS / 32;
  const int part = threadIdx.x / 32;
  const int64_t j = first + threadIdx.x % 32;
  const bool here = j < plan.call.features;
  const Feature mine = here ? recorded<T>(plan, part * plan.tiles / PARTS, (part + 1) * plan.tiles / PARTS, j) : Feature{};
  const Feature& all = merge_threads(mine, 32);
  if (part == 0 && here) add_to_state(plan, j, all);
}

// Vectors, 32 a warp at a time. The block that ends last adds the summaries of all blocks to the state.
template <class S>
__device__ void judge_vectors(const Plan& plan, bool active) {
  uint32_t* histogram = reinterpret_cast<uint32_t*>(shared_memory + MERGE_THREADS * sizeof(Summary));
  uint32_t* last = histogram + layout::BINS;
  for (int bin = threadIdx.x; bin < layout::BINS; bin += MERGE_THREADS) histogram[bin] = 0;
  __syncthreads();
  Tally tally{};
  if (active)
    for (int64_t v = int64_t(blockIdx.x) * MERGE_THREADS + threadIdx.x / 32 * 32; v < plan.call.vectors; v += int64_t(plan.judges) * MERGE_THREADS)
      Judge<S>(plan, v).run(histogram, tally);
  const Summary mine = merge_threads(summed_up(tally), 1);
  for (int bin = threadIdx.x; bin < layout::BINS; bin += MERGE_THREADS)
    if (histogram[bin]) atomicAdd(plan.state + layout::HISTOGRAM + bin, double(histogram[bin]));
  if (threadIdx.x == 0) {
    plan.summaries[blockIdx.x] = mine;
    __threadfence();
    *last = !plan.tiles || atomicAdd(plan.arrived, 1u) + 1 == uint32_t(plan.judges);
    __threadfence();
  }
  __syncthreads();
  if (!*last) return;
  Summary all{};
  for (int b = threadIdx.x; b < plan.judges; b += MERGE_THREADS) all = merged(all, plan.summaries[b]);
  all = merge_threads(all, 1);
  if (threadIdx.x == 0) {
    static_assert(layout::KURTOSIS_M2 == layout::VECTORS + 4, "a Summary lies in the state as it is");
    Summary& of_state = *reinterpret_cast<Summary*>(plan.state + layout::VECTORS);
    of_state = merged(of_state, all);
    plan.state[layout::CALLS] += 1;
  }
}

// The second launch: first the blocks that judge vectors, then those that merge features.
template <class S>
__global__ void __launch_bounds__(MERGE_THREADS) finish(const __grid_constant__ Plan plan) {
  const bool active = plan.tiles > 0 && *plan.active;
  if (int64_t(blockIdx.x) < plan.judges)
    judge_vectors<S>(plan, active);
  else if (active)
    merge_features<Compute<S>>(plan, (int64_t(blockIdx.x) - plan.judges) * 32);
}
constexpr size_t FINISH_SHARED = MERGE_THREADS * (sizeof(Feature) > sizeof(Summary) ? sizeof(Feature) : sizeof(Summary)) + (layout::BINS + 1) * 4;

}  // namespace torchprobe::cuda
