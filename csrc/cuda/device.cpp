// Which devices can run this build; and the Python module torchprobe._C_cuda, which says so. Importing it loads this library, and the static
// registration in binding.cpp tells PyTorch's dispatcher about the kernels; nothing is asked of a device.

#include <Python.h>

#include "device.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <sstream>

namespace torchprobe::cuda {
namespace {

// Never destroyed: other threads may still ask while the process ends.
auto& known = *new std::map<int, Support>;
auto& lock = *new std::mutex;

// The architectures this build has code for, in the format of TORCH_CUDA_ARCH_LIST.
constexpr const char* ARCHITECTURES = TORCHPROBE_CUDA_ARCHITECTURES;

// Whether the machine code or PTX of one architecture, such as "8.6", "9.0a" or "12.0+PTX", runs on a device. A name is taken at its word.
bool runs_on(const std::string& architecture, int major, int minor) {
  int code_major = 0, code_minor = 0, length = 0;
  if (std::sscanf(architecture.c_str(), "%d.%d%n", &code_major, &code_minor, &length) != 2) return true;
  const std::string rest = architecture.substr(size_t(length));
  if (rest[0] == 'a') return code_major == major && code_minor == minor;
  return code_major == major ? code_minor <= minor : code_major < major && rest == "+PTX";
}

// "13.0"
std::string version(int number = CUDART_VERSION) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// Whether a compute capability is among what they run on.
bool covers(int major, int minor) {
  std::istringstream all(ARCHITECTURES);
  for (std::string one; all >> one;)
    if (runs_on(one, major, minor)) return true;
  return false;
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
  return "it has compute capability " + std::to_string(major) + "." + std::to_string(minor) + ", and this build has code for " + ARCHITECTURES;
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
  Support result{foresee(device), {device, 0, 0}};
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
  const std::lock_guard<std::mutex> hold(lock);
  auto found = known.find(device);
  if (found == known.end()) found = known.emplace(device, ask(device)).first;
  return found->second;
}

void check(cudaError_t error, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here
  STD_TORCH_CHECK(false, "torchprobe: observe_ failed on cuda:", device, ": ", cudaGetErrorString(error));
}

namespace {

// The obstacle of a device that need not have been used yet: as far as one can tell without a context on it.
std::string obstacle(int device) {
  {
    const std::lock_guard<std::mutex> hold(lock);
    if (const auto found = known.find(device); found != known.end()) return found->second.obstacle;
  }
  return foresee(device);
}

PyObject* describe(PyObject*, PyObject*) {
  return PyUnicode_FromFormat("CUDA %s for %s", version().c_str(), ARCHITECTURES);
}

PyObject* covers(PyObject*, PyObject* arguments) {
  int major, minor;
  if (!PyArg_ParseTuple(arguments, "ii", &major, &minor)) return nullptr;
  return PyBool_FromLong(covers(major, minor));
}

PyObject* unavailable(PyObject*, PyObject* device) {
  const long index = PyLong_AsLong(device);
  if (index == -1 && PyErr_Occurred()) return nullptr;
  const std::string reason = obstacle(int(index));
  if (reason.empty()) Py_RETURN_NONE;
  return PyUnicode_FromString(reason.c_str());
}

}  // namespace
}  // namespace torchprobe::cuda

PyMODINIT_FUNC PyInit__C_cuda(void) {
  using namespace torchprobe::cuda;
  static PyMethodDef methods[] = {
      {"describe", describe, METH_NOARGS, "The version of CUDA and the architectures that the kernels were built for."},
      {"covers", covers, METH_VARARGS, "Whether there is code for a compute capability, given as two numbers."},
      {"unavailable", unavailable, METH_O, "Why the kernels cannot run on the device of this index, in one line, or None. Makes no context."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", "Native CUDA kernels of torchprobe.", -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
