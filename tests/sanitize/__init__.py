"""The kernels stand-alone under the sanitizers: ``make sanitize``, or ``python -m sanitize`` in ``tests``.

=================  =====================================================================================================
``stand_in/``      what csrc uses of PyTorch's stable ABI, in plain C++: storages that end where they end, ``std::thread``
``driver.cpp``     runs a corpus of calls, with one thread and several, and writes down what they leave
``build``          compiles csrc/cpu, and csrc/cuda on the host, against the stand-in
``corpus``         the calls: the inputs of the property tests, and the same with damaged arguments
``__main__``       the command
=================  =====================================================================================================

The results are those of the library itself, bit by bit: what the sanitizers watch is what users run.
"""
