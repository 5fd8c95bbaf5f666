// torchprobe::average_precision on the CPU. torchprobe/ops/average_precision.py defines the schema and explains it:
//
//   average_precision(Tensor scores, Tensor crow, Tensor col, int concepts, Tensor? eligible=None, Tensor? group=None, bool both=False) -> Tensor
//
// For every unit the images are radix-sorted once and then visited in the order of their scores. Among the n images so far, h show a concept. Each
// image that shows it adds h / n to the concept's sum. Images with equal scores are one step, so they are visited twice: first all of them are
// counted, then each adds the same h / n. The backward order gives the result for the negated scores without another sort. The running h and sum
// of a concept are neighbors in memory, and those of a thousand concepts stay in the first-level cache. Wider vectors would not help.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "parallel.h"

namespace torchprobe::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__GNUC__)
#define TORCHPROBE_PREFETCH(p) __builtin_prefetch(p)
#else
#define TORCHPROBE_PREFETCH(p)
#endif

constexpr int64_t MOST_CONCEPTS = int64_t(1) << 22;  // the limits of torchprobe/ops/average_precision.py
constexpr int64_t MOST_UNITS = int64_t(1) << 26;
constexpr int64_t MOST_GROUPS = int64_t(1) << 20;
constexpr int64_t MOST_RESULTS = int64_t(1) << 26;
constexpr size_t LANES = 8;  // groups of concepts that are counted at a time

// The labels of all images, the same for all units.
struct Labels {
  int64_t images, concepts, groups;
  std::vector<int64_t> positives;    // for each concept, among the eligible images
  std::vector<uint32_t> begin;       // images + 1
  std::vector<uint32_t> concept_of;  // from begin[i] to begin[i + 1]: the number of image i's pattern, then its concepts
  const uint8_t* eligible;           // (images, groups): the groups of concepts for which an image counts; null: all groups
  std::vector<int32_t> patterns;     // the distinct rows of eligible, padded to whole lanes
  std::vector<uint32_t> group;       // of each concept
  std::vector<double> inverse;       // 1 / n, up to the number of images

  size_t lanes() const { return (size_t(groups) + LANES - 1) / LANES * LANES; }
};

// Keys increase as scores decrease. −0 and 0 are the same score.
inline uint32_t key_of(float score) {
  score += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}
inline uint64_t key_of(double score) {
  score += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits >> 63 ? bits : ~bits & 0x7fffffffffffffffu;
}

template <class Key>
struct Item {
  Key key;
  uint32_t image;
};

// Sorts by key, least significant digit first, and skips a digit that all keys share. Returns the buffer that contains the result, one of two.
template <class Key>
Item<Key>* radix_sort(Item<Key>* items, Item<Key>* other, int64_t n, uint32_t* histogram) {
  constexpr int BITS = 11, DIGITS = 1 << BITS, PASSES = (int(sizeof(Key)) * 8 + BITS - 1) / BITS;
  std::memset(histogram, 0, sizeof(uint32_t) * DIGITS * PASSES);
  for (int64_t i = 0; i < n; ++i) {
    for (int pass = 0; pass < PASSES; ++pass) ++histogram[pass * DIGITS + ((items[i].key >> (pass * BITS)) & (DIGITS - 1))];
  }
  for (int pass = 0; pass < PASSES; ++pass) {
    uint32_t* count = histogram + pass * DIGITS;
    if (count[(items[0].key >> (pass * BITS)) & (DIGITS - 1)] == n) continue;
    uint32_t sum = 0;
    for (int d = 0; d < DIGITS; ++d) {
      const uint32_t here = count[d];
      count[d] = sum, sum += here;
    }
    for (int64_t i = 0; i < n; ++i) other[count[(items[i].key >> (pass * BITS)) & (DIGITS - 1)]++] = items[i];
    std::swap(items, other);
  }
  return items;
}

struct Running {
  double hits, sum;
};

// The work of one thread.
template <class T>
struct Walk {
  using Key = decltype(key_of(T{}));
  const Labels& labels;
  std::vector<Item<Key>> items, other;
  std::vector<uint32_t> histogram;
  std::vector<Running> running;
  std::vector<int32_t> seen;  // images so far, of each group

  explicit Walk(const Labels& all)
      : labels(all), items(size_t(all.images)), other(size_t(all.images)), histogram(size_t(1) << 14), running(size_t(all.concepts)),
        seen(all.lanes()) {}

  // Counts one more image in the groups of its pattern. Copies the lanes, since the compiler cannot know that the arrays do not overlap.
  void count(uint32_t pattern) {
    const int32_t* more = labels.patterns.data() + pattern * seen.size();
    for (size_t g = 0; g < seen.size(); g += LANES) {
      int32_t n[LANES];
      std::memcpy(n, &seen[g], sizeof n);
      for (size_t lane = 0; lane < LANES; ++lane) n[lane] += more[g + lane];
      std::memcpy(&seen[g], n, sizeof n);
    }
  }

