// torchprobe::observe_ on the CPU: checks, the plan of the work, threads, and the merge into the state. The schema is defined by
// torchprobe/ops/observe.py, which also says what everything means:
//
//   observe_(Tensor(a!) state, Tensor x, int feature_dim=-1, float outlier_sigma=6.0, int every=1, Tensor? mask=None) -> ()

#include "observe.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "layout.h"

namespace torchprobe::cpu {
namespace {

using torch::stable::Tensor;

// The widest instruction set this processor has; TORCHPROBE_ISA=baseline|avx2|avx512 asks for less.
const Kernels& choose_kernels() {
#if defined(__x86_64__)
  const char* asked = std::getenv("TORCHPROBE_ISA");
  const std::string limit = asked ? asked : "avx512";
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && limit == "avx512") return kernels_avx512;
  if (avx2 && limit != "baseline") return kernels_avx2;
#endif
  return kernels_baseline;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

// Memory that a thread keeps from call to call, unless it is much.
class Workspace {
 public:
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      data_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      STD_TORCH_CHECK(data_, "torchprobe: out of memory for a workspace of ", bytes, " bytes");
      size_ = bytes;
    }
    return data_.get();
  }
  void trim() {
    if (size_ > (size_t(8) << 20)) data_.reset(), size_ = 0;
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

// One lock a state, so that threads may share it; states that share a lock only wait for each other.
std::mutex& lock_of(const void* state) {
  static std::mutex locks[64];
  return locks[(reinterpret_cast<uintptr_t>(state) >> 6) % 64];
}

Dtype dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Double: return Dtype::Float64;
    case ScalarType::Float: return Dtype::Float32;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    case ScalarType::Half: return Dtype::Float16;
    default: STD_TORCH_CHECK(false, "observe_ reads float64, float32, bfloat16 and float16");
  }
}

Call describe(const Tensor& x, int64_t feature_dim, double outlier_sigma, const uint8_t* mask) {
  Call call{};
  call.x = x.const_data_ptr();
  call.dtype = dtype_of(x);
  call.features = x.size(feature_dim);
  call.feature_stride = x.stride(feature_dim);
  call.mask = mask;
  call.outlier_sigma = outlier_sigma;
  call.vectors = 1;
  for (int64_t d = 0; d < x.dim(); ++d) {
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
  const int64_t bytes = call.dtype == Dtype::Float64 ? 8 : 4, row = call.dims ? call.size[call.dims - 1] : 1;
  const bool contiguous = call.feature_stride == 1 || call.features == 1;
  call.side_by_side = !contiguous && !mask && call.dims && call.stride[call.dims - 1] == 1 && row >= 16;
  // As many vectors as stay in the second-level cache, beside what is fetched ahead.
  if (call.side_by_side) {
    const int64_t most = std::clamp<int64_t>((int64_t(512) << 10) / (call.features * bytes), 64, MAX_VECTORS), blocks = (row + most - 1) / most;
    call.tile_vectors = std::min<int64_t>(((row + blocks - 1) / blocks + 31) / 32 * 32, MAX_VECTORS);  // equal parts of a row
    call.tiles = call.vectors / row * ((row + call.tile_vectors - 1) / call.tile_vectors);
  } else {
    call.tile_vectors = std::clamp<int64_t>((int64_t(192) << 10) / (call.features * bytes), 8, MAX_ROWS);
    call.tiles = (call.vectors + call.tile_vectors - 1) / call.tile_vectors;
  }
  const bool direct = call.side_by_side || (contiguous && (call.dtype == Dtype::Float64 || call.dtype == Dtype::Float32));
  call.scratch_row = (call.features + 15) / 16 * 16 + 16;  // the last 16 keep rows off the same cache sets
  call.scratch_bytes = call.scratch_row * bytes * (2 + (direct ? 0 : call.tile_vectors));
  return call;
}

void observe_(Tensor state, Tensor x, int64_t feature_dim, double outlier_sigma, int64_t every, std::optional<Tensor> mask) {
  using torch::headeronly::ScalarType;
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(feature_dim >= -dims && feature_dim < dims, "feature_dim is outside the tensor");
  if (feature_dim < 0) feature_dim += dims;
  const int64_t features = x.size(feature_dim);
  STD_TORCH_CHECK(features > 0, "x has no features");
  STD_TORCH_CHECK(every >= 1, "every must be at least 1");
  STD_TORCH_CHECK(state.dim() == 1 && state.scalar_type() == ScalarType::Double && state.is_contiguous() && state.is_cpu() &&
                      state.numel() == layout::size(features),
                  "the state was not made for ", features, " features on the CPU");
  const uint8_t* keep = nullptr;
  if (mask) {
    bool fits = mask->scalar_type() == ScalarType::Bool && mask->dim() == dims - 1 && mask->is_cpu();
    for (int64_t d = 0; fits && d < dims - 1; ++d) fits = mask->size(d) == x.size(d + (d >= feature_dim));
    STD_TORCH_CHECK(fits, "mask must be bool, of the shape of x without its features");
    if (!mask->is_contiguous()) mask = torch::stable::contiguous(*mask);
    keep = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  const Call call = describe(x, feature_dim, outlier_sigma, keep);

  static thread_local Workspace partial_memory, scratch_memory;
  double* to = static_cast<double*>(state.mutable_data_ptr());
  std::unique_lock<std::mutex> hold(lock_of(to));
  const double calls = to[layout::CALLS]++;
  if (std::fmod(calls, double(every)) != 0 || call.vectors == 0) return;

  // The tiles are dealt out in chunks, each with a partial state of its own, merged in order: the same result for any number of threads.
  const int64_t slots = layout::size(features);
  int64_t chunks = std::clamp<int64_t>(call.tiles / 4, 1, std::clamp<int64_t>(call.tiles / 16, 16, 64));
  chunks = std::min(chunks, std::max<int64_t>(2, (int64_t(8) << 20) / slots));
  if (chunks == 1) {
    kernels().observe(call, 0, call.tiles, to, scratch_memory.reserve(size_t(call.scratch_bytes)));
  } else {
    hold.unlock();  // others may go on while the partial states are made
    double* partials = static_cast<double*>(partial_memory.reserve(size_t(chunks * slots) * sizeof(double)));
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      void* scratch = scratch_memory.reserve(size_t(call.scratch_bytes));  // of this thread
      for (int64_t c = begin; c < end; ++c) {
        std::memset(partials + c * slots, 0, size_t(slots) * sizeof(double));
        kernels().observe(call, c * call.tiles / chunks, (c + 1) * call.tiles / chunks, partials + c * slots, scratch);
      }
      scratch_memory.trim();
    });
    hold.lock();
    torch::stable::parallel_for(0, features, std::max<int64_t>(4096 / chunks, 64), [&](int64_t begin, int64_t end) {
      for (int64_t c = 0; c < chunks; ++c) kernels().merge(to, partials + c * slots, features, begin, end, begin == 0);
    });
  }
  scratch_memory.trim();
  partial_memory.trim();
}

}  // namespace

const char* instruction_set() { return kernels().name; }

}  // namespace torchprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(torchprobe, CPU, m) { m.impl("observe_", TORCH_BOX(&torchprobe::cpu::observe_)); }
