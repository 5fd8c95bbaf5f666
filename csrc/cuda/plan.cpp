#include "plan.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <type_traits>
#include <utility>

namespace torchprobe::cuda {
namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

constexpr int SHARED_RESERVED = 1 << 10;  // that the system takes of the shared memory for each block
constexpr int SHORTEST_SLAB = 32;         // channels

int compute_size(Dtype dtype) { return dtype == Dtype::Float64 ? 8 : 4; }

// Neighboring vectors are contiguous, features are not.
bool side_by_side(const Call& call) {
  return call.dims && call.stride[call.dims - 1] == 1 && call.feature_stride != 1 && call.features > 1 && call.vectors > 1;
}

// Whether packs of so many neighbors, all of them there, start where a copy of their size may.
bool in_packs(const Call& call, bool rows, int pack) {
  auto fits = [&](int64_t stride) { return stride % pack == 0; };
  if (reinterpret_cast<uintptr_t>(call.x) % size_t(pack * element_size(call.dtype))) return false;
  if (rows && ((call.feature_stride != 1 && call.features != 1) || call.features % pack)) return false;
  if (!rows && (!fits(call.feature_stride) || !fits(call.size[call.dims - 1]))) return false;
  return std::all_of(call.stride, call.stride + call.dims - !rows, fits);
}

// Of 16 bytes; in channels of 16 bits also of 8.
int widest_pack(const Call& call, bool rows) {
  const int widest = int(16 / element_size(call.dtype));
  if (widest < 4) return 1;
  if (in_packs(call, rows, widest)) return widest;
  return !rows && in_packs(call, rows, 4) ? 4 : 1;
}

// Lanes side by side in a row: as many as possible, as long as few of them have nothing to do.
int lanes_across(int64_t needed) {
  int best = 32;
  for (int across : {16, 8})
    if (10 * round_up(needed, across) < 9 * round_up(needed, best)) best = across;
  return best;
}

Kernels kernels_for(const Plan& plan) {
  switch (plan.call.dtype) {
    case Dtype::Float64: return kernels_of<double>(plan);
    case Dtype::Float32: return kernels_of<float>(plan);
    case Dtype::BFloat16: return kernels_of<BFloat16>(plan);
    default: return kernels_of<Float16>(plan);
  }
}

// Devices and kernels for which more than 48 KB of shared memory was asked for: once is enough.
auto& asked = *new std::set<std::pair<int, const void*>>;

cudaError_t launch(Kernel kernel, int64_t blocks, int threads, size_t shared_bytes, const Device& device, const Plan& plan, cudaStream_t stream) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 << 10 && !asked.count({device.index, function})) {
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
    if (error != cudaSuccess) return error;
    asked.emplace(device.index, function);
  }
  void* arguments[] = {const_cast<Plan*>(&plan)};
  return cudaLaunchKernel(function, dim3(unsigned(blocks)), dim3(unsigned(threads)), arguments, shared_bytes, stream);
}

}  // namespace

