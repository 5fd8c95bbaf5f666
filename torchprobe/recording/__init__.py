"""Selects layers, places hooks, and records statistics.

=====================  ==============================================================================
:func:`record`         attach to the layers of a model; the same as :class:`Recorder`
:func:`record_attention`  the largest attention logit and the entropy of attention, of each head
:func:`record_pair`    two models on the same input, layer by layer
:class:`Recorder`      a recording that grows while the model runs
:class:`Recording`     the same mapping without hooks: merged, loaded, or the total of all windows
:func:`load`           read a recording from a file
:class:`History`       the closed windows: an array (steps, layers) for every field
:func:`find_jumps`     fields of a history that changed against their own past
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
``shown``          the table of layers, in a terminal and in a notebook
``recording``      rows, metrics, tables, plots, merging
``frames``         tables of pandas, Parquet files
``storage``        files, read as if they came from anywhere
``distributed``    the recordings of all ranks as one
``matching``       which layer of one model is which of another
``pair``           two models on the same input: ``pair_taps`` copies, ``pair_replay`` runs layers alone, ``pair_comparison``: the
                   result, ``tensor_difference``: two tensors
``attention``      operators that compute attention; ``attention_rows``: the largest logit and the entropy
``diagnosis``      why a layer was not read
``watched``        what a recorder offers beside statistics: guards and jumps
``watchers``       when these tell what they have found
``guard``          who went bad first: from what hooks see to an alarm
``guard_hooks``    the hooks of a guard, eager and compiled
``guard_device``   the guard on an accelerator, which nothing waits for
``guard_options``  its arguments
``jumps``          fields that change against their own past
``nonfinite``      which values of a tensor are nonfinite, and where
``verdicts``       what a guard found, in words
``flight``         what is written of an alarm
``flight_page``    the same, as a page
=================  ==================================================================================
"""

from torchprobe.recording.attention import record_attention
from torchprobe.recording.detach import detach_all
from torchprobe.recording.flight import read_flight
from torchprobe.recording.history import History
from torchprobe.recording.jumps import JumpWarning, find_jumps
from torchprobe.recording.layers import named_layers, select_layers
from torchprobe.recording.pair import record_pair
from torchprobe.recording.pair_comparison import LayerPair, PairComparison
from torchprobe.recording.recorder import Recorder, record
from torchprobe.recording.recording import Recording, load
from torchprobe.recording.stream import RecordingWarning
from torchprobe.recording.verdicts import NonfiniteError, NonfiniteWarning

__all__ = [
    "record",
    "record_pair",
    "record_attention",
    "PairComparison",
    "LayerPair",
    "load",
    "Recorder",
    "Recording",
    "History",
    "RecordingWarning",
    "NonfiniteError",
    "NonfiniteWarning",
    "JumpWarning",
    "find_jumps",
    "read_flight",
    "detach_all",
    "named_layers",
    "select_layers",
]
