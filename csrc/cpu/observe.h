// What the operator (observe.cpp) passes to its kernels (observe_kernel.h), which are compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "call.h"

namespace torchprobe::cpu {

constexpr int MAX_ROWS = 256;     // vectors in a tile of rows
constexpr int STRIP_ROWS = 64;    // vectors in a strip of it, at most
constexpr int MAX_VECTORS = 512;  // vectors in any tile
constexpr int MAX_LANES = 16;     // elements in a register of any instruction set
constexpr int SUMS = 6;           // numbers that are kept of each vector and block: Vectors in observe_vectors.h
constexpr int FEATURE_SUMS = 11;  // numbers that are kept of each feature of a tile: Features in observe_features.h

// A call, its tiles of vectors and its blocks of features. They depend on the call alone, so no result depends on the number of threads.
struct Call : torchprobe::Call {
  bool side_by_side{};  // neighboring vectors are contiguous and features are not: see observe_kernel.h
  bool by_blocks{};     // threads share the blocks of features, not the tiles: see observe.cpp
  int64_t tiles{}, tile_vectors{};
  int64_t blocks{}, block{};  // features of a block; the last one may have fewer
  int64_t strip{};            // vectors of a tile of rows that are in the cache at the same time
  int64_t element{};          // bytes of a number in the arithmetic
  double inverse_features{};

  // Memory that a thread needs in addition to its partial state; where its parts begin, in elements.
  struct {
    int64_t vector, lone_sums, scales, sums, features, packed, end;
  } scratch{};

  int64_t block_begin(int64_t b) const { return b * block; }
  int64_t block_size(int64_t b) const { return features - b * block < block ? features - b * block : block; }
};

// Enumerates the positions of a call along its first `dims` dimensions, in order; offset is in elements.
struct Cursor {
  const Call& call;
  const int dims;
  int64_t index[MAX_DIMS], offset = 0;

  Cursor(const Call& call, int64_t vector, int dims) : call(call), dims(dims) {
    for (int d = dims - 1; d >= 0; --d) {
      index[d] = vector % call.size[d];
      vector /= call.size[d];
      offset += index[d] * call.stride[d];
    }
  }
  void next() {
    for (int d = dims - 1; d >= 0; --d) {
      offset += call.stride[d];
      if (++index[d] < call.size[d]) return;
      offset -= index[d] * call.stride[d];
      index[d] = 0;
    }
  }
};

// The order of the n vectors of a tile of rows: a strip has runs of neighbors from all parts of the tile, since samples of the first one stand for all.
inline void spread(const Call& call, int64_t* offset, int n) {
  constexpr int NEIGHBORS = 16;  // what the processor prefetches after them is then of use
  const int strips = int((n + call.strip - 1) / call.strip);
  if (strips < 2) return;
  int64_t sorted[MAX_ROWS];
  std::memcpy(sorted, offset, n * sizeof *offset);
  for (int q = 0; q < strips; ++q)
    for (int k = 0; k * strips * NEIGHBORS < n; ++k) {
      const int begin = (k * strips + (q + k) % strips) * NEIGHBORS;  // not always the same part, since maps often repeat after 32 or 64 vectors
      for (int r = begin; r < n && r < begin + NEIGHBORS; ++r) *offset++ = sorted[r];
    }
}

// What is known of some vectors: arrays with one number for each.
struct Outcome {
  double* kurtosis;                 // 0: the vector is constant; nan: an element is not finite
  double *scale, *mean, *variance;  // mean and variance of (x − shift)·scale, with the shift of the first block

  Outcome(double* memory, int64_t room) : kurtosis(memory), scale(memory + room), mean(memory + 2 * room), variance(memory + 3 * room) {}
};

// Some tiles of a call whose vectors wait until all blocks have been seen; only if by_blocks.
struct Band {
  int64_t vectors = 0, tiles = 0;
  int64_t* offset;    // of each vector that is not masked out, in elements
  int64_t* tile;      // the first vector of each tile, and in the end the number of vectors
  void* sums;         // of each block and vector
  const int64_t room;  // vectors, a multiple of MAX_LANES
  Outcome outcome;
  void* scales;      // the last suitable scale of each feature
  double scale = 1;  // the last suitable one of vectors
  bool first = true;  // nothing is known of the scales yet

  Band(double* outcome, int64_t room) : room(room), outcome(outcome, room) {}
};

// The kernels for one instruction set. `partial` is a state (layout.h); they do not touch its slot CALLS.
struct ObserveKernels {
  const char* name;  // of the instruction set
  void (*observe)(const Call&, int64_t first_tile, int64_t last_tile, double* partial, void* scratch);
  // state += partial for features [begin, end), and for the header if `header`.
  void (*merge)(double* state, const double* partial, int64_t features, int64_t begin, int64_t end, bool header);

  // Instead of observe, if by_blocks, in this order. The first guess of the scale of vectors, from one that begins at `offset`:
  double (*first_scale)(const Call&, int64_t offset);
  // the moments of features, and the sums of vectors, over some blocks;
  void (*sum_band)(const Call&, const Band&, int64_t first_block, int64_t last_block, double* state, void* scratch);
  // the outcome for vectors [begin, end), which are multiples of MAX_LANES, except for the last end; returns a suitable scale;
  double (*finish_band)(const Call&, const Band&, int64_t begin, int64_t end, void* scratch);
  // the outliers in some blocks;
  void (*count_band)(const Call&, const Band&, int64_t first_block, int64_t last_block, double* state);
  // the header.
  void (*record)(const Outcome&, int64_t vectors, double* state);

  static const ObserveKernels baseline;
#if defined(__x86_64__)
  static const ObserveKernels avx2, avx512;
  static constexpr const ObserveKernels& avx512_popcount = avx512;
#endif
};

}  // namespace torchprobe::cpu
