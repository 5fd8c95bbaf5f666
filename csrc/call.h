// One call of observe_, described once. Plain C++: host and device compilers alike read it.
#pragma once

#include <cstdint>

namespace torchprobe {

enum class Dtype { Float64, Float32, BFloat16, Float16 };

constexpr int MAX_DIMS = 64;  // PyTorch's own limit

// A matrix of vectors × features, whose vectors are enumerated by the remaining dimensions of x.
struct Call {
  const void* x;
  Dtype dtype;
  int64_t features, feature_stride;
  int64_t vectors;
  int dims;  // of the positions, adjacent ones joined where memory allows; the last one runs fastest
  int64_t size[MAX_DIMS], stride[MAX_DIMS];
  const uint8_t* mask;  // one byte a vector, 0 = left out; null = all are in
  double outlier_sigma;
  int64_t every;
};

}  // namespace torchprobe
