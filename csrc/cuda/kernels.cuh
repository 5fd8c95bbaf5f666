// The kernels of one type, one for each layout and width of a pack.
#pragma once

#include "channels.cuh"
#include "merge.cuh"
#include "rows.cuh"

namespace torchprobe::cuda {

// Whether this call is to be read; the second launch is told.
__device__ inline bool call_counts(const Plan& plan) {
  const bool active = int64_t(plan.state[layout::CALLS]) % plan.call.every == 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *plan.active = active, *plan.arrived = 0;
  return active;
}

// The first launch.
template <class S, int N>
__global__ void __launch_bounds__(32 * warps_of(Layout::Rows), blocks_of(Layout::Rows, N)) read_rows(const __grid_constant__ Plan plan) {
  if (call_counts(plan)) Rows<S, N>(plan).run();
}
template <class S, int N>
__global__ void __launch_bounds__(32 * warps_of(Layout::Channels), blocks_of(Layout::Channels, N)) read_channels(const __grid_constant__ Plan plan) {
  if (call_counts(plan)) Channels<S, N>(plan).run();
}

template <class S>
Kernels kernels_of(const Plan& plan) {
  const bool rows = plan.layout == Layout::Rows;
  Kernel read = rows ? read_rows<S, 1> : read_channels<S, 1>;
  if constexpr (constexpr int WIDEST = 16 / sizeof(S); WIDEST > 2) {
    if (plan.pack == WIDEST) read = rows ? read_rows<S, WIDEST> : read_channels<S, WIDEST>;
    else if (plan.pack == 4) read = read_channels<S, 4>;
  }
  return {read, finish<S>, FINISH_SHARED};
}

}  // namespace torchprobe::cuda
