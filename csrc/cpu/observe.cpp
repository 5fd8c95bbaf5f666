// torchprobe::observe_ on the CPU: tiles, threads, and the merge into the state. torchprobe/ops/observe.py defines the schema and explains it:
//
//   observe_(Tensor(a!) state, Tensor x, int feature_dim=-1, float outlier_sigma=6.0, int every=1, Tensor? mask=None) -> ()

#include "observe.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

#include "arguments.h"
#include "isa.h"

namespace torchprobe::cpu {
namespace {

using torch::stable::Tensor;

// Memory that a thread keeps from call to call, unless it is large.
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

// Threads may share a state, so each state has a lock. Several states may have the same lock: then one call waits for another.
std::mutex& lock_of(const void* state) {
  static std::mutex locks[64];
  return locks[(reinterpret_cast<uintptr_t>(state) >> 6) % 64];
}

Call plan_tiles(const torchprobe::Call& described) {
  Call call{described};
  const int64_t bytes = call.dtype == Dtype::Float64 ? 8 : 4, row = call.dims ? call.size[call.dims - 1] : 1;
  const bool contiguous = call.feature_stride == 1 || call.features == 1;
  call.side_by_side = !contiguous && !call.mask && call.dims && call.stride[call.dims - 1] == 1 && row >= 16;
  // As many vectors as fit in the second-level cache, next to those that are prefetched.
  if (call.side_by_side) {
    const int64_t most = std::clamp<int64_t>((int64_t(512) << 10) / (call.features * bytes), 64, MAX_VECTORS), blocks = (row + most - 1) / most;
    call.tile_vectors = std::min<int64_t>(((row + blocks - 1) / blocks + 31) / 32 * 32, MAX_VECTORS);  // equal parts of a row
    call.tiles = call.vectors / row * ((row + call.tile_vectors - 1) / call.tile_vectors);
  } else {
    call.tile_vectors = std::clamp<int64_t>((int64_t(192) << 10) / (call.features * bytes), 8, MAX_ROWS);
    call.tiles = (call.vectors + call.tile_vectors - 1) / call.tile_vectors;
  }
  const bool direct = call.side_by_side || (contiguous && (call.dtype == Dtype::Float64 || call.dtype == Dtype::Float32));
  call.scratch_row = (call.features + 15) / 16 * 16 + 16;  // the last 16 keep rows out of the same cache sets
  call.scratch_bytes = call.scratch_row * bytes * (2 + (direct ? 0 : call.tile_vectors));
  return call;
}

void observe_(Tensor state, Tensor x, int64_t feature_dim, double outlier_sigma, int64_t every, std::optional<Tensor> mask) {
  const Call call = plan_tiles(describe(state, x, feature_dim, outlier_sigma, every, mask));
  const ObserveKernels& kernels = choose<ObserveKernels>();

  static thread_local Workspace partial_memory, scratch_memory;
  double* to = static_cast<double*>(state.mutable_data_ptr());
  std::unique_lock<std::mutex> hold(lock_of(to));
  const double calls = to[layout::CALLS]++;
  if (std::fmod(calls, double(every)) != 0 || call.vectors == 0) return;

  // The tiles are divided into chunks. Each chunk has a partial state, and these are merged in order: the result is the same for any number of
  // threads.
  const int64_t features = call.features, slots = layout::size(features);
  int64_t chunks = std::clamp<int64_t>(call.tiles / 4, 1, std::clamp<int64_t>(call.tiles / 16, 16, 64));
  chunks = std::min(chunks, std::max<int64_t>(2, (int64_t(8) << 20) / slots));
  if (chunks == 1) {
    kernels.observe(call, 0, call.tiles, to, scratch_memory.reserve(size_t(call.scratch_bytes)));
  } else {
    hold.unlock();  // other calls may use the state while the partial states are computed
    double* partials = static_cast<double*>(partial_memory.reserve(size_t(chunks * slots) * sizeof(double)));
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      void* scratch = scratch_memory.reserve(size_t(call.scratch_bytes));  // of this thread
      for (int64_t c = begin; c < end; ++c) {
        std::memset(partials + c * slots, 0, size_t(slots) * sizeof(double));
        kernels.observe(call, c * call.tiles / chunks, (c + 1) * call.tiles / chunks, partials + c * slots, scratch);
      }
      scratch_memory.trim();
    });
    hold.lock();
    torch::stable::parallel_for(0, features, std::max<int64_t>(4096 / chunks, 64), [&](int64_t begin, int64_t end) {
      for (int64_t c = 0; c < chunks; ++c) kernels.merge(to, partials + c * slots, features, begin, end, begin == 0);
    });
  }
  scratch_memory.trim();
  partial_memory.trim();
}

}  // namespace
}  // namespace torchprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(torchprobe, CPU, m) { m.impl("observe_", TORCH_BOX(&torchprobe::cpu::observe_)); }
