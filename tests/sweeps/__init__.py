"""Sweeps over the models of other libraries: what no single test covers.

==========================  ==========================================================================================
``case``                    one model with its inputs, built when asked for, with random weights
``models``                  all cases by library
``timm_models`` …           the cases of one library; what cannot be built says why
``check``                   one model with and without recording: bitwise equal, nothing left behind
``run``                     ``python -m tests.sweeps.run --library timm --mode eager --out results.json``
``truth``                   where the features of every layer are, from what libraries publish and from two geometries
``axes``                    ``python -m tests.sweeps.axes --library timm``: right, unsure, wrong for every family
==========================  ==========================================================================================

The quick part runs with the tests (``tests/test_sweeps.py``); the full sweeps are slow tests and command lines.
"""
