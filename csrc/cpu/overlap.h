// What the operator (overlap.cpp) passes to its kernels (overlap_kernel.h), which are compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace torchprobe::cpu {

// Adds to a count of the caller's, which may be any number: beyond the end of int64 it goes on at the other end, as PyTorch's do.
inline void add(int64_t& count, int64_t more) { count = int64_t(uint64_t(count) + uint64_t(more)); }

// A mask over a label grid has one bit for each pixel. A row consists of groups of 16 pixels, with the first pixel in the lowest bit, and the
// rows follow each other. The bits after the last column are 0, and so are those between the last row and the next multiple of a block.
constexpr int GROUP = 16;       // pixels
constexpr int BLOCK = 8;        // words of 64 bits; a mask is a whole number of blocks
constexpr int MOST_LANES = 16;  // in a vector, on any machine

// Consecutive rows of the grid that lie between the same two rows of the map.
struct Gap {
  int32_t low, high;    // rows of the map
  int32_t first, last;  // rows of the grid
};

// The interpolation of a map of h × w values on a label grid. Pixel x of a row is low + weight · (high − low), where low and high are two values
// of the row. The same holds for rows.
struct Grid {
  int32_t h, w, rows, columns;
  int32_t groups;          // in a row of the grid
  int32_t blocks;          // in a mask
  const Gap* gaps;
  int32_t gap_count;
  const float* y_weight;   // for each row of the grid
  // For each column of the grid, up to the end of the last group. After the last column the weight is nan, so that nothing there is active.
  const int32_t *x_low, *x_high;
  const float* x_weight;
  // The same for vectors of the kernel's width: a window of the row that contains all the values of a vector, and their places in it. Null if
  // a window is too small for them, as when the grid is smaller than the map.
  const int32_t *window, *window_low, *window_high;
};

// The pixels of one label in one image.
struct LabelMask {
  int64_t label;
  const uint64_t* bits;  // null: every pixel
  int32_t first, last;   // range of the blocks that contain bits
};

struct Image {
  const Grid* grid;
  const float* maps;  // (units, h, w)
  const LabelMask* labels;
  int64_t label_count;
  const int64_t* categories;  // the categories of the image's labels; the last entry stands for all images
  int64_t category_count;
};

// The counts to which the images are added.
struct Tally {
  int64_t *intersection, *activation;  // (units, labels), (units, columns)
  int64_t labels, columns;
  const float* thresholds;
};

// The kernels for one instruction set.
struct OverlapKernels {
  int lanes;  // in a vector of floats; 0 if windows cannot be used
  // Sets the bits of every label in rows [row, rows) of a plane, in the mask with the number slot[label]. Stops at a label that has no mask
  // (slot[label] is negative, or there is no such label) and returns its row; otherwise returns rows. Call it again from that row.
  int32_t (*paint)(const int32_t* plane, const Grid&, int32_t row, const int32_t* slot, int64_t labels, uint64_t* masks);
  int64_t (*count)(const uint64_t* bits, int64_t words);
  // Adds units [begin, end) of one image. scratch has scratch_floats(grid) floats; mask is one mask; both are aligned to 64 bytes.
  void (*tally)(const Image&, const Tally&, int64_t begin, int64_t end, float* scratch, uint64_t* mask);

  static const OverlapKernels baseline;
#if defined(__x86_64__)
  static const OverlapKernels avx2, avx512, avx512_popcount;
#endif
};

inline int64_t row_floats(const Grid& grid) { return int64_t(grid.groups) * GROUP; }
// Two rows of the grid, and one of the map with room for a window after it.
inline int64_t scratch_floats(const Grid& grid) { return 2 * row_floats(grid) + (grid.w + 2 * MOST_LANES - 1) / MOST_LANES * MOST_LANES; }

}  // namespace torchprobe::cpu
