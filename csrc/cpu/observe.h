// What the operator (observe.cpp) passes to its kernels (observe_kernel.h), which are compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "call.h"

namespace torchprobe::cpu {

constexpr int MAX_ROWS = 64;      // vectors in a tile of rows
constexpr int MAX_VECTORS = 512;  // vectors in any tile

// A call and its tiles. The tiles depend on the call alone, so no result depends on the number of threads.
struct Call : torchprobe::Call {
  bool side_by_side{};  // neighboring vectors are contiguous and features are not: see observe_kernel.h
  int64_t tiles{}, tile_vectors{};
  int64_t scratch_bytes{};  // memory that a thread needs in addition to its partial state
  int64_t scratch_row{};    // elements from one row to the next in a tile that was copied
};

// The kernels for one instruction set. `partial` is a state (layout.h); they do not touch its slot CALLS.
struct ObserveKernels {
  const char* name;  // of the instruction set
  void (*observe)(const Call&, int64_t first_tile, int64_t last_tile, double* partial, void* scratch);
  // state += partial for features [begin, end), and for the header if `header`.
  void (*merge)(double* state, const double* partial, int64_t features, int64_t begin, int64_t end, bool header);

  static const ObserveKernels baseline;
#if defined(__x86_64__)
  static const ObserveKernels avx2, avx512;
  static constexpr const ObserveKernels& avx512_popcount = avx512;
#endif
};

}  // namespace torchprobe::cpu
