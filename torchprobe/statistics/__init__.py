"""Streaming, mergeable statistics of activations, under one contract.

=========================  ====================================================================================
:class:`Statistic`         the contract; derive your own statistic from it
:class:`State`             one tensor that a statistic keeps, and how two of them merge
:data:`FEATURES`           the width of the layer, in the shape of a state
:class:`DynamicStatistic`  the contract for states without a fixed shape
:class:`Moments`           four moments and extremes of each feature, and the kurtosis of each vector
:class:`Quantile`          the value that a small share of each feature's values exceeds
:class:`TopInputs`         the inputs with the largest score of each feature
:class:`Norms`             the L2 norm and the root mean square of each vector
:class:`Sparsity`          exact zeros, and features that are always zero
:class:`Saturation`        values at the ends of the range of an activation function
:class:`Routing`           the load of each expert of a mixture of experts, and the entropy of the router
:class:`Exponents`         binary exponents, and what forecasts of 8-bit formats need
:class:`Several`           several statistics of one layer, updated by one hook
=========================  ====================================================================================

Where what is:

===============  ==============================================================================================
``statistic``    the contract: what a subclass writes, and everything that follows from it
``layers``       the states of many layers at once; the order of threads
``saved``        states that were saved, checked
``tensors``      states and their merging, checks of what is read
``dynamic``      states without a fixed shape; classes with the verbs of the earlier protocol
``factory``      from the argument ``statistic`` of ``record`` to the statistics; ``several``: several as one
``moments``      moments, vector kurtosis and its reference values (the formulas that merge: ``ops.observe``);
                 ``moment_fields``: from states to fields
``quantile``     upper quantiles, exact or sketched; ``tail``: the largest values of a stream
``top_inputs``   the top inputs of each feature
``norms``        the length of each vector
``sparsity``     zeros
``saturation``   values at the ends of a range
``routing``      routers of mixtures of experts
``exponents``    exponents of values (the read: ``ops.exponents``; the forecasts: ``analysis.quantization``)
===============  ==============================================================================================
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchprobe.statistics.dynamic import DynamicStatistic
from torchprobe.statistics.moments import Moments
from torchprobe.statistics.several import Several
from torchprobe.statistics.statistic import Statistic
from torchprobe.statistics.tensors import FEATURES, State

if TYPE_CHECKING:
    from torchprobe.statistics.exponents import Exponents
    from torchprobe.statistics.norms import Norms
    from torchprobe.statistics.quantile import Quantile
    from torchprobe.statistics.routing import Routing
    from torchprobe.statistics.saturation import Saturation
    from torchprobe.statistics.sparsity import Sparsity
    from torchprobe.statistics.top_inputs import TopInputs

__all__ = [
    "Statistic",
    "State",
    "FEATURES",
    "DynamicStatistic",
    "Moments",
    "Quantile",
    "TopInputs",
    "Norms",
    "Sparsity",
    "Saturation",
    "Routing",
    "Exponents",
    "Several",
]

_LAZY = {
    "Exponents": "torchprobe.statistics.exponents",
    "Quantile": "torchprobe.statistics.quantile",
    "TopInputs": "torchprobe.statistics.top_inputs",
    "Norms": "torchprobe.statistics.norms",
    "Sparsity": "torchprobe.statistics.sparsity",
    "Routing": "torchprobe.statistics.routing",
    "Saturation": "torchprobe.statistics.saturation",
}


def __getattr__(name: str) -> Any:
    """What training does not need is imported only when it is used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'torchprobe.statistics' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
