// torchprobe::exponents_ on the CPU: exponents of values, and what forecasts of eight bits need, in one read of x. torchprobe/ops/exponents.py
// defines the schema and explains it:
//
//   exponents_(Tensor(a!) counts, Tensor(b!) largest, Tensor(c!) sizes, Tensor(d!) quarters, Tensor(e!) levels, Tensor x, int feature_dim,
//              Tensor? mask) -> ()
//
// Every value is counted by the kernels. The finer numbers are about some vectors of the call, which are read again. Counts are integers, largest
// values do not depend on the order, and each of the other numbers is added up by one thread: the number of threads changes no bit.

#include "exponents.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.h"
#include "isa.h"
#include "locks.h"
#include "parallel.h"

namespace torchprobe::cpu {
namespace {

#include "simd.h"
#include "exponents_chosen.h"

using torch::stable::Tensor;

constexpr int ZEROS = EXPONENT_BINS, NONFINITE = EXPONENT_BINS + 1, TAKEN = EXPONENT_BINS + 2, COUNTS = EXPONENT_BINS + 3;
constexpr int QUARTERS = 4, EIGHTHS = 8, LEVEL_LOW = -12, LEVEL_HIGH = 9, LEVELS = 1 + EIGHTHS * (LEVEL_HIGH - LEVEL_LOW), SCALES = 3;
constexpr double UPWARDS = 1 + 0x1p-40;     // the largest value of a block does not fall below its level by rounding
constexpr double TINY = 0x1p-900, LIFT = 0x1p600;  // what is below TINY is multiplied by LIFT, as the inverse of its scale would be inf
constexpr int64_t TASK = int64_t(1) << 16;           // values of a task
constexpr int64_t READ_TOGETHER = int64_t(1) << 16;  // values of the vectors whose magnitudes are held together

struct State {
  double *counts, *largest, *sizes, *quarters, *levels;
};

// x as features × positions; see quantile.cpp.
struct View {
  int64_t features, feature_stride, positions;
  int dims;
  int64_t size[MAX_DIMS], stride[MAX_DIMS];
  const uint8_t* mask;

