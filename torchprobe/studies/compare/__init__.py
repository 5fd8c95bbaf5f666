"""A comparison of saved interpretations.

=====================  ==============================================================
:func:`compare`        folders of interpretations → a comparison
:class:`Comparison`    encoders, pairs within a backbone, rank correlations, overlaps
:func:`write`          its tables, plots and page
:func:`load_results`   one interpretation, read from its folder
=====================  ==============================================================
"""

from torchprobe.studies.compare.comparison import Comparison, compare
from torchprobe.studies.compare.report import write
from torchprobe.studies.compare.saved import Saved, load_results

__all__ = ["compare", "Comparison", "write", "load_results", "Saved"]
