// csrc/cuda compiled for the host: the launch plan, the launches and the kernels, word for word, behind an operator with the arguments of
// observe_ and those of the execution model. The test compiles it as a library of operators; SHIM is their namespace.

#include "cuda_runtime.h"

namespace torchprobe::cuda {
template <class = void>
cudaError_t launch_on_host(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes);
}
inline cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, cudaStream_t) {
  return torchprobe::cuda::launch_on_host<>(kernel, grid, block, arguments, shared_bytes);
}

#include "cuda/plan.cpp"
#include "cuda/kernels.cuh"
#include "cuda/observe_bfloat16.cu"
#include "cuda/observe_float16.cu"
#include "cuda/observe_float32.cu"
#include "cuda/observe_float64.cu"

#include "arguments.h"

template <class>
cudaError_t torchprobe::cuda::launch_on_host(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
  return shim::launch(reinterpret_cast<Kernel>(const_cast<void*>(kernel)), grid, block, *static_cast<Plan*>(arguments[0]), shared_bytes);
}

namespace {

using torch::stable::Tensor;

void observe_(Tensor state, Tensor x, int64_t feature_dim, double outlier_sigma, int64_t every, std::optional<Tensor> mask,
              int64_t multiprocessors, int64_t shared_bytes, int64_t order) {
  const torchprobe::Call call = torchprobe::describe(state, x, feature_dim, outlier_sigma, every, mask);
  static int devices = 0;  // every call is on another one, which nobody has asked for shared memory
  const torchprobe::cuda::Device device{devices++, int(multiprocessors), int(shared_bytes)};
  torchprobe::cuda::Plan plan = torchprobe::cuda::make_plan(call, device);
  const size_t bytes = torchprobe::cuda::place(plan, nullptr), guard = 4096;
  std::vector<unsigned char> workspace(bytes + guard, shim::POISON);
  shim::machine.order = unsigned(order);
  shim::machine.random.seed(unsigned(order));
  shim_most_shared.clear();  // as in a new process
  shim::races::clear();
  shim::races::watch(torchprobe::cuda::shared_memory, shim::SHARED_LIMIT, true);
  shim::races::watch(workspace.data(), bytes);
  shim::races::watch(state.mutable_data_ptr(), size_t(state.numel()) * sizeof(double));
  torchprobe::cuda::place(plan, workspace.data());
  plan.state = static_cast<double*>(state.mutable_data_ptr());
  std::string error;
  try {
    torchprobe::cuda::observe(plan, device, nullptr);
  } catch (const shim::Error& found) {
    error = found.what();
  }
  for (size_t i = bytes; i < bytes + guard; ++i)
    if (workspace[i] != shim::POISON) error = "a kernel wrote beyond the workspace";
  STD_TORCH_CHECK(error.empty(), "shim: ", error);
}

// The cut of a call, for tests that want to meet every kind.
torch::stable::Tensor plan(Tensor state, Tensor x, int64_t feature_dim, int64_t multiprocessors, int64_t shared_bytes, Tensor out) {
  std::optional<Tensor> mask;
  const torchprobe::Call call = torchprobe::describe(state, x, feature_dim, 6.0, 1, mask);
  const torchprobe::cuda::Plan p = torchprobe::cuda::make_plan(call, {0, int(multiprocessors), int(shared_bytes)});
  const int64_t all[] = {int64_t(p.layout), p.pack, p.across, p.warps, p.tiles, p.slabs, p.tile_vectors, int64_t(p.shared_bytes)};
  std::copy(std::begin(all), std::end(all), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(SHIM, m) {
  m.def("observe_(Tensor(a!) state, Tensor x, int feature_dim, float outlier_sigma, int every, Tensor? mask, int multiprocessors, "
        "int shared_bytes, int order) -> ()");
  m.def("plan(Tensor state, Tensor x, int feature_dim, int multiprocessors, int shared_bytes, Tensor(a!) out) -> Tensor(a!)");
}
STABLE_TORCH_LIBRARY_IMPL(SHIM, CPU, m) {
  m.impl("observe_", TORCH_BOX(&observe_));
  m.impl("plan", TORCH_BOX(&plan));
}
