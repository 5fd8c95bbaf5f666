"""Where inputs come from.

============================  ========================================================================
:func:`open_images`           images from anywhere: folders, tar shards, s3:// and the like, data sets, loaders, Hugging Face
:func:`open_shards`           images in tar shards, as WebDataset writes them, with labels
:class:`ImageSet`             what every set of images does: the protocol that functions and commands take
:class:`Images`               image files in batches; files that cannot be read are counted and named
:func:`image_folder`          the images in a folder and its subfolders
:class:`LabeledImages`        images with labels, which are rows of the head
:func:`labeled_folder`        one folder for each class
:func:`imagenet_set`          ImageNet, -V2, -R, -Sketch, -A and ObjectNet, from the folders of their releases
:class:`Texts`                texts in batches of tokens, for an encoder of texts
:func:`text_file`             the texts of a file, one in each line
:class:`Broden`               pictures with their concepts, in the format of the Broden data set
:class:`BrodenWriter`         writes any segmentation data set in that format
:func:`validate`              finds every problem of such a folder
:func:`import_coco`           COCO instances, in the format of Broden
:func:`import_coco_panoptic`  COCO panoptic
:func:`import_ade20k`         ADE20K, with parts
:func:`import_voc`            Pascal VOC
:func:`import_label_maps`     images with masks of class indices
:func:`import_binary_masks`   one folder of binary masks for each concept
:func:`import_hugging_face`   data sets of the Hugging Face library
:class:`ImportReport`         what an import wrote, dropped and changed
:class:`DatasetError`         the error of a folder or a file that cannot be used
============================  ========================================================================
"""

from torchprobe.common.deprecation import renamed
from torchprobe.datasets.broden import Broden, BrodenWriter, validate
from torchprobe.datasets.imagenet import imagenet_set
from torchprobe.datasets.images import DatasetError, Images, image_folder
from torchprobe.datasets.importers import (
    ImportReport,
    import_ade20k,
    import_binary_masks,
    import_coco,
    import_coco_panoptic,
    import_hugging_face,
    import_label_maps,
    import_voc,
)
from torchprobe.datasets.labeled import LabeledImages, labeled_folder
from torchprobe.datasets.protocol import ImageSet
from torchprobe.datasets.readers import open_images, open_shards
from torchprobe.datasets.texts import Texts, text_file

__all__ = [
    "Broden", "BrodenWriter", "DatasetError", "ImageSet", "Images", "ImportReport", "LabeledImages", "image_folder", "imagenet_set",
    "import_ade20k",
    "import_binary_masks", "import_coco", "import_coco_panoptic", "import_hugging_face", "import_label_maps", "import_voc",
    "Texts", "labeled_folder", "open_images", "open_shards", "text_file", "validate",
]  # fmt: skip

__getattr__ = renamed(__name__, {"LabelledImages": "LabeledImages", "labelled_folder": "labeled_folder"})
