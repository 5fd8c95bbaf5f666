"""Streaming, mergeable statistics of activations, under one contract.

=========================  ====================================================================================
:class:`Statistic`         the contract; derive your own statistic from it
:class:`State`             one tensor that a statistic keeps, and how two of them merge
:data:`FEATURES`           the width of the layer, in the shape of a state
:class:`DynamicStatistic`  the contract for states without a fixed shape
:class:`Moments`           four moments and extremes of each feature, and the kurtosis of each vector
:class:`Quantile`          the value that a small share of each feature's values exceeds
:class:`TopInputs`         the inputs with the largest score of each feature
:class:`Several`           several statistics of one layer, updated by one hook
=========================  ====================================================================================
"""

from torchprobe.statistics.dynamic import DynamicStatistic
from torchprobe.statistics.factory import Several
from torchprobe.statistics.moments import Moments
from torchprobe.statistics.quantile import Quantile
from torchprobe.statistics.statistic import Statistic
from torchprobe.statistics.tensors import FEATURES, State
from torchprobe.statistics.top_inputs import TopInputs

__all__ = ["FEATURES", "DynamicStatistic", "Moments", "Quantile", "Several", "State", "Statistic", "TopInputs"]
