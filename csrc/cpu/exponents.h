// What the operator (exponents.cpp) passes to its kernels (exponents_kernel.h), which are compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace torchprobe::cpu {

// The same numbers as in torchprobe/ops/exponents.py.
constexpr int LOWEST_EXPONENT = -149, HIGHEST_EXPONENT = 127;
constexpr int EXPONENT_BINS = HIGHEST_EXPONENT - LOWEST_EXPONENT + 3;

constexpr int64_t MOST_RUN = 2048;     // values of one call of a kernel
constexpr int WINDOW = 16;             // exponents that are counted together
constexpr int WINDOWS = 17;            // they begin anywhere, and cover the 256 exponents of float
constexpr int64_t MOST_MOVES = 8;
constexpr int LARGEST_TOP = 254;       // of the usual window: nan and inf are outside
constexpr int64_t MOST_ROWS = 8;       // that are read together; the largest values by column stay in registers
constexpr int COUNTER_BYTES = 64;      // of a vector, on any machine
constexpr int DEPTH = 16;
constexpr uint32_t FULL = (uint32_t(1) << DEPTH) - 1;  // additions to the counters of a window that they hold

// The counters of a window, one bit of each in a vector. Bit b of a byte belongs to the exponent b below the largest one of the window, in the
// second half to 8 + b. `ones` has the weight 1, `twos` 2, `fours` 4, `sums` of a level 2^(level + 3), and so has the vector that waits.
struct SlicedCounters {
  uint32_t added = 0;  // vectors of weight 8; bit l says whether one waits at level l
  bool begun = false;  // whether `ones`, `twos` and `fours` mean something
  alignas(64) unsigned char ones[2][COUNTER_BYTES], twos[2][COUNTER_BYTES], fours[2][COUNTER_BYTES];
  alignas(64) unsigned char sums[DEPTH][2][COUNTER_BYTES], waiting[DEPTH][2][COUNTER_BYTES];
};

// The counts of one thread.
struct ExponentCounts {
  ExponentCounts() {}  // the vectors of a level are written when it is reached: nothing else is cleared
  int64_t bins[EXPONENT_BINS] = {};
  int64_t nonfinite = 0;
  int first = 0;  // the least exponent of window 1, with its bias: 1 … 16; 0 if nothing was seen
  int usual = 0;  // the window that is looked at first
  bool wide = false;  // and the one below it
  int64_t others = 0, moves = 0;  // inputs of a run with values outside of these; how often the windows were placed anew
  SlicedCounters windows[WINDOWS];
};

// The kernels for one instruction set. Absolute values are compared by their bits: int32_t for float and half precision, int64_t for double.
struct ExponentKernels {
  // Counts the exponents of rows of n ≤ MOST_RUN values; raises across[i] to the bits of the largest value in column i, and largest[r] to those of
  // row r. Nan and inf are counted, and otherwise left out. With `octaves`, of the largest value of a row its octave is enough.
  void (*add_double)(const double* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts&, int64_t* across, int64_t* largest, bool octaves);
  void (*add_float)(const float* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts&, int32_t* across, int32_t* largest, bool octaves);
  void (*add_bfloat16)(const void* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts&, int32_t* across, int32_t* largest, bool octaves);
  void (*add_float16)(const void* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts&, int32_t* across, int32_t* largest, bool octaves);
  void (*finish)(ExponentCounts&);  // adds what `windows` hold to `bins`

  static const ExponentKernels baseline;
#if defined(__x86_64__)
  static const ExponentKernels avx2, avx512;
  static constexpr const ExponentKernels& avx512_popcount = avx512;
#endif
};

}  // namespace torchprobe::cpu
