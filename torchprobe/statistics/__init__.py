"""Streaming, mergeable statistics of activations, one protocol.

=================  =======================================================================
:class:`Moments`   mean … fourth moment per feature, and the kurtosis of every vector
=================  =======================================================================
"""

from torchprobe.statistics.moments import Moments
from torchprobe.statistics.protocol import Statistic

__all__ = ["Moments", "Statistic"]
