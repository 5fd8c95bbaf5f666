// The memory that the arguments of one call reach, checked before anything is read: the same for every device. A tensor may lie about its
// memory: its storage may have been freed or shortened (`resize_`), and two arguments may share it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace torchprobe {

constexpr int64_t MOST_ELEMENTS = int64_t(1) << 36;  // in one argument; torchprobe/ops/memory.py has the same number
constexpr int64_t MOST_COPIED = int64_t(1) << 26;    // bytes of a copy that is larger than the memory it is made of

// Sizes and strides. They belong to the tensor, which must stay alive.
struct Shape {
  int64_t dims = 0, *sizes = nullptr, *strides = nullptr;

  explicit Shape(const torch::stable::Tensor& t) {
    STD_TORCH_CHECK(aoti_torch_get_dim(t.get(), &dims) == AOTI_TORCH_SUCCESS && aoti_torch_get_sizes(t.get(), &sizes) == AOTI_TORCH_SUCCESS &&
                        aoti_torch_get_strides(t.get(), &strides) == AOTI_TORCH_SUCCESS,
                    "a tensor has no sizes or strides");
  }
  // How far the last element is from the first one; MOST_ELEMENTS or more if that cannot be. Not for a tensor without elements.
  int64_t last() const {
    constexpr int64_t FARTHEST = int64_t(1) << 62;
    int64_t last = 0;
    for (int64_t d = 0; d < dims; ++d) {  // strides are never negative
      if (sizes[d] == 1) continue;
      if (strides[d] > (FARTHEST - last) / (sizes[d] - 1)) return FARTHEST;
      last += (sizes[d] - 1) * strides[d];
    }
    return last;
  }
};

class Memory {
 public:
  // Raises unless all elements of the tensor are in its storage, and nothing that is written shares memory with another argument.
  void reads(const torch::stable::Tensor& t, const char* name) { add(t, name, false); }
  void writes(const torch::stable::Tensor& t, const char* name) { add(t, name, true); }

  // The same for a tensor of which this is known already: there are calls where every nanosecond counts.
  void add(const torch::stable::Tensor& t, const char* name, bool written, const void* data, int64_t elements, int64_t last, int64_t size) {
    if (elements == 0) return;
    int64_t bytes = 0, offset = 0;
    STD_TORCH_CHECK(elements > 0 && elements <= MOST_ELEMENTS, name, " has more than 2^36 elements");
    STD_TORCH_CHECK(aoti_torch_get_storage_size(t.get(), &bytes) == AOTI_TORCH_SUCCESS &&
                        aoti_torch_get_storage_offset(t.get(), &offset) == AOTI_TORCH_SUCCESS,
                    name, " has no storage of its own");
    STD_TORCH_CHECK(data && offset >= 0 && last < bytes / size - offset, name, " reaches beyond its storage of ", bytes,
                    " bytes: it was freed or shortened, as FSDP and resize_ do");
    const char* begin = static_cast<const char*>(data);
    const Range added{name, begin, begin + (last + 1) * size, written};
    for (int i = 0; i < count_; ++i) {
      const Range& other = ranges_[i];
      if (!written && !other.written) continue;
      STD_TORCH_CHECK(added.end <= other.begin || other.end <= added.begin, written ? name : other.name,
                      " is written to and shares memory with ", written ? other.name : name, ": pass a clone of one of them");
    }
    ranges_[count_++] = added;
  }

 private:
  struct Range {
    const char *name, *begin, *end;
    bool written;
  };
  Range ranges_[16];
  int count_ = 0;

  void add(const torch::stable::Tensor& t, const char* name, bool written) {
    const int64_t elements = t.numel();
    if (elements) add(t, name, written, t.const_data_ptr(), elements, Shape(t).last(), int64_t(t.element_size()));
  }
};

}  // namespace torchprobe
