"""Where inputs come from.

=====================  ==================================================================
:class:`Images`        image files in batches; what cannot be decoded is counted and named
:func:`image_folder`   the images beneath a folder
=====================  ==================================================================
"""

from torchprobe.datasets.images import DatasetError, Images, image_folder

__all__ = ["DatasetError", "Images", "image_folder"]
