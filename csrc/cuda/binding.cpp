// torchprobe::observe_ on CUDA: device, stream and workspace are PyTorch's own; the work is that of plan.cpp. The schema is defined by
// torchprobe/ops/observe.py.
//
// The CUDA runtime is linked in statically, so that the module loads beside a PyTorch of any CUDA version. It shares the driver's primary
// context, and with it memory and streams, with the runtime that PyTorch uses; only what "the current device" is, each keeps for itself.

#include <memory>
#include <mutex>

#include "arguments.h"
#include "device.h"
#include "states.h"

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

void observe_(Tensor state, Tensor x, int64_t feature_dim, double outlier_sigma, int64_t every, std::optional<Tensor> mask) {
  const Call described = describe(state, x, feature_dim, outlier_sigma, every, mask);
  const int device = x.get_device_index();
  const Support& here = support(device);
  if (!here.obstacle.empty()) {  // the operator in plain PyTorch, which also warns once about why
    using torch::stable::detail::from;
    std::array<StableIValue, 6> stack{from(state), from(x), from(feature_dim), from(outlier_sigma), from(every), from(mask)};
    const std::lock_guard<std::mutex> hold(turn());
    return call("torchprobe::observe_reference_", "", stack);
  }

  const Current current(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, "torchprobe: no stream on cuda:", device);
  Plan plan = make_plan(described, here.device);
  const auto workspace = allocate(place(plan, nullptr), device);
  place(plan, workspace.get());
  plan.state = static_cast<double*>(state.mutable_data_ptr());
  const std::lock_guard<std::mutex> hold(turn());
  check(observe(plan, here.device, static_cast<cudaStream_t>(stream)), device);
}

}  // namespace
}  // namespace torchprobe::cuda

STABLE_TORCH_LIBRARY_IMPL(torchprobe, CUDA, m) {
  m.impl("observe_", TORCH_BOX(&torchprobe::cuda::observe_));
  m.impl("observe_read", TORCH_BOX(&torchprobe::cuda::observe_read));
  m.impl("observe_take_", TORCH_BOX(&torchprobe::cuda::observe_take_));
  m.impl("observe_merge_", TORCH_BOX(&torchprobe::cuda::observe_merge_));
  m.impl("observe_write_", TORCH_BOX(&torchprobe::cuda::observe_write_));
}
