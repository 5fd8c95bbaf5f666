"""Whole runs: a folder in, a folder out.

=================================  ========================================================================================
:mod:`torchprobe.studies.scan`     does an encoder have outlier features? One look at a folder of images
:mod:`torchprobe.studies.dissect`  what do its units detect? A folder in the format of Broden in, tables and pages out
:mod:`torchprobe.studies.demo`     both on a real network and real photos, beside its random initialisation
:mod:`torchprobe.studies.outline`  the layers of an encoder
:mod:`torchprobe.studies.doctor`   versions, kernels, and their check on this machine
=================================  ========================================================================================
"""
