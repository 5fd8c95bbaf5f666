"""The ground floor: what every room uses and nobody owns.

======================================  ==================================================================
:mod:`torchprobe.common.files`          files that are written whole or not at all; JSON without nan
:mod:`torchprobe.common.storage`        tensors and plain values in one safetensors file
:mod:`torchprobe.common.ranks`          the processes that share a run
:mod:`torchprobe.common.progress`       how far a run is
:mod:`torchprobe.common.digest`         telling tensors apart without keeping them
:mod:`torchprobe.common.options`        the options that every long run has
:mod:`torchprobe.common.deprecation`    old public names, which keep working with a warning
:mod:`torchprobe.common.distribution`   the name to ``pip install``
======================================  ==================================================================
"""
