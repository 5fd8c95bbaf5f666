"""What it costs, beside the alternatives: ``python -m benchmarks``.

==============  =====================================================================================
``read``        ``observe_`` against ``x.sum()``, which reads the tensor once and does nothing else
``rivals``      against the same formulas in eager PyTorch and under inductor, and against other packages
``hook``        one hook at (1, 768), where nothing but the overhead is left
``model``       every block of a ViT-B/32 recorded, against its ``observe_`` calls on their own
==============  =====================================================================================

``docs/performance.md`` says how it is measured and what came out. For a GPU there is :mod:`benchmarks.gpu`.
"""
