// The Python module torchprobe._C_cuda. Importing it loads this library, and the static registration in binding.cpp tells PyTorch's dispatcher
// about the kernels; nothing is asked of a device. Beside that it says what it was built for, and what stands in the way of running it.

#include <Python.h>

#include "device.h"

static PyObject* describe(PyObject*, PyObject*) {
  return PyUnicode_FromFormat("CUDA %s for %s", torchprobe::cuda::version().c_str(), torchprobe::cuda::architectures());
}

static PyObject* covers(PyObject*, PyObject* arguments) {
  int major, minor;
  if (!PyArg_ParseTuple(arguments, "ii", &major, &minor)) return nullptr;
  return PyBool_FromLong(torchprobe::cuda::covers(major, minor));
}

static PyObject* unavailable(PyObject*, PyObject* device) {
  const long index = PyLong_AsLong(device);
  if (index == -1 && PyErr_Occurred()) return nullptr;
  const std::string obstacle = torchprobe::cuda::obstacle(int(index));
  if (obstacle.empty()) Py_RETURN_NONE;
  return PyUnicode_FromString(obstacle.c_str());
}

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyMethodDef methods[] = {
      {"describe", describe, METH_NOARGS, "The version of CUDA and the architectures that the kernels were built for."},
      {"covers", covers, METH_VARARGS, "Whether there is code for a compute capability, given as two numbers."},
      {"unavailable", unavailable, METH_O, "Why the kernels cannot run on the device of this index, in one line, or None. Makes no context."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", "Native CUDA kernels of torchprobe.", -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
