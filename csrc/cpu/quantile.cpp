// torchprobe::keep_largest_ on the CPU: the largest values of every feature, in one read of x. torchprobe/ops/quantile.py defines the schema and
// explains it:
//
//   keep_largest_(Tensor(a!) values, Tensor(b!) counts, Tensor(c!) bound, Tensor x, int feature_dim, int capacity) -> ()
//
// Nearly every value lies below its feature's bound, so the work is one comparison for each value. The compiler vectorizes it for any processor.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "arguments.h"
#include "parallel.h"

namespace torchprobe::cpu {
namespace {

#include "simd.h"

using torch::stable::Tensor;

constexpr int BLOCK = 16;  // values that are compared at once; the same as BLOCK in torchprobe/ops/quantile.py
constexpr int64_t MOST_LOOKED_AT = int64_t(1) << 16;  // kept values that every call looks at, if x is smaller
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

inline bool any_nan(const float* values, int64_t n) {
  int found = 0;
  for (int64_t i = 0; i < n; ++i) found |= values[i] != values[i];
  return found;
}

// The buffer of one feature. All values after the first `fill` are −inf.
struct Buffer {
  float* values;
  int64_t slots, capacity;
  int64_t &fill, &nans, &ties;
  float& bound;
  std::atomic<bool>& damaged;

  // Makes room for one more block. No dropped value is above the bound, now or later.
  void make_room() {
    if (slots - fill >= BLOCK) return;
    if (any_nan(values, fill)) {  // it has no place in an order: nth_element could leave the buffer
      damaged = true;
      std::replace_if(values, values + fill, [](float v) { return v != v; }, LOWEST);
    }
    std::nth_element(values, values + capacity - 1, values + fill, std::greater<float>());
    const float next = values[capacity - 1];
    if (next != bound) ties = 0;
    ties += std::count(values + capacity, values + fill, next);
    std::fill(values + capacity, values + fill, LOWEST);
    fill = capacity;
    bound = next;
  }
  void add(const float* block) {
    make_room();
    for (int i = 0; i < BLOCK; ++i) {  // without a branch: every value is written, and kept if `fill` advances
      values[fill] = block[i];
      fill += block[i] > bound;
      ties += block[i] == bound;
      nans += block[i] != block[i];
    }
    if (fill < slots) values[fill] = LOWEST;
  }
  void add(float value) {
    make_room();
    if (value > bound) values[fill++] = value;
    ties += value == bound;
    nans += value != value;
  }
};

struct State {
  float* values;
  int64_t *fill, *nans, *ties;
  float* bound;
  int64_t slots, capacity;
  std::atomic<bool>& damaged;

  Buffer buffer(int64_t feature) const {
    return {values + feature * slots, slots, capacity, fill[feature], nans[feature], ties[feature], bound[feature], damaged};
  }
};

TORCHPROBE_INLINE float narrow(float x) { return x; }
TORCHPROBE_INLINE float narrow(double x) { return float(x); }

template <class S>
TORCHPROBE_INLINE void load_block(const S* x, int64_t stride, int64_t count, float* block) {
  if (stride == 1 && count == BLOCK) {
    for (int i = 0; i < BLOCK; ++i) block[i] = narrow(widen(x[i]));
  } else {
    for (int i = 0; i < BLOCK; ++i) block[i] = i < count ? narrow(widen(x[i * stride])) : LOWEST;
  }
}

// Adds some positions of one feature, `stride` apart.
template <class S>
void add_run(const Buffer& of, const S* x, int64_t count, int64_t stride) {
  Buffer buffer = of;
  float block[BLOCK];
  for (int64_t i = 0; i < count; i += BLOCK) {
    load_block(x + i * stride, stride, std::min<int64_t>(BLOCK, count - i), block);
    const float bound = buffer.bound;
    int reached = 0, above = 0, equal = 0;
    for (int j = 0; j < BLOCK; ++j) reached |= !(block[j] < bound);  // nan too
    if (!reached) continue;
    for (int j = 0; j < BLOCK; ++j) {
      above |= !(block[j] <= bound);
      equal += block[j] == bound;
    }
    if (above) {
      buffer.add(block);
    } else {
      buffer.ties += equal;
    }
  }
}

// Adds one position of features [begin, end), which are contiguous.
template <class S>
void add_position(const State& state, const S* x, int64_t begin, int64_t end) {
  float block[BLOCK];
  for (int64_t f = begin; f < end; f += BLOCK) {
    const int64_t count = std::min<int64_t>(BLOCK, end - f);
    load_block(x + f, 1, count, block);
    if (count == BLOCK) {
      int reached = 0;
      for (int j = 0; j < BLOCK; ++j) reached |= !(block[j] < state.bound[f + j]);  // nan too
      if (!reached) continue;
    }
    for (int j = 0; j < count; ++j)
      if (!(block[j] < state.bound[f + j])) state.buffer(f + j).add(block[j]);
  }
}

// x as features × positions. The positions are numbered by `dims` dimensions; the last one runs fastest.
struct View {
  int64_t features, feature_stride, positions;
  int dims;
  int64_t size[MAX_DIMS], stride[MAX_DIMS];

