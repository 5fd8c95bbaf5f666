#include "plan.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>

namespace torchprobe::cuda {
namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int SHARED_RESERVED = 1 << 10;  // that the system takes of the shared memory for each block

int bytes_of(Dtype dtype) { return dtype == Dtype::Float64 ? 8 : dtype == Dtype::Float32 ? 4 : 2; }

Shape shape_for(Dtype dtype) { return dtype == Dtype::Float64 ? SHAPE<double> : dtype == Dtype::Float32 ? SHAPE<float> : SHAPE<uint16_t>; }

// Whether every vector starts on 16 bytes and its features are neighbours.
bool in_vectors(const Call& call, int columns) {
  const int64_t bytes = bytes_of(call.dtype);
  if ((call.feature_stride != 1 && call.features != 1) || call.features % columns || reinterpret_cast<uintptr_t>(call.x) % 16) return false;
  return std::all_of(call.stride, call.stride + call.dims, [&](int64_t stride) { return stride * bytes % 16 == 0; });
}

// Neighbouring vectors are contiguous, features are not.
bool side_by_side(const Call& call) {
  return call.dims && call.stride[call.dims - 1] == 1 && call.feature_stride != 1 && call.features > 1 && call.vectors > 1;
}

// Lays out the shared memory of a block that holds `stages` steps.
void share(Plan& p, const Shape& shape, int stages) {
  const int compute = p.call.dtype == Dtype::Float64 ? 8 : 4, element = bytes_of(p.call.dtype), vectors = p.step_vectors;
  uint32_t end = 0;
  auto take = [&](uint32_t& at, int64_t bytes) { at = end, end += uint32_t(divide_up(bytes, 16) * 16); };
  p.stages = stages;
  take(p.offsets, int64_t(8) * (stages + 1) * vectors);
  take(p.here, int64_t(4) * (stages + 1) * p.groups * p.rounds);
  // Partial sums, and what is passed between threads before and after the walk.
  const int64_t feature = int64_t(p.across) * shape.columns * compute, fold = p.groups > 1 ? (p.groups + 1) / 2 * feature * 7 + MAX_GROUPS * 4 : 0;
  int64_t part = std::max(fold, 2 * feature + 64);
  if (!p.wide) {
    take(p.mean, int64_t(8) * vectors);
    take(p.high, int64_t(compute) * vectors);
    take(p.low, int64_t(compute) * vectors);
    take(p.threshold, int64_t(compute) * vectors);
    take(p.verdict, int64_t(4) * vectors);
    take(p.outlier_counts, 4 * p.call.features);
    take(p.histogram, 4 * layout::BINS);
    take(p.found, int64_t(sizeof(Tally)) * vectors);
    part = std::max({part, int64_t(2) * vectors * p.pitch * compute, int64_t(sizeof(Summary)) * vectors});
  }
  take(p.part, part);
  const int64_t staged = p.access == Access::Staged ? p.slab_features * p.staged_pitch : int64_t(vectors) * p.across * shape.columns;
  take(p.data, staged * element * stages);
  p.shared_bytes = end;
}

// The threads of a block for slabs of so many features; says whether the shape and the memory allow it.
bool fit(Plan& p, int64_t features, Access access, bool wide, int shared_limit) {
  const Shape shape = shape_for(p.call.dtype);
  p.access = access, p.wide = wide;
  p.slab_features = features;
  const int64_t across = divide_up(features, shape.columns);
  if (across > shape.threads) return false;
  p.across = int(across);
  const int line = std::min(16 / bytes_of(p.call.dtype), shape.rows);
  // In this order: a step on its way while another is worked on; steps of several rounds, even if that takes threads; many threads.
  const int most_groups = std::clamp(shape.threads / p.across, 1, MAX_GROUPS);
  for (auto [fewest_stages, fewest_rounds, fewest_groups] : {std::array{2, 2, (most_groups + 1) / 2}, std::array{2, 1, 1}, std::array{1, 1, 1}}) {
    for (p.groups = most_groups; p.groups >= fewest_groups; --p.groups) {
      p.threads = int(divide_up(int64_t(p.groups) * p.across, 32) * 32);
      for (p.rounds = MAX_ROUNDS; p.rounds >= fewest_rounds; --p.rounds) {
        p.step_vectors = p.groups * p.rounds * shape.rows;
        if (p.rounds > 1 && p.step_vectors > MAX_STEP) continue;
        p.lanes = 1;
        while (p.lanes < 32 && p.lanes * 2 * p.step_vectors <= p.threads) p.lanes *= 2;
        // Threads side by side write side by side. A lane reads one number at a time, or four where they fill a warp: no two in one bank.
        p.pitch = p.across < NEIGHBOURS ? p.across | 1 : int(divide_up(p.across, 32) * 32) + (p.lanes < 8 ? 4 * p.lanes : 0);
        p.staged_pitch = int(divide_up(p.step_vectors, line) | 1) * line;  // an odd number of what a lane reads at once: no two in one bank
        for (int stages = p.rounds == 1 ? MAX_STAGES : 2; stages >= fewest_stages; --stages) {
          share(p, shape, stages);
          if (p.shared_bytes <= uint32_t(shared_limit)) return true;
        }
      }
    }
  }
  return false;
}

}  // namespace

