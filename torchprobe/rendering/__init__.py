"""Rows and arrays in; tables, plots and pages out.

===========================================  ===========================================================================
:mod:`torchprobe.rendering.tables`           the layer table in the terminal (rich), as CSV, and its columns
:mod:`torchprobe.rendering.plots`            depth profile, histogram, features (matplotlib), also as inline SVG
:mod:`torchprobe.rendering.heatmap`          a matrix in shades of one colour, with the names of its rows and columns
:mod:`torchprobe.rendering.history`          a run: layers over steps, and the distribution of one layer over them
:mod:`torchprobe.rendering.page`             one self-contained HTML file (jinja2)
:mod:`torchprobe.rendering.dissection_page`  the page of a dissection: bars, units, pictures drawn when they come into view
:mod:`torchprobe.rendering.outline`          a region of pixels as the path of its outline
:mod:`torchprobe.statistics.moments`         the values a kurtosis is read against
===========================================  ===========================================================================

Nothing here knows a recording or a model. matplotlib and jinja2 are the ``report`` extra; they are imported when a
figure is drawn or a page is written.
"""
