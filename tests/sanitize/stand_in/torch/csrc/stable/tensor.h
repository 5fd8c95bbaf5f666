// What csrc uses of PyTorch's stable ABI, in plain C++ that the sanitizers see through: storages that end where they end, and threads of the
// standard library. The operators in csrc/cpu are compiled against it word for word.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace stand_in {

struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Refused(text.str());
}

}  // namespace stand_in

#define STD_TORCH_CHECK(condition, ...) \
  do {                                  \
    if (!(condition)) ::stand_in::refuse(__VA_ARGS__); \
  } while (0)

namespace torch::headeronly {
enum class ScalarType { Double, Float, BFloat16, Half, Long, Int, Bool };
}

namespace stand_in {

inline int64_t size_of(torch::headeronly::ScalarType type) {
  constexpr int64_t bytes[] = {8, 4, 2, 2, 8, 4, 1};
  return bytes[int(type)];
}

// Memory of exactly so many bytes: the byte after the last one belongs to nobody.
struct Storage {
  char* data = nullptr;
  int64_t bytes;

  explicit Storage(int64_t bytes) : bytes(bytes) {
    void* memory = nullptr;
    if (bytes && posix_memalign(&memory, 64, size_t(bytes))) throw std::bad_alloc();
    data = static_cast<char*>(memory);
  }
  ~Storage() { std::free(data); }
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
};

struct TensorData {
  torch::headeronly::ScalarType type;
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0;
  std::shared_ptr<Storage> storage;
};

struct Device {
  bool operator==(const Device&) const { return true; }
  bool operator!=(const Device&) const { return false; }
};

}  // namespace stand_in

using AtenTensorHandle = stand_in::TensorData*;
using AOTITorchError = int32_t;
constexpr AOTITorchError AOTI_TORCH_SUCCESS = 0;

inline AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* dims) { return *dims = int64_t(t->sizes.size()), AOTI_TORCH_SUCCESS; }
inline AOTITorchError aoti_torch_get_sizes(AtenTensorHandle t, int64_t** sizes) { return *sizes = t->sizes.data(), AOTI_TORCH_SUCCESS; }
inline AOTITorchError aoti_torch_get_strides(AtenTensorHandle t, int64_t** strides) { return *strides = t->strides.data(), AOTI_TORCH_SUCCESS; }
inline AOTITorchError aoti_torch_get_storage_offset(AtenTensorHandle t, int64_t* offset) { return *offset = t->offset, AOTI_TORCH_SUCCESS; }
inline AOTITorchError aoti_torch_get_storage_size(AtenTensorHandle t, int64_t* bytes) { return *bytes = t->storage->bytes, AOTI_TORCH_SUCCESS; }

namespace torch::stable {

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(std::shared_ptr<stand_in::TensorData> data) : data_(std::move(data)) {}

  AtenTensorHandle get() const { return data_.get(); }
  headeronly::ScalarType scalar_type() const { return data_->type; }
  int64_t dim() const { return int64_t(data_->sizes.size()); }
  int64_t size(int64_t d) const { return data_->sizes.at(size_t(d < 0 ? d + dim() : d)); }
  int64_t stride(int64_t d) const { return data_->strides.at(size_t(d < 0 ? d + dim() : d)); }
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : data_->sizes) n *= size;
    return n;
  }
  size_t element_size() const { return size_t(stand_in::size_of(data_->type)); }
  bool is_contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int64_t d = dim() - 1; d >= 0; --d) {
      if (size(d) != 1 && stride(d) != expected) return false;
      expected *= size(d);
    }
    return true;
  }
  bool is_cpu() const { return true; }
  bool is_cuda() const { return false; }
  stand_in::Device device() const { return {}; }
  void* mutable_data_ptr() const {
    return numel() && data_->storage->data ? data_->storage->data + data_->offset * stand_in::size_of(data_->type) : nullptr;
  }
  const void* const_data_ptr() const { return mutable_data_ptr(); }
  void* data_ptr() const { return mutable_data_ptr(); }

 private:
  std::shared_ptr<stand_in::TensorData> data_;
};

}  // namespace torch::stable