Plan make_plan(const Call& call, int multiprocessors, int shared_limit) {
  Plan p{};
  p.call = call;
  p.slabs = 1;
  // The largest deviation that one of n values can have is (n − 1)/√n standard deviations.
  const double n = double(call.features), sigma = call.outlier_sigma;
  p.inverse_features = 1 / n;
  p.outlier_threshold = (n - 1) / std::sqrt(n) <= sigma ? INFINITY : sigma > 0 ? 0.999 * sigma * sigma * sigma * sigma : -1;
  const bool staged = side_by_side(call);
  const int columns = shape_for(call.dtype).columns;
  const bool vector = call.dtype != Dtype::Float64 && in_vectors(call, columns);
  const Access access = staged ? Access::Staged : vector ? Access::Vector : Access::Scalar;
  if (!fit(p, call.features, access, false, shared_limit)) {
    fit(p, std::min<int64_t>(32 * columns, call.features), vector ? Access::Vector : Access::Scalar, true, shared_limit);
    p.slabs = divide_up(call.features, p.slab_features);
  }

  // As many tiles as there are blocks at a time, or a multiple of it.
  const int at_a_time = std::max(1, std::min(shape_for(call.dtype).threads / p.threads, (shared_limit + SHARED_RESERVED) / (int(p.shared_bytes) + SHARED_RESERVED)));
  const int64_t resident = std::max<int64_t>(1, int64_t(multiprocessors) * at_a_time / p.slabs);
  const int64_t most = int64_t(TILE_ROWS) * p.groups, waves = std::max<int64_t>(1, divide_up(call.vectors, resident * most));
  // Equal shares, even if the last step of a tile is then short; by fours, as staged positions come.
  p.tile_vectors = std::max(p.step_vectors, int(divide_up(divide_up(call.vectors, resident * waves), 4) * 4));
  p.tiles = divide_up(call.vectors, p.tile_vectors);
  p.vector_blocks = p.wide ? std::min<int64_t>(divide_up(call.vectors, p.threads / 32), multiprocessors) : 0;
  p.summaries = p.wide ? p.vector_blocks : p.tiles;
  return p;
}

size_t place(Plan& p, void* workspace) {
  size_t end = 0;
  auto take = [&](auto*& at, int64_t bytes) {
    at = workspace ? reinterpret_cast<std::remove_reference_t<decltype(at)>>(static_cast<char*>(workspace) + end) : nullptr;
    end += size_t(divide_up(bytes, 256) * 256);
  };
  take(p.active, 4);
  take(p.records, p.tiles * RECORD * p.call.features * (p.call.dtype == Dtype::Float64 ? 8 : 4));
  take(p.outliers, p.summaries * p.call.features * 4);
  take(p.histograms, p.summaries * layout::BINS * 4);
  take(p.summary, p.summaries * int64_t(sizeof(Summary)));
  return end;
}

}  // namespace torchprobe::cuda
