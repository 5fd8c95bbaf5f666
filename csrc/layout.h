// Where each number is stored in the state of observe_. torchprobe/ops/layout.py explains them; a test checks that both files agree.
#pragma once

#include <cstdint>

namespace torchprobe::layout {

enum Slot : int64_t { CALLS, VECTORS, CONSTANT, INVALID, KURTOSIS_MEAN, KURTOSIS_M2, HISTOGRAM = 8 };
constexpr int BINS_PER_OCTAVE_LOG2 = 6;
constexpr int64_t BINS = 18 << BINS_PER_OCTAVE_LOG2;
constexpr int64_t HEADER = HISTOGRAM + BINS;

enum Row : int64_t { COUNT, NONFINITE, OUTLIERS, MIN, MAX, ABS_SUM, MEAN, M2, M3, M4, ROWS };

constexpr int64_t size(int64_t features) { return HEADER + ROWS * features; }

}  // namespace torchprobe::layout
