"""Rows and arrays in; tables, plots and pages out.

===========================================  ===========================================================================
:mod:`torchprobe.rendering.tables`           the layer table in the terminal (rich) and as CSV, and its columns
:mod:`torchprobe.rendering.fitting`          a table that leaves out columns where the terminal is narrow
:mod:`torchprobe.rendering.plots`            depth profile, histogram, feature profile (matplotlib); figures as inline SVG
:mod:`torchprobe.rendering.curves`           curves with bands, and named points
:mod:`torchprobe.rendering.logit`            accuracy under a shift against unshifted accuracy, in logits, with standard models
:mod:`torchprobe.rendering.differences`      differences with their intervals
:mod:`torchprobe.rendering.style`            the stylesheet of all figures, and the widths of a paper
:mod:`torchprobe.rendering.latex`            a table for LaTeX
:mod:`torchprobe.rendering.heatmap`          a matrix in shades of one color; a run as layers over steps
:mod:`torchprobe.rendering.axes`             what all figures share: colors, axes, legends, scales, names
:mod:`torchprobe.rendering.page`             one self-contained HTML file (jinja2)
:mod:`torchprobe.rendering.dissection_page`  the page of a dissection: bars, units, and the pictures that drive a unit
:mod:`torchprobe.rendering.segment_page`     the page of units on new pictures
:mod:`torchprobe.rendering.overlays`         regions over a picture, as a picture
===========================================  ===========================================================================

No file here knows a recording or a model. matplotlib and jinja2 belong to the ``report`` extra. They are imported when a
figure is drawn or a page is written.
"""
