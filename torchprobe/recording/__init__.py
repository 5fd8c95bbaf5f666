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
``layers``         names and selection
``leaves``         what single modules say of the width of their output
``axes``           which dimension of an activation holds the features, and by what that is known
``trail``          the evidence for it: which layers ran, and what they gave
``events``         what one layer gave, and what that says of another tensor
``reader``         the activations of some layers for one batch; batch and feature dimensions
``structure``      the tensors in tuples, mappings and dataclasses
``tensors``        distributed tensors, and those that cannot be read
``nested``         the vectors of nested tensors
``masks``          which vectors count
``stream``         one tensor of a layer: its states, and how it is read
``hook``           from a call of a module to its streams: outputs and inputs
``gradients``      the same for gradients and parameters
``traced``         how a compiled graph reads a tensor
``compiled``       everything that knows ``torch.compile``, and copies of hooks
``detach``         removes everything of ours from a model
``bank``           all streams of a recorder: by name, as entries, from saved states
``control``        what the hooks of one recorder share; CUDA graphs that are captured while recording
``setup``          from the arguments of a recorder to its hooks
``recorder``       starting, stopping, windows, pausing, masks, resuming
``windows``        one layer of a recording; many layers at once
``history``        the numbers of closed windows
``transfer``       from the device to the host without waiting
``recording``      rows, metrics, tables, plots, merging
``storage``        files, read as if they came from anywhere
``distributed``    the recordings of all ranks as one
``diagnosis``      why a layer was not read
=================  ==================================================================================
"""

from torchprobe.recording.detach import detach_all
from torchprobe.recording.history import History
from torchprobe.recording.layers import named_layers, select_layers
from torchprobe.recording.recorder import Recorder, record
from torchprobe.recording.recording import Recording, load
from torchprobe.recording.stream import RecordingWarning

__all__ = [
    "record",
    "load",
    "Recorder",
    "Recording",
    "History",
    "RecordingWarning",
    "detach_all",
    "named_layers",
    "select_layers",
]