  // One step for each distinct score. `first` is the first item, and `step` leads to the next one.
  template <bool Grouped>
  void accumulate(const Item<Key>* first, int64_t step, double* result) {
    constexpr int64_t AHEAD = 12;
    const uint32_t *begin = labels.begin.data(), *concept_of = labels.concept_of.data(), *group = labels.group.data();
    std::fill(running.begin(), running.end(), Running{0, 0});
    std::fill(seen.begin(), seen.end(), 0);
    Running* const state = running.data();
    const double* const inverse = labels.inverse.data();
    const int32_t* const images_of = seen.data();
    const int64_t n = labels.images;
    for (int64_t i = 0; i < n;) {
      const Item<Key>* item = first + i * step;
      int64_t end = i + 1;
      if (end + AHEAD < n) TORCHPROBE_PREFETCH(concept_of + begin[item[(AHEAD + 1) * step].image]);
      if (end < n && item[step].key == item->key) {
        while (end < n && first[end * step].key == item->key) ++end;
        for (int64_t j = i; j < end; ++j) {
          const uint32_t image = first[j * step].image;
          if (Grouped) count(concept_of[begin[image]]);
          for (uint32_t c = begin[image] + 1; c < begin[image + 1]; ++c) state[concept_of[c]].hits += 1;
        }
        for (int64_t j = i; j < end; ++j) {
          const uint32_t image = first[j * step].image;
          for (uint32_t c = begin[image] + 1; c < begin[image + 1]; ++c) {
            Running& r = state[concept_of[c]];
            r.sum += r.hits * inverse[Grouped ? images_of[group[concept_of[c]]] : end];
          }
        }
      } else {
        const uint32_t image = item->image;
        if (Grouped) count(concept_of[begin[image]]);
        for (uint32_t c = begin[image] + 1; c < begin[image + 1]; ++c) {
          Running& r = state[concept_of[c]];
          const double hits = r.hits + 1;
          r.sum += hits * inverse[Grouped ? images_of[group[concept_of[c]]] : end];
          r.hits = hits;
        }
      }
      i = end;
    }
    for (size_t c = 0; c < running.size(); ++c) {
      result[c] = labels.positives[c] ? running[c].sum / double(labels.positives[c]) : std::numeric_limits<double>::quiet_NaN();
    }
  }

  // The results of one unit for its scores, and for the negated scores if `opposite` is not null.
  bool unit(const T* scores, double* result, double* opposite) {
    bool valid = true;
    for (int64_t i = 0; i < labels.images; ++i) {
      valid &= scores[i] == scores[i];
      items[size_t(i)] = {key_of(scores[i]), uint32_t(i)};
    }
    if (!valid) return false;
    const Item<Key>* sorted = labels.images ? radix_sort(items.data(), other.data(), labels.images, histogram.data()) : items.data();
    const auto walk = labels.eligible ? &Walk::accumulate<true> : &Walk::accumulate<false>;
    (this->*walk)(sorted, 1, result);
    if (opposite) (this->*walk)(labels.images ? sorted + labels.images - 1 : sorted, -1, opposite);
    return true;
  }
};

template <class T>
int64_t all_units(const Labels& labels, const T* scores, int64_t units, double* result, bool both) {
  std::vector<uint8_t> invalid(size_t(units), 0);
  parallel_dynamic(units, [&] {
    return [&, walk = Walk<T>(labels)](int64_t unit) mutable {
      double* to = result + unit * labels.concepts;
      invalid[size_t(unit)] = !walk.unit(scores + unit * labels.images, to, both ? to + units * labels.concepts : nullptr);
    };
  });
  return std::find(invalid.begin(), invalid.end(), 1) - invalid.begin();
}

