"""The Broden data set and its format: reading, checking, writing.

======================  ================================================================
:class:`Broden`         images with their labels; which images show a concept
:class:`BrodenWriter`   converts any segmentation data set
:func:`validate`        every problem of a folder
:class:`Finding`        one problem
:func:`broden_digest`   tells two data sets apart
======================  ================================================================

===============  ======================================================================
file             subject
===============  ======================================================================
``reader``       :class:`Broden`: items and samples
``index``        the CSV tables: categories, labels, rows
``image_files``  opens images, decodes label maps
``identity``     a digest of everything that a data set holds
``presence``     which image shows which concept, and on what area
``validate``     lists every problem of a folder
``writer``       :class:`BrodenWriter`
===============  ======================================================================
"""

from torchprobe.datasets.broden.identity import broden_digest
from torchprobe.datasets.broden.index import Finding, Label, Row
from torchprobe.datasets.broden.presence import Presence
from torchprobe.datasets.broden.reader import Broden, ImageLabels, Sample
from torchprobe.datasets.broden.validate import validate
from torchprobe.datasets.broden.writer import BrodenWriter

__all__ = ["Broden", "BrodenWriter", "Finding", "ImageLabels", "Label", "Presence", "Row", "Sample", "broden_digest", "validate"]
