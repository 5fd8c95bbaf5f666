// What the operator (overlap.cpp) hands to the kernels, which are compiled once per instruction set (overlap_kernel.h).
#pragma once

#include <cstdint>

namespace torchprobe::cpu {

// A mask over a label grid has one bit a pixel: a row is a number of groups of 16 pixels, the first pixel in the lowest bit, and the rows
// follow each other. The bits beyond the last column are 0, and so is what lies between the last row and the next multiple of a block.
constexpr int GROUP = 16;         // pixels
constexpr int BLOCK = 8;          // words of 64 bits: a mask is a whole number of blocks
constexpr int MOST_LANES = 16;    // of a vector, on any machine

// Consecutive rows of the grid that lie between the same two rows of the map.
struct Gap {
  int32_t low, high;    // rows of the map
  int32_t first, last;  // rows of the grid
};

// How a map of h × w values is brought to a label grid: pixel x of a row is low + weight · (high − low) of two values of the row, and
// likewise for rows.
struct Grid {
  int32_t h, w, rows, columns;
  int32_t groups;          // of a row of the grid
  int32_t blocks;          // of a mask
  const Gap* gaps;
  int32_t gap_count;
  const float* y_weight;   // rows of the grid
  // Columns of the grid, as many as there are in all groups; the weight is nan beyond the last column, so that nothing there exceeds anything.
  const int32_t *x_low, *x_high;
  const float* x_weight;
  // The same for vectors of the kernel's width: a window of the row that holds everything a vector needs, and the places in it. No window
  // (null) where they would not fit, as when the grid is smaller than the map.
  const int32_t *window, *window_low, *window_high;
};

// Where one label is in one image.
struct LabelMask {
  int64_t label;
  const uint64_t* bits;  // null: everywhere
  int32_t first, last;   // the blocks that hold any
};

struct Image {
  const Grid* grid;
  const float* maps;  // (units, h, w)
  const LabelMask* labels;
  int64_t label_count;
  const int64_t* categories;  // those that some label of the image belongs to; the last entry stands for all images
  int64_t category_count;
};

// The counts that everything is added to.
struct Tally {
  int64_t *intersection, *activation;  // (units, labels), (units, columns)
  int64_t labels, columns;
  const float* thresholds;
};

struct OverlapKernels {
  int lanes;  // of a vector of floats; 0 where windows cannot be used
  // Sets the bits of every label of rows [row, rows) of a plane, in the mask that slot[label] numbers, and returns the row of the first label
  // that has none (below 0, or no label at all), or rows. To be called again from that row.
  int32_t (*paint)(const int32_t* plane, const Grid&, int32_t row, const int32_t* slot, int64_t labels, uint64_t* masks);
  int64_t (*count)(const uint64_t* bits, int64_t words);
  // Adds units [begin, end) of one image. scratch: scratch_floats(grid) floats and a mask, aligned to 64 bytes.
  void (*tally)(const Image&, const Tally&, int64_t begin, int64_t end, float* scratch, uint64_t* mask);
};

inline int64_t row_floats(const Grid& grid) { return int64_t(grid.groups) * GROUP; }
// Two rows of the grid, and one of the map with room for a window behind it.
inline int64_t scratch_floats(const Grid& grid) { return 2 * row_floats(grid) + (grid.w + 2 * MOST_LANES - 1) / MOST_LANES * MOST_LANES; }

extern const OverlapKernels overlap_baseline;
#if defined(__x86_64__)
extern const OverlapKernels overlap_avx2;
extern const OverlapKernels overlap_avx512;
extern const OverlapKernels overlap_avx512_popcount;
#endif

}  // namespace torchprobe::cpu
