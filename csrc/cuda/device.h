// Which devices can run this build, and what a plan must know about them.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "plan.h"

namespace torchprobe::cuda {

struct Support {
  std::string obstacle;  // why the kernels cannot run there, in one line; empty when they can
  Device device;
};

// Asks the device itself, the first time: its driver has to load a kernel. Throws when that fails for a reason that need not last, such as a
// lack of memory.
const Support& support(int device);

// Throws what a call of the CUDA runtime says, if it is an error.
void check(cudaError_t error, int device);

// Lets kernels be loaded, which happens when they are first used, even while a stream is being captured.
class Loading {
 public:
  explicit Loading(int device) { check(cudaThreadExchangeStreamCaptureMode(&mode_), device); }
  ~Loading() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Loading(const Loading&) = delete;
  Loading& operator=(const Loading&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Makes a device the current one, for PyTorch and for the runtime in this build. Setting it makes its context known to this runtime, and with
// CUDA_MODULE_LOADING=EAGER loads every kernel.
class Current {
 public:
  explicit Current(int device) : guard_(device), loading_(device) { check(cudaSetDevice(device), device); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Loading loading_;
};

}  // namespace torchprobe::cuda
