"""Saved interpretations beside each other.

=====================  ==============================================================
:func:`compare`        folders of interpretations in, a comparison out
:class:`Comparison`    encoders, pairs within a backbone, rank correlations, overlaps
:func:`load_results`   one interpretation, read back
=====================  ==============================================================
"""

from torchprobe.studies.compare.comparison import Comparison, compare
from torchprobe.studies.compare.saved import Saved, load_results

__all__ = ["compare", "Comparison", "load_results", "Saved"]
