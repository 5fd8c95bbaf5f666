// torchprobe::overlap_tally_ on the CPU: checks, label masks and threads. torchprobe/ops/overlap.py defines the schema and explains it:
//
//   overlap_tally_(Tensor(a!) intersection, Tensor(b!) activation, Tensor(c!) truth, Tensor maps, Tensor thresholds, Tensor category,
//                  Tensor planes, Tensor sizes, Tensor whole, str grid="half_pixel", int height=0, int width=0, bool per_plane=False,
//                  Tensor? boxes=None) -> ()
//
// First the label planes become masks, image by image. Then a few images are processed at a time: each thread takes some units through all of
// them. So two threads never write to the same place, and the counts of these units stay in the thread's cache.

#include "overlap.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "isa.h"
#include "parallel.h"

namespace torchprobe::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t LONGEST = int64_t(1) << 20;           // most rows or columns of a grid: keeps weights at most 1 − 2^-21
constexpr int64_t MOST_PIXELS = int64_t(1) << 28;       // in a grid
constexpr int64_t MOST_INPUT = int64_t(1) << 24;        // height or width of an input
constexpr int64_t MOST_CATEGORIES = int64_t(1) << 20;
constexpr int64_t MOST_MASK_BYTES = int64_t(1) << 29;   // of all label masks of a batch, unless TORCHPROBE_MOST_MASK_BYTES says otherwise
constexpr double FARTHEST = double(1 << 24);            // largest coordinate of a box
constexpr double STEPS = double(1 << 20);               // places between two points of a map, in a box: keeps weights at most 1 − 2^-20
constexpr int64_t MASK_WORDS = (int64_t(1) << 19) / 8;  // in the images processed at a time: half a megabyte stays in a cache
constexpr int64_t UNITS = 16;                           // whose counts stay in the cache from image to image

