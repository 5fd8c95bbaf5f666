"""What it costs on a GPU: ``python -m benchmarks.gpu``, or ``make bench-gpu``.

==============  =====================================================================================
``bandwidth``   ``observe_`` as a share of the copy bandwidth: sizes, types, layouts, widths
``rivals``      the same formulas in eager PyTorch and under inductor beside it
``launch``      one call at (1, 768), where nothing but the overhead is left
``step``        a training step of a ViT-B/16 with and without recording: time, memory, synchronisation
``graph``       the same step captured in a CUDA graph and replayed, and its statistics held against the reference
==============  =====================================================================================

Figures go to ``benchmarks/results/<device>.json``, with a table in Markdown beside it. ``docs/performance.md`` says how it is measured.
"""
