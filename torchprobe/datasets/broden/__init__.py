"""The Broden data set and its format: reading, checking, writing.

======================  ================================================================
:class:`Broden`         pictures with their labels; which pictures show a concept
:class:`BrodenWriter`   any segmentation set into the format
:func:`validate`        every problem of a folder
:class:`Finding`        one of them
======================  ================================================================
"""

from torchprobe.datasets.broden.index import Finding, Label, Row
from torchprobe.datasets.broden.presence import Presence
from torchprobe.datasets.broden.reader import Broden, ImageLabels, Sample
from torchprobe.datasets.broden.validate import validate
from torchprobe.datasets.broden.writer import BrodenWriter

__all__ = ["Broden", "BrodenWriter", "Finding", "ImageLabels", "Label", "Presence", "Row", "Sample", "validate"]
