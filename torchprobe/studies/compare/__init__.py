"""Saved interpretations beside each other.

=====================  ==============================================================
:func:`compare`        folders of interpretations in, a comparison out
:class:`Comparison`    encoders, pairs within a backbone, rank correlations, overlaps
:func:`write`          its tables, plots and page
:func:`load_results`   one interpretation, read back
=====================  ==============================================================
"""

from torchprobe.studies.compare.comparison import Comparison, compare
from torchprobe.studies.compare.saved import Saved, load_results
from torchprobe.studies.compare.write import write

__all__ = ["compare", "Comparison", "write", "load_results", "Saved"]