Plan make_plan(const Call& call, const Device& device) {
  Plan p{};
  p.call = call;
  const bool rows = !side_by_side(call);
  const int64_t vectors = call.vectors, features = call.features;
  const int element = int(element_size(call.dtype)), compute = compute_size(call.dtype), columns = columns_of(element);
  p.layout = rows ? Layout::Rows : Layout::Channels;
  p.pack = widest_pack(call, rows);
  // The largest deviation that one of n values can have is (n − 1)/√n standard deviations. What is marked is looked at again: the margin
  // covers that a part of a vector is quieter than the vector, or louder.
  const double n = double(features), sigma = call.outlier_sigma;
  p.outliers_possible = (n - 1) / std::sqrt(n) > sigma;
  p.reach_squared = p.outliers_possible && sigma > 0 ? (rows ? 0.8 : 0.5) * sigma * sigma : INFINITY;

  // Shared memory: each warp has a ring of batches, and partial sums of the steps of a flush; the end of a block reuses both.
  p.ring_bytes = uint32_t(stages_of(element) * BATCH * columns * 32 * element);
  p.part_bytes = uint32_t(FLUSH * pitch_of(p.layout) * 4 * compute);
  const int of_warp = int(p.ring_bytes + p.part_bytes), of_block = rows ? 64 : 2 * FLUSH * (1 + warps_of(p.layout) * 8) * compute + 256;
  p.warps = std::clamp((device.shared_bytes - of_block) / of_warp, 1, warps_of(p.layout));
  if (!rows) p.warps = int(std::clamp<int64_t>(divide_up(vectors, 32 * columns), 1, p.warps));
  p.shared_bytes = uint32_t(p.warps * of_warp + of_block);
  const int fit = (device.shared_bytes + SHARED_RESERVED) / (int(p.shared_bytes) + SHARED_RESERVED);
  const int64_t resident = int64_t(device.multiprocessors) * std::clamp(fit, 1, blocks_of(p.layout, p.pack));

  // As many blocks as there are at a time, or a multiple of it, in equal shares.
  p.across = rows ? lanes_across(divide_up(features, columns)) : 32;
  p.slab_features = p.across * columns;
  p.warp_vectors = 32 * columns;
  if (rows) {
    p.slabs = divide_up(features, p.slab_features);
    const int64_t step = FLUSH * (32 / p.across), most = int64_t(LONGEST / FLUSH) * step * p.warps;
    const int64_t at_once = std::max<int64_t>(1, resident / p.slabs), waves = std::max<int64_t>(1, divide_up(vectors, at_once * most));
    p.warp_vectors = int(std::max(step, round_up(divide_up(vectors, at_once * waves * p.warps), step)));
  }
  p.tile_vectors = p.warp_vectors * p.warps;
  p.tiles = divide_up(vectors, p.tile_vectors);
  if (!rows) {
    const int64_t fewest = divide_up(features, 2 * LONGEST), most = std::max(fewest, divide_up(features, SHORTEST_SLAB));
    p.slab_features = round_up(divide_up(features, std::clamp(resident / p.tiles, fewest, most)), FLUSH);
    p.slabs = divide_up(features, p.slab_features);
  }
  p.judges = int(std::clamp<int64_t>(divide_up(vectors, MERGE_THREADS), 1, 8 * device.multiprocessors));
  return p;
}

size_t place(Plan& p, void* workspace) {
  size_t end = 0;
  auto take = [&](auto*& at, int64_t bytes) {
    at = workspace ? reinterpret_cast<std::remove_reference_t<decltype(at)>>(static_cast<char*>(workspace) + end) : nullptr;
    end += size_t(round_up(bytes, 256));
  };
  const int64_t compute = compute_size(p.call.dtype), features = p.call.features, vectors = p.call.vectors;
  take(p.active, 4);
  take(p.arrived, 4);
  take(p.units, p.tiles * 2 * compute);
  take(p.records, p.tiles * RECORD * features * compute);
  take(p.sums, p.slabs * vectors * 4 * compute);
  take(p.notes, p.slabs * vectors * 2 * compute);
  take(p.marks, p.layout == Layout::Rows ? 0 : p.tiles * p.warps * features * 4);
  take(p.summaries, p.judges * int64_t(sizeof(Summary)));
  return end;
}

cudaError_t observe(const Plan& plan, const Device& device, cudaStream_t stream) {
  const Kernels kernels = kernels_for(plan);
  if (plan.tiles > 0) {
    const cudaError_t error = launch(kernels.read, plan.tiles * plan.slabs, 32 * plan.warps, plan.shared_bytes, device, plan, stream);
    if (error != cudaSuccess) return error;
  }
  const int64_t merges = plan.tiles > 0 ? (plan.call.features + 31) / 32 : 0;
  return launch(kernels.finish, plan.judges + merges, MERGE_THREADS, kernels.finish_shared, device, plan, stream);
}

cudaError_t probe() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernels_of<float>(Plan{}).finish));
}

}  // namespace torchprobe::cuda
