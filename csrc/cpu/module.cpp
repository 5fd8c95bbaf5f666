// The Python module torchprobe._C. Importing it loads this library, whose static registrations give the kernels to PyTorch's dispatcher.
// Its one function names the instruction set of the kernels.

#include <Python.h>

#include "isa.h"
#include "observe.h"

static PyObject* describe(PyObject*, PyObject*) {
  return PyUnicode_FromString(torchprobe::cpu::choose<torchprobe::cpu::ObserveKernels>().name);
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"describe", describe, METH_NOARGS, "Name of the instruction set that the CPU kernels use on this machine."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Native kernels of torchprobe.", -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
