"""Streaming, mergeable statistics of activations, one protocol.

===================  =======================================================================
:class:`Moments`     mean … fourth moment per feature, and the kurtosis of every vector
:class:`Quantile`    the value that a small share of each feature's values exceeds
:class:`TopInputs`   the inputs with the largest score of each feature
===================  =======================================================================
"""

from torchprobe.statistics.moments import Moments
from torchprobe.statistics.protocol import Statistic
from torchprobe.statistics.quantile import Quantile
from torchprobe.statistics.top_inputs import TopInputs

__all__ = ["Moments", "Quantile", "Statistic", "TopInputs"]
