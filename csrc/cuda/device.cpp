#include "device.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <sstream>

namespace torchprobe::cuda {
namespace {

struct Known {
  std::mutex lock;
  std::map<int, Support> devices;
};
Known& known() {
  static Known* forever = new Known;  // other threads may still ask while the process ends
  return *forever;
}

// Whether the machine code or PTX of one architecture, such as "8.6", "9.0a" or "12.0+PTX", runs on a device. A name is taken at its word.
bool runs_on(const std::string& architecture, int major, int minor) {
  int code_major = 0, code_minor = 0, length = 0;
  if (std::sscanf(architecture.c_str(), "%d.%d%n", &code_major, &code_minor, &length) != 2) return true;
  const std::string rest = architecture.substr(size_t(length));
  if (rest[0] == 'a') return code_major == major && code_minor == minor;
  return code_major == major ? code_minor <= minor : code_major < major && rest == "+PTX";
}

std::string foresee(int device) {
  int driver = 0, major = 0, minor = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver was found";
  if (driver / 1000 < CUDART_VERSION / 1000)
    return "its driver is made for CUDA " + version(driver) + ", and this build needs one for CUDA " + version() + " or newer";
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return cudaGetErrorString(cudaGetLastError());
  if (covers(major, minor)) return "";
  return "it has compute capability " + std::to_string(major) + "." + std::to_string(minor) + ", and this build has code for " + architectures();
}

// Errors that will be there the next time too. All others belong to something else that went wrong on the device.
bool lasts(cudaError_t error) {
  const cudaError_t all[] = {cudaErrorInsufficientDriver,     cudaErrorCallRequiresNewerDriver, cudaErrorStubLibrary,
                             cudaErrorSystemDriverMismatch,   cudaErrorNoKernelImageForDevice,  cudaErrorInvalidKernelImage,
                             cudaErrorInvalidDeviceFunction,  cudaErrorInvalidPtx,              cudaErrorUnsupportedPtxVersion,
                             cudaErrorJitCompilationDisabled, cudaErrorJitCompilerNotFound,     cudaErrorCompatNotSupportedOnDevice};
  return std::find(std::begin(all), std::end(all), error) != std::end(all);
}

Support ask(int device) {
  Support result{foresee(device), {}};
  if (!result.obstacle.empty()) return result;
  const Current current(device);
  check(cudaDeviceGetAttribute(&result.device.multiprocessors, cudaDevAttrMultiProcessorCount, device), device);
  check(cudaDeviceGetAttribute(&result.device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), device);
  const cudaError_t error = probe();
  if (lasts(error)) {
    cudaGetLastError();
    result.obstacle = cudaGetErrorString(error);
  } else {
    check(error, device);
  }
  return result;
}

}  // namespace

const Support& support(int device) {
  std::lock_guard<std::mutex> hold(known().lock);
  auto found = known().devices.find(device);
  if (found == known().devices.end()) found = known().devices.emplace(device, ask(device)).first;
  return found->second;
}

std::string obstacle(int device) {
  {
    std::lock_guard<std::mutex> hold(known().lock);
    const auto found = known().devices.find(device);
    if (found != known().devices.end()) return found->second.obstacle;
  }
  return foresee(device);
}

void check(cudaError_t error, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here
  STD_TORCH_CHECK(false, "torchprobe: observe_ failed on cuda:", device, ": ", cudaGetErrorString(error));
}

Current::Current(int device) : guard_(device) {
  check(cudaSetDevice(device), device);
  check(cudaThreadExchangeStreamCaptureMode(&mode_), device);
}
Current::~Current() { cudaThreadExchangeStreamCaptureMode(&mode_); }

const char* architectures() { return TORCHPROBE_CUDA_ARCHITECTURES; }

bool covers(int major, int minor) {
  std::istringstream all(architectures());
  for (std::string one; all >> one;)
    if (runs_on(one, major, minor)) return true;
  return false;
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

}  // namespace torchprobe::cuda
