// What the operator (observe.cpp) hands to the kernels, which are compiled once per instruction set (observe_kernel.h).
#pragma once

#include <cstdint>

#include "call.h"

namespace torchprobe::cpu {

constexpr int MAX_ROWS = 64;      // vectors in a tile of rows
constexpr int MAX_VECTORS = 512;  // in any tile

// A call and its tiles, which are a function of it alone, so that no result depends on the number of threads.
struct Call : torchprobe::Call {
  bool side_by_side{};  // neighbouring vectors are contiguous, features are not: see observe_kernel.h
  int64_t tiles{}, tile_vectors{};
  int64_t scratch_bytes{}, scratch_row{};  // what a thread needs beside its partial state; elements from one packed row to the next
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
