"""The analysis of "Interpreting CLIP" on one encoder.

=========================  ===================================================================
:func:`interpret`          encoder, head and images → a folder of results
:class:`Interpretation`    the results
=========================  ===================================================================
"""

from torchprobe.studies.interpret.interpretation import Interpretation
from torchprobe.studies.interpret.run import Progress, interpret

__all__ = ["interpret", "Interpretation", "Progress"]