template <class Index>
void read_rows(Labels& labels, Tensor& crow, Tensor& col, Memory& memory) {
  const Index *rows = const_elements<Index>(crow, 1, "crow", memory), *concept_of = const_elements<Index>(col, 1, "col", memory);
  const int64_t images = labels.images, entries = col.numel();
  STD_TORCH_CHECK(crow.numel() == images + 1 && rows[0] == 0 && int64_t(rows[images]) == entries && entries + images < UINT32_MAX,
                  "crow does not belong to these images and this col");
  labels.positives.assign(size_t(labels.concepts), 0);
  labels.begin.push_back(0);
  std::vector<int64_t> last(size_t(labels.concepts), -1);  // the last image with each concept
  std::map<std::string, uint32_t> patterns;
  for (int64_t i = 0; i < images; ++i) {
    std::string pattern(labels.lanes(), 0);
    for (int64_t g = 0; labels.eligible && g < labels.groups; ++g) {
      pattern[size_t(g)] = labels.eligible[i * labels.groups + g] != 0;  // a bool that is a view of bytes may hold others than 1
    }
    const auto [at, added] = patterns.emplace(std::move(pattern), uint32_t(patterns.size()));
    if (added) labels.patterns.insert(labels.patterns.end(), at->first.begin(), at->first.end());  // bytes become numbers
    labels.concept_of.push_back(at->second);
    STD_TORCH_CHECK(rows[i] <= rows[i + 1] && int64_t(rows[i + 1]) <= entries, "crow falls at image ", i);
    for (Index k = rows[i]; k < rows[i + 1]; ++k) {
      const int64_t concept_ = concept_of[k];
      STD_TORCH_CHECK(concept_ >= 0 && concept_ < labels.concepts, "image ", i, " has concept ", concept_, ", but there are ", labels.concepts);
      STD_TORCH_CHECK(last[size_t(concept_)] != i, "image ", i, " has concept ", concept_, " twice");
      last[size_t(concept_)] = i;
      if (labels.eligible && !labels.eligible[i * labels.groups + labels.group[size_t(concept_)]]) continue;
      labels.concept_of.push_back(uint32_t(concept_));
      ++labels.positives[size_t(concept_)];
    }
    labels.begin.push_back(uint32_t(labels.concept_of.size()));
  }
}

Tensor average_precision(Tensor scores, Tensor crow, Tensor col, int64_t concepts, std::optional<Tensor> eligible,
                         std::optional<Tensor> group, bool both) {
  Memory memory;
  const EveryNumber exact;
  const bool wide = scores.scalar_type() == ScalarType::Double;
  wide ? check_kind<double>(scores, 2, "scores") : check_kind<float>(scores, 2, "scores");
  const int64_t units = scores.size(0);
  Labels labels{};
  labels.images = scores.size(1);
  labels.concepts = concepts;
  STD_TORCH_CHECK(concepts >= 0 && concepts <= MOST_CONCEPTS, "concepts must be between 0 and 2^22, not ", concepts);
  STD_TORCH_CHECK(units <= MOST_UNITS && labels.images < INT32_MAX, "scores has more than 2^26 units or 2^31 images");
  STD_TORCH_CHECK(concepts == 0 || (both ? 2 : 1) * units <= MOST_RESULTS / concepts, "scores of ", units, " units for ", concepts,
                  " concepts give more than 2^26 results: pass fewer units at a time");
  STD_TORCH_CHECK(eligible.has_value() == group.has_value(), "eligible and group must be given together");
  const void* score = wide ? static_cast<const void*>(const_elements<double>(scores, 2, "scores", memory))
                           : static_cast<const void*>(const_elements<float>(scores, 2, "scores", memory));
  STD_TORCH_CHECK(crow.dim() == 1 && crow.numel() == labels.images + 1, "crow does not belong to these images");
  if (eligible) {
    check_kind<uint8_t>(*eligible, 2, "eligible");
    labels.groups = eligible->size(1);
    STD_TORCH_CHECK(eligible->size(0) == labels.images && labels.groups <= MOST_GROUPS, "eligible does not fit the images, or has more than 2^20 groups");
    labels.eligible = const_elements<uint8_t>(*eligible, 2, "eligible", memory);
    const int64_t* groups = const_elements<int64_t>(*group, 1, "group", memory);
    STD_TORCH_CHECK(group->numel() == concepts, "group does not fit the concepts");
    for (int64_t c = 0; c < concepts; ++c) {
      STD_TORCH_CHECK(groups[c] >= 0 && groups[c] < labels.groups, "group is wrong: concept ", c, " is of group ", groups[c], ", but there are ",
                      labels.groups);
      labels.group.push_back(uint32_t(groups[c]));
    }
  }
  crow.scalar_type() == ScalarType::Long ? read_rows<int64_t>(labels, crow, col, memory) : read_rows<int32_t>(labels, crow, col, memory);
  for (int64_t n = 0; n <= labels.images; ++n) labels.inverse.push_back(1 / double(n));

  std::vector<int64_t> shape = {2, units, concepts};
  if (!both) shape.erase(shape.begin());
  Tensor result = torch::stable::new_empty(scores, shape, ScalarType::Double);
  double* to = static_cast<double*>(result.mutable_data_ptr());
  const int64_t invalid = wide ? all_units(labels, static_cast<const double*>(score), units, to, both)
                               : all_units(labels, static_cast<const float*>(score), units, to, both);
  STD_TORCH_CHECK(invalid == units, "the scores of unit ", invalid, " contain nan");
  return result;
}

}  // namespace
}  // namespace torchprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(torchprobe, CPU, m) { m.impl("average_precision", TORCH_BOX(&torchprobe::cpu::average_precision)); }
