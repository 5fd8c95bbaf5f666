"""Segmentation data sets of other formats, written in the format of Broden.

==============================  ====================================================================
:func:`import_coco`             COCO instances: JSON with polygons and run lengths
:func:`import_coco_panoptic`    COCO panoptic: JSON and PNG files of segment ids
:func:`import_ade20k`           ADE20K: the scene parsing challenge, or the full set with parts
:func:`import_voc`              Pascal VOC: palette PNG files and lists of images
:func:`import_label_maps`       one mask of class indices for each image
:func:`import_binary_masks`     one folder of binary masks for each concept
:func:`import_hugging_face`     data sets of the Hugging Face library, or any iterable of dicts
:class:`ImportReport`           what was written, dropped and changed
==============================  ====================================================================

===================  ==================================================================
file                 subject
===================  ==================================================================
``coco``             instances
``coco_panoptic``    panoptic segments
``coco_tables``      the images and categories of both
``coco_masks``       polygons and run lengths become pixels
``json_arrays``      large JSON files, element by element
``ade20k``           both forms
``voc``              Pascal VOC
``mask_folders``     label maps, binary masks
``hugging_face``     rows with an image and a label map
``conversion``       what all share: the new folder, its options, names of images
``files``            which files belong together; paths stay inside their folder
``pictures``         opens images and masks
``values``           from the values of a mask to labels: unlabeled, void, unknown
``planes``           overlapping masks become label maps
``report``           :class:`ImportReport`
===================  ==================================================================
"""

from torchprobe.datasets.importers.ade20k import import_ade20k
from torchprobe.datasets.importers.coco import import_coco
from torchprobe.datasets.importers.coco_panoptic import import_coco_panoptic
from torchprobe.datasets.importers.hugging_face import import_hugging_face
from torchprobe.datasets.importers.mask_folders import import_binary_masks, import_label_maps
from torchprobe.datasets.importers.report import ImportReport
from torchprobe.datasets.importers.voc import import_voc

__all__ = [
    "ImportReport", "import_ade20k", "import_binary_masks", "import_coco", "import_coco_panoptic", "import_hugging_face",
    "import_label_maps", "import_voc",
]  # fmt: skip