  View(const Tensor& x, int64_t feature_dim, const uint8_t* mask)
      : features(x.size(feature_dim)), feature_stride(x.stride(feature_dim)), mask(mask) {
    positions = join_positions(Shape(x), feature_dim, dims, size, stride);
    if (!dims) size[0] = 1, stride[0] = 1, dims = 1;
  }
  int64_t offset(int64_t position) const {
    int64_t at = 0;
    for (int d = dims - 1; d >= 0; position /= size[d--]) at += position % size[d] * stride[d];
    return at;
  }
  bool kept(int64_t position) const { return !mask || mask[position]; }
};

// What values of type S are computed in, and their bits.
template <class S>
using Number = std::conditional_t<std::is_same_v<S, double>, double, float>;
template <class S>
using Bits = std::conditional_t<std::is_same_v<S, double>, int64_t, int32_t>;

// The kernel that counts values of type S.
template <class S>
auto counter(const ExponentKernels& kernels) {
  if constexpr (std::is_same_v<S, double>) return kernels.add_double;
  else if constexpr (std::is_same_v<S, float>) return kernels.add_float;
  else if constexpr (std::is_same_v<S, BFloat16>) return kernels.add_bfloat16;
  else return kernels.add_float16;
}

// The part of [low, high) octaves with 2^bits parts of equal width each; 0 below.
template <int BITS, int LOW, int HIGH>
TORCHPROBE_INLINE int part_of(double ratio) {
  uint64_t bits;
  std::memcpy(&bits, &ratio, sizeof bits);
  const int64_t part = int64_t(bits >> (52 - BITS)) - (int64_t(1023 + LOW) << BITS);
  return int(std::clamp<int64_t>(part + 1, 0, int64_t(HIGH - LOW) << BITS));
}

// -- every value ---------------------------------------------------------------------------------------------------------

// Counts all kept vectors, raises `largest` (bits, features) and writes to `peaks` the bits of a magnitude in the octave of the
// largest one of each vector, −1 if left out.
// Returns the number of kept vectors.
template <class S>
int64_t count_all(const View& view, const S* x, ExponentCounts& total, std::vector<Bits<S>>& largest,
                  std::vector<Bits<S>>& peaks) {
  using I = Bits<S>;
  using T = Number<S>;
  const ExponentKernels& kernels = choose<ExponentKernels>();
  const auto count = counter<S>(kernels);
  const int64_t features = view.features, run = view.size[view.dims - 1];
  const bool rows = view.feature_stride == 1 || features == 1;
  const bool side_by_side = !rows && view.stride[view.dims - 1] == 1 && run >= 16 && !view.mask;
  // A task is some vectors; side by side, they are one piece of the last dimension.
  const int64_t length = side_by_side ? std::min(run, MOST_RUN) : std::max<int64_t>(1, TASK / features);
  const int64_t pieces = side_by_side ? (run + length - 1) / length : (view.positions + length - 1) / length;
  const int64_t tasks = side_by_side ? view.positions / run * pieces : pieces;
  const int64_t grain = std::max<int64_t>(1, TASK / std::max<int64_t>(1, length * features));
  std::mutex merging;
  int64_t kept_vectors = 0;
  parallel(0, tasks, grain, [&](int64_t begin, int64_t end) {
    auto counts = std::make_unique<ExponentCounts>();
    std::vector<I> most(size_t(features), -1);
    std::vector<S> gathered(size_t(rows || side_by_side ? 0 : features));
    int64_t kept = 0;
    for (int64_t task = begin; task < end; ++task) {
      if (side_by_side) {
        const int64_t first = task / pieces * run + task % pieces * length, n = std::min(length, run - task % pieces * length);
        const S* at = x + view.offset(first);
        count(at, view.feature_stride, features, n, *counts, peaks.data() + first, most.data(), false);
        kept += n;
        continue;
      }
      const int64_t last = std::min(view.positions, (task + 1) * length);
      for (int64_t v = task * length, together = 1; v < last; v += together) {
        together = 1;
        if (!view.kept(v)) continue;
        const S* at = x + view.offset(v);
        if (!rows) {
          for (int64_t f = 0; f < features; ++f) gathered[size_t(f)] = at[f * view.feature_stride];
          at = gathered.data();
        }
        const int64_t stride = view.stride[view.dims - 1];  // of vectors that are one after the other
        if (rows && !view.mask) together = std::min({MOST_ROWS, last - v, run - v % run});
        for (int64_t f = 0; f < features; f += MOST_RUN) {
          count(at + f, stride, together, std::min(MOST_RUN, features - f), *counts, most.data() + f, peaks.data() + v, true);
        }
        kept += together;
      }
    }
    kernels.finish(*counts);
    const std::lock_guard<std::mutex> lock(merging);
    for (int i = 0; i < EXPONENT_BINS; ++i) total.bins[i] += counts->bins[i];
    total.nonfinite += counts->nonfinite;
    kept_vectors += kept;
    for (size_t f = 0; f < size_t(features); ++f) largest[f] = std::max(largest[f], most[f]);
  });
  static_assert(sizeof(I) == sizeof(T));
  return kept_vectors;
}

// -- some vectors --------------------------------------------------------------------------------------------------------

// The magnitudes of some vectors, one after the other, and their weights; 0 for nan and inf.
struct Magnitudes {
  int64_t vectors, features;
  std::vector<double> sizes;
  const double* weights;

