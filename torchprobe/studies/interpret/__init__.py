"""The analysis of "Interpreting CLIP" on one encoder.

========================  ===================================================================
:func:`interpret`         encoder, head and images in, a folder of results out
:class:`Interpretation`   what it found
========================  ===================================================================
"""

from torchprobe.studies.interpret.result import Interpretation
from torchprobe.studies.interpret.run import Progress, interpret

__all__ = ["interpret", "Interpretation", "Progress"]