// Memory that starts on a cache line.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t size = 0) { grow(size); }
  T* get() const { return data_.get(); }
  int64_t size() const { return size_; }
  // Makes room for at least `size` elements, and for half as many more than before, up to `limit`. Old elements stay; new ones are 0.
  void grow(int64_t size, int64_t limit = std::numeric_limits<int64_t>::max()) {
    if (size <= size_) return;
    const int64_t most = std::max(size, std::min(limit, size_ + size_ / 2));
    std::unique_ptr<T, Free> data(static_cast<T*>(std::aligned_alloc(64, size_t(most * int64_t(sizeof(T)) + 63) / 64 * 64)));
    STD_TORCH_CHECK(data, "torchprobe: out of memory for label masks");
    if (size_) std::memcpy(data.get(), data_.get(), size_t(size_) * sizeof(T));
    std::memset(data.get() + size_, 0, size_t(most - size_) * sizeof(T));
    data_ = std::move(data), size_ = most;
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// The places of the pixels along one axis of a grid, between the points of the map.
struct Axis {
  std::vector<int32_t> low, high;
  std::vector<float> weight;

  void add(int64_t numerator, int64_t denominator, int64_t n) {  // a pixel at numerator / denominator, in points of the map
    numerator = std::clamp<int64_t>(numerator, 0, (n - 1) * denominator);
    const int64_t at = numerator / denominator;
    low.push_back(int32_t(at));
    high.push_back(int32_t(std::min(at + 1, n - 1)));
    weight.push_back(float(double(numerator - at * denominator) / double(denominator)));
  }
};

Axis half_pixel(int64_t n, int64_t size) {
  Axis axis;
  for (int64_t i = 0; i < size; ++i) axis.add((2 * i + 1) * n - size, 2 * size, n);
  return axis;
}

// A map that reaches from `first` to `last` on an axis of `size` pixels.
Axis in_box(int64_t n, int64_t size, double first, double last) {
  if (first == 0 && last == double(size)) return half_pixel(n, size);
  Axis axis;
  for (int64_t i = 0; i < size; ++i) {
    double at = ((double(i) + 0.5) - first) * double(n) / (last - first) - 0.5;
    at = std::floor(std::clamp(at, 0.0, double(n - 1)) * STEPS + 0.5);
    axis.add(int64_t(at), int64_t(STEPS), n);
  }
  return axis;
}

Axis anchored(int64_t n, int64_t size, int64_t input, int64_t reduction) {
  const int64_t step = input / n / reduction, first = input / n / 2 / reduction;
  STD_TORCH_CHECK(step > 0, "an anchored grid needs a map that is coarser than the label grid: ", n, " points for ", size, " pixels");
  Axis axis;
  for (int64_t i = 0; i < size; ++i) axis.add(i - first, step, n);
  return axis;
}

// A grid and the memory that it points to.
struct Plan {
  std::array<double, 4> box;
  Axis x, y;
  std::vector<Gap> gaps;
  std::vector<int32_t> window, window_low, window_high;
  Grid grid{};

  Plan(const std::array<double, 4>& box, Axis&& across, Axis&& down, int64_t h, int64_t w, int lanes)
      : box(box), x(std::move(across)), y(std::move(down)) {
    grid.h = int32_t(h), grid.w = int32_t(w);
    grid.rows = int32_t(y.low.size()), grid.columns = int32_t(x.low.size());
    grid.groups = (grid.columns + GROUP - 1) / GROUP;
    grid.blocks = int32_t((int64_t(grid.rows) * grid.groups * GROUP + BLOCK * 64 - 1) / (BLOCK * 64));
    for (int32_t row = 0; row < grid.rows; ++row) {
      const bool same = row > 0 && y.low[row] == y.low[row - 1] && y.high[row] == y.high[row - 1];
      if (!same) gaps.push_back({y.low[row], y.high[row], row, row});
      gaps.back().last = row + 1;
    }
    const size_t columns = size_t(grid.groups) * GROUP;
    x.low.resize(columns, x.low.back());
    x.high.resize(columns, x.high.back());
    x.weight.resize(columns, std::numeric_limits<float>::quiet_NaN());
    for (size_t i = 0; lanes && i < columns; i += lanes) {
      window.push_back(x.low[i]);
      for (size_t j = i; j < i + lanes; ++j) window_low.push_back(x.low[j] - x.low[i]), window_high.push_back(x.high[j] - x.low[i]);
      if (x.high[i + lanes - 1] - x.low[i] >= lanes) window.clear(), lanes = 0;
    }
    grid.gaps = gaps.data(), grid.gap_count = int32_t(gaps.size());
    grid.x_low = x.low.data(), grid.x_high = x.high.data(), grid.x_weight = x.weight.data(), grid.y_weight = y.weight.data();
    if (!window.empty()) grid.window = window.data(), grid.window_low = window_low.data(), grid.window_high = window_high.data();
  }
};

// One image: its labels as they were given, and as masks.
struct Work {
  const Plan* plan = nullptr;
  const int32_t* planes = nullptr;
  int64_t plane_count = 0, whole_count = 0;
  const int64_t* whole = nullptr;
  Aligned<uint64_t> masks;
  std::vector<LabelMask> labels;
  std::vector<int64_t> truth, categories;
  bool bad = false, too_many = false;
  int64_t bad_label = 0;
};

int64_t most_mask_bytes() {
  const char* given = std::getenv("TORCHPROBE_MOST_MASK_BYTES");
  const long long bytes = given ? std::atoll(given) : 0;
  return bytes > 0 ? bytes : MOST_MASK_BYTES;
}

// Makes the masks of one image. slot: one number for each label, all −1 before and after.
// room: bytes that are left for the masks of the batch.
void find_labels(Work& work, const OverlapKernels& kernels, std::vector<int32_t>& slot, const int64_t* category, int64_t columns,
                 bool per_plane, std::atomic<int64_t>& room) {
  const Grid& grid = work.plan->grid;
  const int64_t words = int64_t(grid.blocks) * BLOCK, size = int64_t(grid.rows) * grid.columns, labels = int64_t(slot.size());
  std::vector<int64_t> found;  // the label of each mask
  size_t first_of_plane = 0;
  for (int64_t k = 0; k < work.plane_count && !work.bad; ++k) {
    const int32_t* plane = work.planes + k * size;
    for (int32_t row = 0; (row = kernels.paint(plane, grid, row, slot.data(), labels, work.masks.get())) < grid.rows;) {
      for (const int32_t* p = plane + int64_t(row) * grid.columns; p < plane + int64_t(row + 1) * grid.columns; ++p) {
        if (*p < 0 || *p >= labels) work.bad = true, work.bad_label = *p;
        if (*p <= 0 || *p >= labels || slot[size_t(*p)] >= 0) continue;
        slot[size_t(*p)] = int32_t(found.size());
        found.push_back(*p);
      }
      if (work.bad) break;
      const int64_t before = work.masks.size(), needed = (int64_t(found.size()) * words - before) * 8;
      work.bad = work.too_many = needed > 0 && needed > room;
      if (work.bad) break;
      work.masks.grow(int64_t(found.size()) * words, before + room / 8);
      room -= (work.masks.size() - before) * 8;
    }
    if (per_plane || k + 1 == work.plane_count || work.bad) {
      for (; first_of_plane < found.size(); ++first_of_plane) slot[size_t(found[first_of_plane])] = -1;
    }
  }
  std::vector<int64_t> everywhere;
  std::vector<bool> belongs(size_t(columns), false);
  belongs.back() = true;
  for (int64_t i = 0; i < work.whole_count; ++i) {
    const int64_t label = work.whole[i];
    if (label <= -columns || label >= labels) {
      work.bad = true, work.bad_label = label;
    } else if (label < 0) {
      belongs[size_t(-label - 1)] = true;  // annotated for this category, whatever it shows
    }
    if (label > 0 && (per_plane || std::find(everywhere.begin(), everywhere.end(), label) == everywhere.end())) everywhere.push_back(label);
  }
  if (work.bad) return;

  for (size_t i = 0; i < found.size(); ++i) {
    if (!per_plane && std::find(everywhere.begin(), everywhere.end(), found[i]) != everywhere.end()) continue;
    const uint64_t* bits = work.masks.get() + int64_t(i) * words;
    int64_t first = 0, last = words - 1;
    while (!bits[first]) ++first;
    while (!bits[last]) --last;
    work.labels.push_back({found[i], bits, int32_t(first / BLOCK), int32_t(last / BLOCK + 1)});
    work.truth.push_back(kernels.count(bits, words));
  }
  for (const int64_t label : everywhere) work.labels.push_back({label, nullptr, 0, 0}), work.truth.push_back(size);
  for (const LabelMask& label : work.labels) {
    if (category[label.label] >= 0) belongs[size_t(category[label.label])] = true;
  }
  for (int64_t c = 0; c < columns; ++c) {
    if (belongs[size_t(c)]) work.categories.push_back(c);
  }
}

void overlap_tally_(Tensor intersection, Tensor activation, Tensor truth, Tensor maps, Tensor thresholds, Tensor category, Tensor planes,
                    Tensor sizes, Tensor whole, std::string grid, int64_t height, int64_t width, bool per_plane,
                    std::optional<Tensor> boxes) {
  Tally to{};
  const OverlapKernels& kernels = choose<OverlapKernels>();
  Memory memory;
  const EveryNumber exact;
  to.intersection = mutable_elements<int64_t>(intersection, 2, "intersection", memory);
  to.activation = mutable_elements<int64_t>(activation, 2, "activation", memory);
  int64_t* truth_counts = mutable_elements<int64_t>(truth, 1, "truth", memory);
  const float* map = const_elements<float>(maps, 4, "maps", memory);
  to.thresholds = const_elements<float>(thresholds, 1, "thresholds", memory);
  const int64_t* category_of = const_elements<int64_t>(category, 1, "category", memory);
  const int32_t* plane = const_elements<int32_t>(planes, 1, "planes", memory);
  const int64_t* size = const_elements<int64_t>(sizes, 2, "sizes", memory);
  const int64_t* everywhere = const_elements<int64_t>(whole, 1, "whole", memory);
  const int64_t images = maps.size(0), units = maps.size(1), h = maps.size(2), w = maps.size(3);
  to.labels = intersection.size(1);
  to.columns = activation.size(1);
  STD_TORCH_CHECK(intersection.size(0) == units && activation.size(0) == units && thresholds.numel() == units && truth.numel() == to.labels &&
                      category.numel() == to.labels && to.columns > 0 && sizes.size(0) == images && sizes.size(1) == 4,
                  "the counts, maps, thresholds, category and sizes do not fit together");
  STD_TORCH_CHECK(h > 0 && w > 0 && h <= LONGEST && w <= LONGEST, "maps must have between 1 and 2^20 rows and columns");
  STD_TORCH_CHECK(to.columns <= MOST_CATEGORIES, "activation has more than 2^20 columns");
  STD_TORCH_CHECK(grid == "half_pixel" || grid == "anchored", "grid must be half_pixel or anchored");
  STD_TORCH_CHECK(grid != "anchored" || (height >= h && width >= w && height <= MOST_INPUT && width <= MOST_INPUT),
                  "height and width must be those of the network's input, at most 2^24");
  const double* box_of = nullptr;
  if (boxes) {
    box_of = const_elements<double>(*boxes, 2, "boxes", memory);
    STD_TORCH_CHECK(boxes->size(0) == images && boxes->size(1) == 4 && grid == "half_pixel", "boxes must be (images, 4), on a half-pixel grid");
  }
  for (int64_t i = 0; i < to.labels; ++i) STD_TORCH_CHECK(category_of[i] < to.columns - 1, "category holds a number beyond activation's columns");

  std::vector<std::unique_ptr<Plan>> plans;
  std::vector<Work> work(static_cast<size_t>(images));
  int64_t planes_left = planes.numel(), whole_left = whole.numel();
  for (int64_t n = 0; n < images; ++n, size += 4) {
    const int64_t rows = size[1], columns = size[2];
    STD_TORCH_CHECK(rows > 0 && columns > 0 && rows <= LONGEST && columns <= LONGEST && rows * columns <= MOST_PIXELS, "image ", n,
                    " has an impossible label grid");
    STD_TORCH_CHECK(size[0] >= 0 && (size[0] == 0 || rows * columns <= planes_left / size[0]) && size[3] >= 0 && size[3] <= whole_left,
                    "sizes do not fit planes and whole at image ", n);
    const bool anchor = grid == "anchored";
    std::array<double, 4> box = {0, 0, double(rows), double(columns)};  // top, left, bottom, right
    if (box_of) std::copy(box_of + 4 * n, box_of + 4 * n + 4, box.begin());
    STD_TORCH_CHECK(-FARTHEST <= box[0] && box[0] < box[2] && box[2] <= FARTHEST && -FARTHEST <= box[1] && box[1] < box[3] && box[3] <= FARTHEST,
                    "image ", n, " has an impossible box");
    auto plan = std::find_if(plans.begin(), plans.end(), [&](auto& p) {
      return p->grid.rows == rows && p->grid.columns == columns && p->box == box;
    });
    if (plan == plans.end()) {
      const int64_t reduction = anchor ? std::max<int64_t>((2 * width + columns) / (2 * columns), 1) : 1;  // elsewhere width may be anything
      Axis across = anchor ? anchored(w, columns, width, reduction) : in_box(w, columns, box[1], box[3]);
      Axis down = anchor ? anchored(h, rows, height, reduction) : in_box(h, rows, box[0], box[2]);
      plans.push_back(std::make_unique<Plan>(box, std::move(across), std::move(down), h, w, kernels.lanes));
      plan = plans.end() - 1;
    }
    work[size_t(n)].plan = plan->get();
    work[size_t(n)].planes = plane, work[size_t(n)].plane_count = size[0];
    work[size_t(n)].whole = everywhere, work[size_t(n)].whole_count = size[3];
    plane += size[0] * rows * columns, planes_left -= size[0] * rows * columns;
    everywhere += size[3], whole_left -= size[3];
  }
  STD_TORCH_CHECK(planes_left == 0 && whole_left == 0, "planes or whole hold more than sizes say");

  std::atomic<int64_t> room{most_mask_bytes()};
  parallel_dynamic(images, [&] {
    return [&, slot = std::vector<int32_t>(size_t(to.labels), -1)](int64_t n) mutable {
      find_labels(work[size_t(n)], kernels, slot, category_of, to.columns, per_plane, room);
    };
  });
  int64_t floats = 0, words = 0;
  for (int64_t n = 0; n < images; ++n) {  // before anything is counted: a bad label leaves the counts unchanged
    const Work& image = work[size_t(n)];
    STD_TORCH_CHECK(!image.too_many, "planes: the label masks of this batch take more than ", most_mask_bytes(), " bytes, at image ", n,
                    ": pass fewer images at a time, or set TORCHPROBE_MOST_MASK_BYTES");
    STD_TORCH_CHECK(!image.bad, "image ", n, " of the batch has label ", image.bad_label, ", but labels are numbered 0 to ", to.labels - 1,
                    "; whole may also hold −1 to −", to.columns - 1, " for categories");
    floats = std::max(floats, scratch_floats(image.plan->grid));
    words = std::max(words, int64_t(image.plan->grid.blocks) * BLOCK);
  }
  for (const Work& image : work) {
    for (size_t i = 0; i < image.labels.size(); ++i) add(truth_counts[image.labels[i].label], image.truth[i]);
  }

  for (int64_t first = 0, last = 0; first < images; first = last) {
    for (int64_t held = 0; last < images && (last == first || held < MASK_WORDS); ++last) {
      held += int64_t(work[size_t(last)].labels.size()) * work[size_t(last)].plan->grid.blocks * BLOCK;
    }
    parallel_dynamic((units + UNITS - 1) / UNITS, [&] {
      return [&, scratch = Aligned<float>(floats), mask = Aligned<uint64_t>(words)](int64_t piece) {
        for (int64_t n = first; n < last; ++n) {
          const Work& from = work[size_t(n)];
          const Image image{&from.plan->grid,       map + n * units * h * w,       from.labels.data(), int64_t(from.labels.size()),
                            from.categories.data(), int64_t(from.categories.size())};
          kernels.tally(image, to, piece * UNITS, std::min((piece + 1) * UNITS, units), scratch.get(), mask.get());
        }
      };
    });
  }
}

}  // namespace
}  // namespace torchprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(torchprobe, CPU, m) { m.impl("overlap_tally_", TORCH_BOX(&torchprobe::cpu::overlap_tally_)); }
