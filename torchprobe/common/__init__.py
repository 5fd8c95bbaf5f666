"""The ground floor: helpers that every other package uses.

======================================  ==================================================================
:mod:`torchprobe.common.files`          files that are written as a whole or not at all; JSON without nan
:mod:`torchprobe.common.storage`        tensors and plain values in one safetensors file
:mod:`torchprobe.common.ranks`          the processes that share a run
:mod:`torchprobe.common.progress`       how far a run is, and when it will end
:mod:`torchprobe.common.options`        the options of every long run
:mod:`torchprobe.common.digest`         a digest of tensors, to compare them without keeping them
:mod:`torchprobe.common.messages`       parts of messages
:mod:`torchprobe.common.deprecation`    old public names, which keep working with a warning
:mod:`torchprobe.common.distribution`   the name for ``pip install``
======================================  ==================================================================
"""
