"""Where inputs come from.

=======================  ==================================================================
:class:`Images`          image files in batches; what cannot be decoded is counted and named
:func:`image_folder`     the images beneath a folder
:class:`LabelledImages`  images with a row of the head each
:func:`labelled_folder`  one folder a class
:func:`imagenet_set`     ImageNet, -V2, -R, -Sketch, -A and ObjectNet, from the folders of their releases
:class:`Broden`          pictures with their concepts, in the format of the Broden data set
:class:`BrodenWriter`    any segmentation set into that format
:func:`validate`         every problem of such a folder
=======================  ==================================================================
"""

from torchprobe.datasets.broden import Broden, BrodenWriter, validate
from torchprobe.datasets.imagenet import imagenet_set
from torchprobe.datasets.images import DatasetError, Images, image_folder
from torchprobe.datasets.labelled import LabelledImages, labelled_folder

__all__ = [
    "Broden", "BrodenWriter", "DatasetError", "Images", "LabelledImages", "image_folder", "imagenet_set", "labelled_folder", "validate",
]  # fmt: skip
