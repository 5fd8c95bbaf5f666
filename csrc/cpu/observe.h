// What the operator (observe.cpp) hands to the kernels, which are compiled once per instruction set (observe_kernel.h).
#pragma once

#include <cstdint>

namespace torchprobe::cpu {

enum class Dtype { Float64, Float32, BFloat16, Float16 };

constexpr int MAX_ROWS = 64;      // vectors in a tile of rows
constexpr int MAX_VECTORS = 512;  // in any tile
constexpr int MAX_DIMS = 64;      // PyTorch's own limit

// One call, described once: a matrix of vectors × features, whose vectors are enumerated by the remaining dimensions of x.
struct Call {
  const void* x;
  Dtype dtype;
  int64_t features, feature_stride;
  int64_t vectors;
  int dims;  // of the positions, adjacent ones joined where memory allows; the last one runs fastest
  int64_t size[MAX_DIMS], stride[MAX_DIMS];
  const uint8_t* mask;  // one byte a vector, 0 = left out; null = all are in
  double outlier_sigma;
  // The tiles are a function of the call alone, so that no result depends on the number of threads.
  bool side_by_side;  // neighbouring vectors are contiguous, features are not: see observe_kernel.h
  int64_t tiles, tile_vectors;
  int64_t scratch_bytes, scratch_row;  // what a thread needs beside its partial state; elements from one packed row to the next
};

// One set of kernels. `partial` is a state (layout.h); slot CALLS is not touched.
struct Kernels {
  const char* name;
  void (*observe)(const Call&, int64_t first_tile, int64_t last_tile, double* partial, void* scratch);
  // state += partial for features [begin, end); the header comes with `header`.
  void (*merge)(double* state, const double* partial, int64_t features, int64_t begin, int64_t end, bool header);
};

const char* instruction_set();  // the one that was chosen on this machine

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace torchprobe::cpu