  const double* of(int64_t vector) const { return sizes.data() + vector * features; }
  // Vectors of one weight are tallied together: whether this one is the last of them.
  bool last_of_weight(int64_t i) const { return i + 1 == vectors || weights[i + 1] != weights[i]; }
};

template <class S>
TORCHPROBE_INLINE double magnitude(S x) {
  const double value = std::fabs(double(widen(x)));
  return value <= std::numeric_limits<double>::max() ? value : 0;
}

template <class S>
void read_magnitudes(const View& view, const S* x, int64_t vector, double* size) {
  const S* at = x + view.offset(vector);
  if (view.feature_stride == 1) {
    for (int64_t f = 0; f < view.features; ++f) size[f] = magnitude(at[f]);
  } else {
    for (int64_t f = 0; f < view.features; ++f) size[f] = magnitude(at[f * view.feature_stride]);
  }
}

// Numbers, sums and squares of each feature.
void add_sizes(const Magnitudes& taken, const State& state) {
  double *numbers = state.sizes, *sums = numbers + taken.features, *squares = sums + taken.features;
  for (int64_t i = 0; i < taken.vectors; ++i) {
    const double weight = taken.weights[i], *size = taken.of(i);
    for (int64_t f = 0; f < taken.features; ++f) {
      numbers[f] += size[f] > 0 ? weight : 0;
      sums[f] += weight * size[f];
      squares[f] += weight * size[f] * size[f];
    }
  }
}

// How many quarters of octaves hold a value. Zeros are counted in the place after the last one, and not added.
void add_quarters(const Magnitudes& taken, const State& state) {
  uint32_t tally[QUARTERS * EXPONENT_BINS + 1] = {};
  for (int64_t i = 0; i < taken.vectors; ++i) {
    for (const double *size = taken.of(i), *end = size + taken.features; size < end; ++size) {
      const int part = part_of<2, LOWEST_EXPONENT, HIGHEST_EXPONENT + 2>(*size);  // 0: below, and the first bin is no octave
      const int quarter = part ? std::min(part + QUARTERS - 1, QUARTERS * (EXPONENT_BINS - 1)) : 0;  // nor is the last
      ++tally[*size > 0 ? quarter : QUARTERS * EXPONENT_BINS];
    }
    if (!taken.last_of_weight(i)) continue;
    for (int part = 0; part < QUARTERS * EXPONENT_BINS; ++part) state.quarters[part] += taken.weights[i] * tally[part];
    std::memset(tally, 0, sizeof tally);
  }
}

// Four at a time, as each comparison waits for the one before it.
double largest_of(const double* size, int64_t n) {
  double most[4] = {};
  int64_t f = 0;
  for (; f + 4 <= n; f += 4) {
    for (int k = 0; k < 4; ++k) most[k] = std::max(most[k], size[f + k]);
  }
  for (; f < n; ++f) most[0] = std::max(most[0], size[f]);
  return std::max(std::max(most[0], most[1]), std::max(most[2], most[3]));
}

// The levels of values in blocks that share a scale. Zeros again have a place after the last one.
template <int SCALE, class Scale>
void add_levels(const Magnitudes& taken, const State& state, int64_t block, const Scale& scale_of) {
  uint32_t tally[LEVELS + 1] = {};
  double squares[LEVELS + 1] = {}, *numbers = state.levels + 2 * SCALE * LEVELS;
  for (int64_t i = 0; i < taken.vectors; ++i) {
    const double weight = taken.weights[i], *size = taken.of(i);
    for (int64_t begin = 0; begin < taken.features; begin += block) {
      const int64_t end = std::min(begin + block, taken.features);
      const double most = largest_of(size + begin, end - begin);
      if (!(most > 0)) continue;
      const double scale = scale_of(most), square = weight * scale * scale;  // which may be inf
      const double lift = most < TINY ? LIFT : 1, inverse = UPWARDS / scale_of(most * lift);
      for (int64_t f = begin; f < end; ++f) {
        const int level = size[f] > 0 ? part_of<3, LEVEL_LOW, LEVEL_HIGH>(size[f] * lift * inverse) : LEVELS;
        ++tally[level];
        squares[level] += square;
      }
    }
    if (!taken.last_of_weight(i)) continue;
    for (int level = 0; level < LEVELS; ++level) numbers[level] += weight * tally[level];
    std::memset(tally, 0, sizeof tally);
  }
  for (int level = 0; level < LEVELS; ++level) numbers[LEVELS + level] += squares[level];
}

// Each of the numbers is added up by one thread, in the order of the vectors.
template <class S>
void add_vectors(const View& view, const S* x, const Chosen& chosen, const State& state) {
  const int64_t features = view.features, all = int64_t(chosen.vectors.size()), together = std::max<int64_t>(1, READ_TOGETHER / features);
  Magnitudes taken{0, features, std::vector<double>(size_t(std::min(all, together) * features)), nullptr};
  for (int64_t begin = 0; begin < all; begin += together) {
    taken.vectors = std::min(all - begin, together);
    taken.weights = chosen.weights.data() + begin;
    for (int64_t i = 0; i < taken.vectors; ++i) read_magnitudes(view, x, chosen.vectors[size_t(begin + i)], taken.sizes.data() + i * features);
    const bool many = taken.vectors * features >= VALUES_TAKEN / 2;
    parallel(0, 5, many ? 1 : 5, [&](int64_t first, int64_t end) {
      for (int64_t part = first; part < end; ++part) {
        switch (part) {
          case 0: add_levels<0>(taken, state, features, [](double most) { return most / 127; }); break;
          case 1: add_levels<1>(taken, state, 32, [](double most) { return std::ldexp(1.0, std::ilogb(most) - 8); }); break;
          case 2: add_sizes(taken, state); break;
          case 3: add_quarters(taken, state); break;
          default: add_levels<2>(taken, state, 16, [](double most) { return most / 6; });
        }
      }
    });
  }
}

// -- the operator --------------------------------------------------------------------------------------------------------

template <class S>
void add(const State& state, const View& view, const S* x) {
  using I = Bits<S>;
  using T = Number<S>;
  auto counts = std::make_unique<ExponentCounts>();
  std::vector<I> largest(size_t(view.features), -1), peaks(size_t(view.positions), -1);
  const int64_t kept = count_all(view, x, *counts, largest, peaks);
  const Chosen chosen = choose_vectors<T>(peaks, view.features);

  const std::lock_guard<std::mutex> lock(lock_of(state.counts));
  int64_t nonzero = 0;
  for (int i = 0; i < EXPONENT_BINS; ++i) state.counts[i] += double(counts->bins[i]), nonzero += counts->bins[i];
  state.counts[ZEROS] += double(kept * view.features - counts->nonfinite - nonzero);
  state.counts[NONFINITE] += double(counts->nonfinite);
  state.counts[TAKEN] += double(chosen.vectors.size());
  for (int64_t f = 0; f < view.features; ++f) {
    if (largest[size_t(f)] >= 0) state.largest[f] = std::max(state.largest[f], double(from_bits<T>(largest[size_t(f)])));
  }
  add_vectors(view, x, chosen, state);
}

void exponents_(Tensor counts, Tensor largest, Tensor sizes, Tensor quarters, Tensor levels, Tensor x, int64_t feature_dim,
                std::optional<Tensor> mask) {
  if (feature_dim < 0) feature_dim += x.dim();
  STD_TORCH_CHECK(feature_dim >= 0 && feature_dim < x.dim(), "feature_dim is outside the tensor");
  const Dtype dtype = dtype_of(x);
  const int64_t features = x.size(feature_dim);
  Memory memory;
  const State state{mutable_elements<double>(counts, 1, "counts", memory), mutable_elements<double>(largest, 1, "largest", memory),
                    mutable_elements<double>(sizes, 2, "sizes", memory), mutable_elements<double>(quarters, 1, "quarters", memory),
                    mutable_elements<double>(levels, 3, "levels", memory)};
  STD_TORCH_CHECK(x.is_cpu() && counts.numel() == COUNTS && largest.numel() == features && sizes.size(0) == 3 && sizes.size(1) == features &&
                      quarters.numel() == QUARTERS * EXPONENT_BINS && levels.size(0) == SCALES && levels.size(1) == 2 && levels.size(2) == LEVELS,
                  "the states were not made for ", features, " features on the CPU");
  memory.reads(x, "x");
  const uint8_t* kept = nullptr;
  if (mask) {
    bool fits = mask->dim() == x.dim() - 1;
    for (int64_t d = 0; fits && d < mask->dim(); ++d) fits = mask->size(d) == x.size(d + (d >= feature_dim));
    STD_TORCH_CHECK(fits, "mask must have the shape of x without its features");
    kept = const_elements<uint8_t>(*mask, mask->dim(), "mask", memory);
  }
  if (x.numel() == 0) return;
  const View view(x, feature_dim, kept);
  const EveryNumber exact;
  switch (dtype) {
    case Dtype::Float64: add(state, view, static_cast<const double*>(x.const_data_ptr())); break;
    case Dtype::Float32: add(state, view, static_cast<const float*>(x.const_data_ptr())); break;
    case Dtype::BFloat16: add(state, view, static_cast<const BFloat16*>(x.const_data_ptr())); break;
    case Dtype::Float16: add(state, view, static_cast<const Float16*>(x.const_data_ptr())); break;
  }
}

}  // namespace
}  // namespace torchprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(torchprobe, CPU, m) { m.impl("exponents_", TORCH_BOX(&torchprobe::cpu::exponents_)); }
