"""Where inputs come from.

======================  ==================================================================
:class:`Images`         image files in batches; what cannot be decoded is counted and named
:func:`image_folder`    the images beneath a folder
:class:`Broden`         pictures with their concepts, in the format of the Broden data set
:class:`BrodenWriter`   any segmentation set into that format
:func:`validate`        every problem of such a folder
======================  ==================================================================
"""

from torchprobe.datasets.broden import Broden, BrodenWriter, validate
from torchprobe.datasets.images import DatasetError, Images, image_folder

__all__ = ["Broden", "BrodenWriter", "DatasetError", "Images", "image_folder", "validate"]
