// The arguments of observe_, checked and described; the same for every device. The refusals are short: torchprobe/ops/observe.py says the same
// with the numbers in it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "call.h"
#include "layout.h"

namespace torchprobe {

inline Dtype dtype_of(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Double: return Dtype::Float64;
    case ScalarType::Float: return Dtype::Float32;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    case ScalarType::Half: return Dtype::Float16;
    default: STD_TORCH_CHECK(false, "observe_ reads float64, float32, bfloat16 and float16");
  }
}

// Refuses what does not fit together. Makes a mask contiguous, and lends its memory to the call.
inline Call describe(const torch::stable::Tensor& state, const torch::stable::Tensor& x, int64_t feature_dim, double outlier_sigma,
                     int64_t every, std::optional<torch::stable::Tensor>& mask) {
  using torch::headeronly::ScalarType;
  const int64_t dims = x.dim();
  const auto device = x.device();
  STD_TORCH_CHECK(feature_dim >= -dims && feature_dim < dims, "feature_dim is outside the tensor");
  if (feature_dim < 0) feature_dim += dims;

  Call call{};
  call.x = x.const_data_ptr();
  call.dtype = dtype_of(x);
  call.features = x.size(feature_dim);
  call.feature_stride = x.stride(feature_dim);
  call.outlier_sigma = outlier_sigma;
  call.every = every;
  call.vectors = 1;
  STD_TORCH_CHECK(call.features > 0, "x has no features");
  STD_TORCH_CHECK(every >= 1, "every must be at least 1");
  STD_TORCH_CHECK(state.dim() == 1 && state.scalar_type() == ScalarType::Double && state.is_contiguous() && state.device() == device &&
                      state.numel() == layout::size(call.features),
                  "the state was not made for ", call.features, " features on the device of x");
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t size = x.size(d), stride = x.stride(d);
    if (d == feature_dim || size == 1) continue;
    call.vectors *= size;
    const int last = call.dims - 1;
    if (call.dims && call.stride[last] == size * stride) {  // steps of the outer dimension continue the inner one
      call.size[last] *= size;
      call.stride[last] = stride;
    } else {
      call.size[call.dims] = size;
      call.stride[call.dims++] = stride;
    }
  }
  if (mask) {
    bool fits = mask->scalar_type() == ScalarType::Bool && mask->dim() == dims - 1 && mask->device() == device;
    for (int64_t d = 0; fits && d < dims - 1; ++d) fits = mask->size(d) == x.size(d + (d >= feature_dim));
    STD_TORCH_CHECK(fits, "mask must be bool, of the shape of x without its features, on its device");
    if (!mask->is_contiguous()) mask = torch::stable::contiguous(*mask);
    call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  return call;
}

}  // namespace torchprobe
