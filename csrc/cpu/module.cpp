// The Python module torchprobe._C. Importing it loads this library, and the static registrations of the other files tell PyTorch's
// dispatcher about the kernels; beside that it only says which instruction set they use.

#include <Python.h>

#include "observe.h"

static PyObject* describe(PyObject*, PyObject*) { return PyUnicode_FromString(torchprobe::cpu::instruction_set()); }

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"describe", describe, METH_NOARGS, "Name of the instruction set that the CPU kernels use on this machine."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Native kernels of torchprobe.", -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
