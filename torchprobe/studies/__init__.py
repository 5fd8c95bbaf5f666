"""Whole runs: a folder in, a folder out.

====================================  =====================================================================================
:mod:`torchprobe.studies.scan`        does an encoder have outlier features? One pass over a folder of images
:mod:`torchprobe.studies.dissect`     what do its units detect? From a folder in the format of Broden to tables and pages
:mod:`torchprobe.studies.segment`     the units of a dissection on new pictures
:mod:`torchprobe.studies.words`       which words do its units agree with? From images without labels to tables and pages
:mod:`torchprobe.studies.diff`        two dissections, compared unit by unit and concept by concept; ``diff_recordings``: two recordings
:mod:`torchprobe.studies.interpret`   the measures of the paper for one encoder
:mod:`torchprobe.studies.suite`       the same for many encoders
:mod:`torchprobe.studies.compare`     the comparison of encoders that were interpreted
:mod:`torchprobe.studies.demo`        real networks compared with their random initialization: a scan, a dissection, outlier features
:mod:`torchprobe.studies.outline`     the layers of an encoder
:mod:`torchprobe.studies.doctor`      versions, kernels, and the check of the kernels on this machine
====================================  =====================================================================================
"""
