"""``python -m benchmarks.scale``: what large runs cost, from constants that are measured here. The page is ``docs/scale.md``.

``constants`` measures, ``scenarios`` computes, ``page`` writes the tables of the page. A test computes the page again from the constants in
``benchmarks/results/scale.json``.
"""
