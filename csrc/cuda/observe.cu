// The launches.

#include "observe.h"

#include <cuda_runtime.h>

#include "kernels.cuh"

namespace torchprobe::cuda {

extern template struct Kernels<double>;
extern template struct Kernels<float>;
extern template struct Kernels<BFloat16>;
extern template struct Kernels<Float16>;

namespace {

Kernel kernel_for(const Plan& plan) {
  switch (plan.call.dtype) {
    case Dtype::Float64: return Kernels<double>::observe(plan);
    case Dtype::Float32: return Kernels<float>::observe(plan);
    case Dtype::BFloat16: return Kernels<BFloat16>::observe(plan);
    default: return Kernels<Float16>::observe(plan);
  }
}

cudaError_t launch(Kernel kernel, int64_t blocks, int threads, size_t shared_bytes, const Device& device, Plan& plan, cudaStream_t stream) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 << 10) {  // more than this has to be asked for: always the same, as other threads may be about to launch
    const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {&plan};
  return cudaLaunchKernel(function, dim3(unsigned(blocks)), dim3(unsigned(threads)), arguments, shared_bytes, stream);
}

}  // namespace

size_t workspace_bytes(const Call& call, const Device& device) {
  Plan plan = make_plan(call, device.multiprocessors, device.shared_bytes);
  return place(plan, nullptr);
}

cudaError_t observe(const Call& call, const Device& device, double* state, void* workspace, cudaStream_t stream) {
  Plan plan = make_plan(call, device.multiprocessors, device.shared_bytes);
  place(plan, workspace);
  plan.state = state;
  if (plan.tiles > 0) {
    const int64_t blocks = plan.wide ? plan.vector_blocks + plan.tiles * plan.slabs : plan.tiles;
    const cudaError_t error = launch(kernel_for(plan), blocks, plan.threads, plan.shared_bytes, device, plan, stream);
    if (error != cudaSuccess || (plan.tiles == 1 && !plan.wide)) return error;
  }
  const int64_t blocks = (call.features + 31) / 32 + HISTOGRAM_BLOCKS + 1;
  const Kernel merge = call.dtype == Dtype::Float64 ? merge_tiles<double> : merge_tiles<float>;
  return launch(merge, blocks, 32 * MERGE_PARTS, 32 * MERGE_PARTS * sizeof(Feature), device, plan, stream);
}

cudaError_t probe() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(static_cast<Kernel>(merge_tiles<float>)));
}

}  // namespace torchprobe::cuda
