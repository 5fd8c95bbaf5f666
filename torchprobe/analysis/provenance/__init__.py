"""Where features of a representation come from.

================  =============================================================================
file              subject
================  =============================================================================
``run``           :func:`provenance`: the pass over images
``results``       :class:`Provenance`: its tables, its summary and its file
``stream``        the residual stream: blocks, and the branches that they add
``attribution``   the exact sum of a feature over branches
``parameters``    the parameters on which a feature hangs, compared with their peers
``changes``       what happens when one parameter is changed
``norms``         what a LayerNorm, an RMSNorm or a norm of another library does
``calls``         what modules read and return, and hooks that change it
================  =============================================================================
"""

from torchprobe.analysis.provenance.parameters import deviations
from torchprobe.analysis.provenance.results import Provenance
from torchprobe.analysis.provenance.run import provenance
from torchprobe.analysis.provenance.stream import UnknownStructure

__all__ = ["provenance", "Provenance", "UnknownStructure", "deviations"]
