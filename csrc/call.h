// The description of one call of observe_. Plain C++, for host and device compilers.
#pragma once

#include <cstdint>

namespace torchprobe {

enum class Dtype { Float64, Float32, BFloat16, Float16 };

constexpr int64_t element_size(Dtype dtype) { return dtype == Dtype::Float64 ? 8 : dtype == Dtype::Float32 ? 4 : 2; }

constexpr int MAX_DIMS = 64;  // PyTorch's own limit

// x as a matrix of vectors × features. The other dimensions of x, its positions, number the vectors.
struct Call {
  const void* x;
  Dtype dtype;
  int64_t features, feature_stride;
  int64_t vectors;
  int dims;  // of the positions, after adjacent ones were joined; the last one runs fastest
  int64_t size[MAX_DIMS], stride[MAX_DIMS];
  const uint8_t* mask;  // one byte for each vector, 0 = left out; null = no vector is left out
  double outlier_sigma;
  int64_t every;
};

}  // namespace torchprobe
