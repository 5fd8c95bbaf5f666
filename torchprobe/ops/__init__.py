"""The registered operators. Each has a file with its schema, its fake kernel and its reference in PyTorch.

=========================  ==========================================================
:func:`observe_`           all moments of an activation, in one read
:func:`new_state`          the empty state for it
:func:`overlap_tally_`     pixels that activated regions share with labels
:func:`average_precision`  how well each unit ranks the images of each concept
:func:`kernels`            which native kernels are loaded, or why not
=========================  ==========================================================

=====================  =====================================================================
file                   subject
=====================  =====================================================================
``observe``            ``observe_``, and merging states with third and fourth moments
``layout``             what each number of a state means
``states``             whole states of ``observe_``, while threads observe
``memory``             the memory of arguments, checked
``positions``          the vectors of an activation
``observers``          Python code that a compiled graph calls with an activation or gradient
``quantile``           the largest values of every feature
``exponents``          ``exponents_``: exponents of values, and what forecasts of eight bits need
``overlap``            ``overlap_tally_``
``average_precision``  ``average_precision``
``library``            registers operators, loads compiled kernels
``selfcheck``          kernels compared with the references, for ``torchprobe doctor``
=====================  =====================================================================
"""

import torch as _torch

from torchprobe.ops import average_precision as _average_precision
from torchprobe.ops import exponents as _exponents
from torchprobe.ops import observe as _observe
from torchprobe.ops import observers as _observers
from torchprobe.ops import overlap as _overlap
from torchprobe.ops import quantile as _quantile
from torchprobe.ops import states as _states
from torchprobe.ops.average_precision import average_precision
from torchprobe.ops.library import kernels, load_kernels
from torchprobe.ops.observe import new_state, observe_
from torchprobe.ops.overlap import overlap_tally_

__all__ = ["average_precision", "kernels", "new_state", "observe_", "overlap_tally_"]

_registrations = _torch.library.Library("torchprobe", "DEF")  # the operators exist as long as this object
_observe.register(_registrations)
_observers.register(_registrations)
_overlap.register(_registrations)
_average_precision.register(_registrations)
_quantile.register(_registrations)
_exponents.register(_registrations)
_states.register(_registrations)
load_kernels()