  View(const Tensor& x, int64_t feature_dim) : features(x.size(feature_dim)), feature_stride(x.stride(feature_dim)) {
    positions = join_positions(Shape(x), feature_dim, dims, size, stride);
    if (!dims) size[0] = 1, stride[0] = 1, dims = 1;
  }
};

template <class S>
void keep_largest(const State& state, const View& view, const S* x) {
  const int last = view.dims - 1;
  const int64_t run = view.size[last], step = view.stride[last], runs = view.positions / run;
  const bool side_by_side = view.feature_stride == 1 && step != 1;
  const int64_t grain = std::max<int64_t>(BLOCK, (1 << 15) / view.positions);
  parallel(0, view.features, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < runs; ++r) {
      const S* at = x;
      for (int64_t d = last - 1, rest = r; d >= 0; rest /= view.size[d--]) at += rest % view.size[d] * view.stride[d];
      if (side_by_side) {
        for (int64_t i = 0; i < run; ++i) add_position(state, at + i * step, begin, end);
      } else {
        for (int64_t f = begin; f < end; ++f) add_run(state.buffer(f), at + f * view.feature_stride, run, step);
      }
    }
  });
}

// Raises if the buffers are not what earlier calls left there. Of many kept values only those that are sorted are looked at: see make_room.
void check_contents(const State& state, int64_t features, int64_t elements) {
  int64_t kept = 0;
  for (int64_t f = 0; f < features; ++f) {
    STD_TORCH_CHECK(state.fill[f] >= 0 && state.fill[f] <= state.slots, "counts is damaged: feature ", f, " keeps ", state.fill[f], " of ",
                    state.slots, " values");
    STD_TORCH_CHECK(state.nans[f] >= 0 && state.nans[f] <= MOST_CALLS && state.ties[f] >= 0 && state.ties[f] <= MOST_CALLS,
                    "counts is damaged: feature ", f, " has a negative or absurd number");
    STD_TORCH_CHECK(state.bound[f] == state.bound[f], "bound is damaged: that of feature ", f, " is nan");
    kept += state.fill[f];
  }
  if (kept > std::max(elements, MOST_LOOKED_AT)) return;
  for (int64_t f = 0; f < features; ++f) {
    STD_TORCH_CHECK(!any_nan(state.values + f * state.slots, state.fill[f]), "values is damaged: feature ", f, " keeps nan");
  }
}

void keep_largest_(Tensor values, Tensor counts, Tensor bound, Tensor x, int64_t feature_dim, int64_t capacity) {
  if (feature_dim < 0) feature_dim += x.dim();
  STD_TORCH_CHECK(feature_dim >= 0 && feature_dim < x.dim(), "feature_dim is outside the tensor");
  const Dtype dtype = dtype_of(x);
  const int64_t features = x.size(feature_dim);
  Memory memory;
  std::atomic<bool> damaged{false};
  float* kept = mutable_elements<float>(values, 2, "values", memory);
  int64_t* fill = mutable_elements<int64_t>(counts, 2, "counts", memory);
  float* bounds = mutable_elements<float>(bound, 1, "bound", memory);
  STD_TORCH_CHECK(x.is_cpu() && values.size(0) == features && counts.size(0) == 3 && counts.size(1) == features && bound.size(0) == features,
                  "the buffers were not made for ", features, " features on the CPU");
  STD_TORCH_CHECK(capacity >= 1 && capacity <= MOST_ELEMENTS, "capacity must be at least 1, and at most 2^36");
  memory.reads(x, "x");
  if (x.numel() == 0) return;
  const View view(x, feature_dim);
  const EveryNumber exact;
  const State state{kept, fill, fill + features, fill + 2 * features, bounds, values.size(1), capacity, damaged};
  check_contents(state, features, x.numel());
  const int64_t most = *std::max_element(fill, fill + features);
  STD_TORCH_CHECK(state.slots >= capacity + BLOCK || most + view.positions + BLOCK <= state.slots, "the buffers have no room for ",
                  view.positions, " positions more");
  switch (dtype) {
    case Dtype::Float64: keep_largest(state, view, static_cast<const double*>(x.const_data_ptr())); break;
    case Dtype::Float32: keep_largest(state, view, static_cast<const float*>(x.const_data_ptr())); break;
    case Dtype::BFloat16: keep_largest(state, view, static_cast<const BFloat16*>(x.const_data_ptr())); break;
    case Dtype::Float16: keep_largest(state, view, static_cast<const Float16*>(x.const_data_ptr())); break;
  }
  STD_TORCH_CHECK(!damaged, "values is damaged: it keeps nan");
}

}  // namespace
}  // namespace torchprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(torchprobe, CPU, m) { m.impl("keep_largest_", TORCH_BOX(&torchprobe::cpu::keep_largest_)); }
