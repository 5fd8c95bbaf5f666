// Which devices can run this build, and what a plan must know about them.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "observe.h"

namespace torchprobe::cuda {

struct Support {
  std::string obstacle;  // why the kernels cannot run there, in one line; empty when they can
  Device device;
};

// Asks the device itself, the first time: its driver has to load a kernel. Throws when that fails for a reason that need not last, such as a
// lack of memory.
const Support& support(int device);

// The obstacle of a device that need not have been used yet: as far as one can tell without a context on it.
std::string obstacle(int device);

// Throws what a call of the CUDA runtime says, if it is an error.
void check(cudaError_t error, int device);

// Makes a device the current one, for PyTorch and for the runtime in this build. Lets kernels be loaded, which happens when they are first
// used, even while a stream is being captured.
class Current {
 public:
  explicit Current(int device);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The architectures this build has code for, in the format of TORCH_CUDA_ARCH_LIST; whether a compute capability is among what they run on.
const char* architectures();
bool covers(int major, int minor);

// "13.0": the version of the CUDA runtime in this build.
std::string version(int number = CUDART_VERSION);

}  // namespace torchprobe::cuda
