"""What torchprobe costs on a GPU: ``python -m benchmarks.gpu``, or ``make bench-gpu``.

==============  =========================================================================================
``bandwidth``   ``observe_`` as a share of the copy bandwidth: sizes, types, layouts, widths
``launch``      one call at (1, 768), where only the overhead is left
``step``        a training step of a ViT-B/16 with and without recording: time, memory, synchronization
``graph``       the same step captured in a CUDA graph and replayed; its statistics are checked
``rivals``      the same formulas in eager PyTorch and under inductor
==============  =========================================================================================

Figures go to ``benchmarks/results/<device>.json``, with tables in Markdown next to it. ``docs/performance.md`` says how it is measured.
"""
