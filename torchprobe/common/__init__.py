"""The ground floor: helpers that every other package uses.

=====================================  =========================================================================
:mod:`torchprobe.common.files`         files that are written as a whole or not at all; JSON without nan
:mod:`torchprobe.common.checked`       plain values in JSON files with a checksum
:mod:`torchprobe.common.storage`       tensors and plain values in one safetensors file, with checksums; digests of tensors
:mod:`torchprobe.common.facts`         what a result depends on: the list of facts, and digests of files
:mod:`torchprobe.common.folders`       output folders: everything in one belongs to one run
:mod:`torchprobe.common.locks`         locks against other processes
:mod:`torchprobe.common.arrays`        arrays from NumPy and from files: .npy, .npz, .safetensors, .parquet
:mod:`torchprobe.common.ranks`         the processes that share a run
:mod:`torchprobe.common.runs`          the options of a long run, how far it is, and when it will end
:mod:`torchprobe.common.records`       typed results that read as mappings and that JSON can hold
:mod:`torchprobe.common.messages`      parts of messages; the name for ``pip install``
:mod:`torchprobe.common.deprecation`   old public names, which keep working with a warning
=====================================  =========================================================================
"""
