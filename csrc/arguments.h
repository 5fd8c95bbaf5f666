// The arguments of the operators, checked and described; the same for every device. The error messages are short: the wrappers in
// torchprobe/ops give the same ones with names and numbers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <type_traits>

#include "call.h"
#include "layout.h"
#include "memory.h"

namespace torchprobe {

constexpr int64_t MOST_CALLS = int64_t(1) << 53;  // that a float64 counts

template <class T>
void check_kind(const torch::stable::Tensor& t, int64_t dims, const char* name) {
  using torch::headeronly::ScalarType;
  constexpr ScalarType type = std::is_same_v<T, double>    ? ScalarType::Double
                              : std::is_same_v<T, float>   ? ScalarType::Float
                              : std::is_same_v<T, int64_t> ? ScalarType::Long
                              : std::is_same_v<T, int32_t> ? ScalarType::Int
                                                           : ScalarType::Bool;
  static_assert(type != ScalarType::Bool || std::is_same_v<T, uint8_t>, "one byte for each bool");
  STD_TORCH_CHECK(t.scalar_type() == type && t.dim() == dims && t.is_cpu(), name, " has another type or number of dimensions than it should");
}

// A contiguous tensor, which may be the same one. A view that repeats its memory, such as an expanded one, may be too large to be copied.
inline torch::stable::Tensor in_order(const torch::stable::Tensor& t, const char* name) {
  if (t.is_contiguous()) return t;
  int64_t stored = 0;
  STD_TORCH_CHECK(aoti_torch_get_storage_size(t.get(), &stored) == AOTI_TORCH_SUCCESS, name, " has no storage of its own");
  const int64_t bytes = t.numel() * int64_t(t.element_size());
  STD_TORCH_CHECK(bytes <= std::max(stored, MOST_COPIED), name, " repeats its memory, and a copy would take ", bytes,
                  " bytes: pass fewer elements, or a contiguous tensor");
  return torch::stable::contiguous(t);
}

// The elements of a CPU tensor that is only read, in order. A tensor with other strides is replaced by a contiguous copy, which keeps the
// pointer valid.
template <class T>
const T* const_elements(torch::stable::Tensor& t, int64_t dims, const char* name, Memory& memory) {
  check_kind<T>(t, dims, name);
  memory.reads(t, name);
  t = in_order(t, name);
  return static_cast<const T*>(t.const_data_ptr());
}

// The elements of a contiguous CPU tensor that is written to.
template <class T>
T* mutable_elements(torch::stable::Tensor& t, int64_t dims, const char* name, Memory& memory) {
  check_kind<T>(t, dims, name);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  memory.writes(t, name);
  return static_cast<T*>(t.mutable_data_ptr());
}

// The positions of x: all its dimensions except the one of the features, in order. Adjacent dimensions are joined where memory allows. Writes
// the joined dimensions to dims, size and stride, which have room for MAX_DIMS, and returns the number of positions.
inline int64_t join_positions(const Shape& x, int64_t feature_dim, int& dims, int64_t* size, int64_t* stride) {
  int64_t positions = 1;
  dims = 0;
  for (int64_t d = 0; d < x.dims; ++d) {
    const int64_t size_d = x.sizes[d], stride_d = x.strides[d];
    if (d == feature_dim || size_d == 1) continue;
    positions *= size_d;
    const int last = dims - 1;
    if (dims && stride[last] == size_d * stride_d) {  // steps of the outer dimension continue the inner one
      size[last] *= size_d;
      stride[last] = stride_d;
    } else {
      STD_TORCH_CHECK(dims < MAX_DIMS, "x has more than ", MAX_DIMS, " dimensions");
      size[dims] = size_d;
      stride[dims++] = stride_d;
    }
  }
  return positions;
}

inline Dtype dtype_of(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Double: return Dtype::Float64;
    case ScalarType::Float: return Dtype::Float32;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    case ScalarType::Half: return Dtype::Float16;
    default: STD_TORCH_CHECK(false, "x must be float64, float32, bfloat16 or float16");
  }
}

// The arguments of observe_. Raises if they do not fit together. The call points into the mask, which is made contiguous.
inline Call describe(const torch::stable::Tensor& state, const torch::stable::Tensor& x, int64_t feature_dim, double outlier_sigma,
                     int64_t every, std::optional<torch::stable::Tensor>& mask) {
  using torch::headeronly::ScalarType;
  const Shape shape(x);
  const int64_t dims = shape.dims;
  const auto device = x.device();
  STD_TORCH_CHECK(feature_dim >= -dims && feature_dim < dims, "feature_dim is outside the tensor");
  if (feature_dim < 0) feature_dim += dims;

  Call call{};
  call.dtype = dtype_of(x);
  call.features = shape.sizes[feature_dim];
  call.feature_stride = shape.strides[feature_dim];
  call.outlier_sigma = outlier_sigma;
  call.every = every;
  STD_TORCH_CHECK(call.features > 0, "x has no features");
  STD_TORCH_CHECK(every >= 1 && every <= MOST_CALLS, "every must be at least 1, and at most 2^53");
  STD_TORCH_CHECK(outlier_sigma > 0, "outlier_sigma must be positive");
  const int64_t slots = state.numel();
  STD_TORCH_CHECK(state.dim() == 1 && state.scalar_type() == ScalarType::Double && state.is_contiguous() && state.device() == device &&
                      slots == layout::size(call.features),
                  "the state was not made for ", call.features, " features on the device of x");
  call.vectors = join_positions(shape, feature_dim, call.dims, call.size, call.stride);
  call.x = x.const_data_ptr();
  Memory memory;
  memory.add(state, "state", true, state.const_data_ptr(), slots, slots - 1, sizeof(double));
  memory.add(x, "x", false, call.x, x.numel(), call.vectors ? shape.last() : 0, element_size(call.dtype));
  if (mask) {
    bool fits = mask->scalar_type() == ScalarType::Bool && mask->dim() == dims - 1 && mask->device() == device;
    for (int64_t d = 0; fits && d < dims - 1; ++d) fits = mask->size(d) == shape.sizes[d + (d >= feature_dim)];
    STD_TORCH_CHECK(fits, "mask must be bool, of the shape of x without its features, on its device");
    memory.reads(*mask, "mask");
    mask = in_order(*mask, "mask");
    call.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  return call;
}

}  // namespace torchprobe
