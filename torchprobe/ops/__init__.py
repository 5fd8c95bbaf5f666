"""The registered operators: schema, fake kernel and pure PyTorch reference, one file each.

==================  ==========================================================
:func:`observe_`    one read of an activation, every moment of it
:func:`new_state`   the empty state it writes to
:func:`kernels`     which native kernels are loaded, or why not
==================  ==========================================================
"""

import torch as _torch

from torchprobe.ops import gradient as _gradient
from torchprobe.ops import observe as _observe
from torchprobe.ops._library import kernels, load_kernels
from torchprobe.ops.observe import new_state, observe_

__all__ = ["kernels", "new_state", "observe_"]

_library = _torch.library.Library("torchprobe", "DEF")  # the registrations live as long as this object
_observe.register(_library)
_gradient.register(_library)
load_kernels()
