"""Selects layers, places hooks, and records statistics.

=====================  ==============================================================================
:func:`record`         attach to the layers of a model; the same as :class:`Recorder`
:class:`Recorder`      a recording that grows while the model runs
:class:`Recording`     the same mapping without hooks: merged, loaded, or the total of all windows
:func:`load`           read a recording from a file
:class:`History`       the closed windows: an array (steps, layers) for every field
:class:`LayerReader`   what layers give for one batch, in :mod:`torchprobe.recording.reader`
=====================  ==============================================================================
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
