// What the operator (binding.cpp) hands to the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "call.h"

namespace torchprobe::cuda {

struct Device {
  int multiprocessors;
  int shared_bytes;  // that one block may ask for
};

// Device memory that a call needs for its duration.
size_t workspace_bytes(const Call& call, const Device& device);

// Adds a call to a state on the device, slot CALLS included: at most two launches on `stream`, none of which waits for anything.
cudaError_t observe(const Call& call, const Device& device, double* state, void* workspace, cudaStream_t stream);

// Whether the current device and its driver can run this build.
cudaError_t probe();

}  // namespace torchprobe::cuda
