// torchprobe::observe_ on CUDA: device, stream and workspace are PyTorch's own; the work is observe.cu's. The schema is defined by
// torchprobe/ops/observe.py.
//
// The CUDA runtime is linked in statically, so that the module loads beside a PyTorch of any CUDA version. It shares the driver's primary
// context, and with it memory and streams, with the runtime that PyTorch uses; only what "the current device" is, each keeps for itself.

#include <array>
#include <memory>
#include <mutex>

#include "arguments.h"
#include "device.h"

namespace torchprobe::cuda {
namespace {

using torch::stable::Tensor;

// Memory of PyTorch's caching allocator, in the order of the current stream; during a capture it belongs to the graph.
struct Release {
  void operator()(void* memory) const { aoti_torch_cuda_caching_allocator_raw_delete(memory); }
};
std::unique_ptr<void, Release> allocate(size_t bytes, int device) {
  void* memory = nullptr;
  STD_TORCH_CHECK(aoti_torch_cuda_caching_allocator_raw_alloc(bytes, &memory) == AOTI_TORCH_SUCCESS, "torchprobe: no memory for ", bytes,
                  " bytes of workspace on cuda:", device);
  return std::unique_ptr<void, Release>(memory);
}

// The operator in plain PyTorch, which also warns once about why.
void observe_reference_(const Tensor& state, const Tensor& x, int64_t feature_dim, double outlier_sigma, int64_t every,
                        const std::optional<Tensor>& mask) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(state), from(x), from(feature_dim), from(outlier_sigma), from(every), from(mask)};
  STD_TORCH_CHECK(torch_call_dispatcher("torchprobe::observe_reference_", "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  "torchprobe: the PyTorch reference of observe_ failed; what stopped it is printed above");
}

// Whether a call counts is decided by its first launch and noted by its second: threads that share a state must not come in between.
std::mutex& turn() {
  static std::mutex* forever = new std::mutex;  // other threads may still call while the process ends
  return *forever;
}

void observe_(Tensor state, Tensor x, int64_t feature_dim, double outlier_sigma, int64_t every, std::optional<Tensor> mask) {
  const Call call = describe(state, x, feature_dim, outlier_sigma, every, mask);
  const int device = x.get_device_index();
  const Support& here = support(device);
  if (!here.obstacle.empty()) return observe_reference_(state, x, feature_dim, outlier_sigma, every, mask);

  const Current current(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, "torchprobe: no stream on cuda:", device);
  const auto workspace = allocate(workspace_bytes(call, here.device), device);
  const std::lock_guard<std::mutex> hold(turn());
  check(observe(call, here.device, static_cast<double*>(state.mutable_data_ptr()), workspace.get(), static_cast<cudaStream_t>(stream)), device);
}

}  // namespace
}  // namespace torchprobe::cuda

STABLE_TORCH_LIBRARY_IMPL(torchprobe, CUDA, m) { m.impl("observe_", TORCH_BOX(&torchprobe::cuda::observe_)); }
