"""Selects layers, places hooks, and records statistics.

=====================  ==============================================================================
:func:`record`         attach to the layers of a model; the same as :class:`Recorder`
:class:`Recorder`      a recording that grows while the model runs
:class:`Recording`     the same mapping without hooks: merged, loaded, or the total of all windows
:func:`load`           read a recording from a file
:class:`History`       the closed windows: an array (steps, layers) for every field
:class:`LayerReader`   what layers give for one batch, in :mod:`torchprobe.recording.reader`
=====================  ==============================================================================

Where what is:

=================  ==================================================================================
``layers``         names, selection, and the dimension of the features
``reader``         the activations of some layers for one batch; batch and feature dimensions
``tensors``        from the output of a module to the one tensor that is read; masks
``hook``           the hooks: eager, traced, gradients
``compiled``       everything that knows ``torch.compile``
``control``        what the hooks of one recorder share; CUDA graphs that are captured while recording
``recorder``       starting, stopping, windows, pausing, masks, resuming
``windows``        one layer of a recording; many layers at once
``history``        the numbers of closed windows
``transfer``       from the device to the host without waiting
``recording``      rows, metrics, tables, plots, merging
``storage``        files, read as if they came from anywhere
``distributed``    the recordings of all ranks as one
``diagnosis``      why a layer never fired
=================  ==================================================================================
"""

from torchprobe.recording.diagnosis import RecordingWarning
from torchprobe.recording.history import History
from torchprobe.recording.layers import named_layers, select_layers
from torchprobe.recording.recorder import Recorder, record
from torchprobe.recording.recording import Recording, load

__all__ = [
    "record",
    "load",
    "Recorder",
    "Recording",
    "History",
    "RecordingWarning",
    "named_layers",
    "select_layers",
]
