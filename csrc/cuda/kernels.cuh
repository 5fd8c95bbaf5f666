// The kernels, and how the host finds the one that a plan needs.
#pragma once

#include "tile.cuh"

namespace torchprobe::cuda {

// Whether this call is to be read; the second launch is told.
__device__ inline bool call_counts(const Plan& plan) {
  const bool active = int64_t(plan.state[layout::CALLS]) % plan.call.every == 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *plan.active = active;
  return active;
}

// The first launch: a tile a block.
template <class S, Access A>
__global__ void __launch_bounds__(SHAPE<S>.threads) observe_tiles(const __grid_constant__ Plan plan) {
  if (!call_counts(plan)) {
    if (plan.tiles == 1) {
      __syncthreads();
      if (threadIdx.x == 0) plan.state[layout::CALLS] += 1;
    }
    return;
  }
  uint32_t *outliers = shared<uint32_t>(plan.outlier_counts), *histogram = shared<uint32_t>(plan.histogram);
  Tally* found = shared<Tally>(plan.found);
  for (int j = threadIdx.x; j < int(plan.call.features); j += blockDim.x) outliers[j] = 0;
  for (int bin = threadIdx.x; bin < int(layout::BINS); bin += blockDim.x) histogram[bin] = 0;
  for (int v = threadIdx.x; v < plan.step_vectors; v += blockDim.x) found[v] = Tally{};
  const int64_t tile = blockIdx.x;

  Tile<S, A, false>(plan, tile, 0).walk(tile, 0);

  __syncthreads();
  Summary* all = shared<Summary>(plan.part);
  for (int v = threadIdx.x; v < plan.step_vectors; v += blockDim.x) all[v] = summed_up(found[v]);
  __syncthreads();
  for (int left = plan.step_vectors; left > 1; left = (left + 1) / 2) {
    const int half = (left + 1) / 2;
    for (int v = threadIdx.x; v + half < left; v += blockDim.x) all[v] = merged(all[v], all[v + half]);
    __syncthreads();
  }
  for (int j = threadIdx.x; j < int(plan.call.features); j += blockDim.x) plan.outliers[tile * plan.call.features + j] = outliers[j];
  for (int bin = threadIdx.x; bin < int(layout::BINS); bin += blockDim.x) plan.histograms[tile * layout::BINS + bin] = histogram[bin];
  if (threadIdx.x == 0) plan.summary[tile] = all[0];
  if (plan.tiles == 1) merge_only_tile<Compute<S>>(plan);
}

// The first launch when a vector does not fit into a block: some blocks take whole vectors, a warp each, the others slabs of features.
template <class S, Access A>
__global__ void __launch_bounds__(SHAPE<S>.threads) observe_wide(const __grid_constant__ Plan plan) {
  if (!call_counts(plan)) return;
  if (blockIdx.x >= plan.vector_blocks) {
    const int64_t block = blockIdx.x - plan.vector_blocks;
    const int64_t tile = block / plan.slabs, slab = block % plan.slabs;
    Tile<S, A, true>(plan, tile, slab).walk(tile, slab);
    return;
  }
  const Call& call = plan.call;
  const int64_t block = blockIdx.x, warps = blockDim.x / 32, warp = threadIdx.x / 32;
  uint32_t *outliers = plan.outliers + block * call.features, *histogram = plan.histograms + block * layout::BINS;
  for (int64_t j = threadIdx.x; j < call.features; j += blockDim.x) outliers[j] = 0;
  for (int64_t bin = threadIdx.x; bin < layout::BINS; bin += blockDim.x) histogram[bin] = 0;
  __syncthreads();
  Tally tally{};
  for (int64_t v = block * warps + warp; v < call.vectors; v += plan.vector_blocks * warps)
    if (!call.mask || call.mask[v])
      wide_vector<S, Tile<S, A, true>::N>(call, static_cast<const S*>(call.x) + offset_of(call, v), outliers, histogram, tally);
  Summary* area = shared<Summary>(0);
  Summary mine = summed_up(tally);
  if (threadIdx.x % 32 == 0) area[warp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int64_t w = 1; w < warps; ++w) mine = merged(mine, area[w]);
    plan.summary[block] = mine;
  }
}

// A kernel takes a Plan and nothing else.
using Kernel = void (*)(const Plan);

template <class S>
struct Kernels {
  static Kernel observe(const Plan& plan);  // one translation unit each: observe_<type>.cu
};

template <class S>
Kernel Kernels<S>::observe(const Plan& plan) {
  if constexpr (sizeof(S) < 8)
    if (plan.access == Access::Vector) return plan.wide ? observe_wide<S, Access::Vector> : observe_tiles<S, Access::Vector>;
  if (plan.wide) return observe_wide<S, Access::Scalar>;
  return plan.access == Access::Staged ? observe_tiles<S, Access::Staged> : observe_tiles<S, Access::Scalar>;
}

}  // namespace torchprobe::cuda
