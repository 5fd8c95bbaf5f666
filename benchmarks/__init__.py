"""What torchprobe costs, compared with the alternatives. ``docs/performance.md`` says how it is measured, and the results.

========================================  ===========================================================================
``python -m benchmarks``                  the CPU: the sections ``read``, ``rivals``, ``hook``, ``model``, ``dissection``; growth; a page
``python -m benchmarks.scale``            constants of large runs, for docs/scale.md
``python -m benchmarks.training``         a training step with every block watched
``python -m benchmarks.pruning``          a pruning curve
``python -m benchmarks.soak``             100,000 recorded steps through two restarts: memory, and nothing lost
``python -m benchmarks.cka``              CKA of all pairs of layers
``python -m benchmarks.dissection_full``  a whole dissection of Broden's size, without the network
``python -m benchmarks.gpu``              a GPU: see :mod:`benchmarks.gpu`
========================================  ===========================================================================

``timing`` and ``report`` are what all of them share: contestants take turns in one process, and medians become tables and JSON.
``formulas`` and ``monitors`` hold the contestants, ``networks`` and ``synthetic_broden`` what they work on.
"""
