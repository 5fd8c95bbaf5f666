"""Units against concepts: what the units of a layer detect, and what of that is beyond chance.

============================  ====================================================================
:func:`dissect`               a model, some layers and Broden: a :class:`Dissection` for each layer
:class:`Dissection`           what the units of a layer detect; saved, merged, summarized
:func:`dissect_words`         a model, some layers, images and a labeler: a :class:`WordDissection` for each layer
:func:`segment_pictures`      its units on new pictures, each a :class:`SegmentedPicture`
:func:`compare_dissections`   two of them, unit by unit and concept by concept
:func:`singular_vectors`      directions of a head; :func:`random_rotation` is their control
:func:`read_basis`            directions or a sparse autoencoder from a file; :class:`SparseBasis`
:class:`Overlap`              counts of pixels over a data set; mergeable; their :class:`Counts`
:class:`ShuffledOverlap`      the same for exchanged labels: the null of IoU, :class:`IoUNull`
:class:`LabelBatch`           the labels of a batch of images
:func:`as_maps`               an activation as maps with positions
:func:`average_precision`     how well each unit ranks the images of each concept
:func:`support`               among how many images, and how many of them show it; prevalence
:func:`pool`                  a map as one score
:func:`concept_matrix`        which image shows which concept
:func:`p_values`              the null; :func:`permutation_test` if scores have ties
:func:`correct`               p-values corrected for multiple tests
:func:`unique_detectors`      detectors and their concepts, counted as in the original
:func:`encoded`               pairs of unit and concept beyond threshold and chance
============================  ====================================================================

=====================  =========================================================================
file                   subject
=====================  =========================================================================
``dissect``            the arguments of :func:`dissect`
``run``                its stages: the pass through the network, the pass over the labels, then the tables
``walk``               one pass, shared by ranks; its checkpoint and how it is resumed
``facts``              what a checkpoint depends on, beside the metadata
``batches``            images and labels in batches; ``framing`` cuts labels to what the network was shown
``spool``              maps on the disk, while thresholds are being learned
``shown``              which labels the images show, where the network looked
``top_maps``           the maps of the top images, for the page
``taps``               activations as maps, in units, along directions, or as latents
``sparse``             encoders of latents, and how often these are active; ``sparse_file`` reads them
``bases``              what the argument ``basis`` stands for
``words``              words as concepts, for images without labels
``overlap``            intersection over union, from counts of pixels
``iou_null``           IoU against its null
``average_precision``  average precision of units; images that show a concept
``ranking``            images ranked by units
``nulls``              p-values and their correction
``activity``           units that are never active, and why
``layer_tables``       the tables of one layer; ``scores``: what follows from them
``merging``            adding the results of two parts of the images
``dissection``         the same, saved and loaded; ``dissection_file`` says what a file must hold
``csv_tables``         the same as CSV, with the columns of the original; ``result_file`` reads it
``summaries``          detectors, concepts, concepts per unit
``segment``            units on new pictures; ``detectors``: which units, for which concepts
``report_images``      what a report says of the images
``concepts``           from each concept to its units
``comparing``          two dissections, unit by unit and concept by concept
``report``             the page; ``report_text`` and ``report_sparse`` have its words, ``report_pictures`` its pictures
``evidence``           the pixels that contribute to a unit
=====================  =========================================================================
"""

from torchprobe.common.runs import Progress
from torchprobe.dissection.average_precision import average_precision, concept_matrix, gain, pool, support
from torchprobe.dissection.batches import LabelBatch
from torchprobe.dissection.comparing import DissectionComparison, compare_dissections
from torchprobe.dissection.dissect import dissect
from torchprobe.dissection.dissection import Dissection
from torchprobe.dissection.iou_null import IoUNull, ShuffledOverlap
from torchprobe.dissection.nulls import correct, p_values, permutation_test
from torchprobe.dissection.overlap import Counts, Overlap
from torchprobe.dissection.scores import UnitConcept
from torchprobe.dissection.segment import SegmentedPicture, Segmenter, segment_pictures
from torchprobe.dissection.sparse import SparseBasis, SparseEncoder
from torchprobe.dissection.sparse_file import read_basis, sparse_basis
from torchprobe.dissection.summaries import best_labels, encoded, polysemanticity, unique_concepts, unique_detectors
from torchprobe.dissection.taps import RandomRotation, as_maps, random_rotation, singular_vectors
from torchprobe.dissection.words import WordDissection, dissect_words

__all__ = [
    "dissect",
    "Dissection",
    "segment_pictures",
    "SegmentedPicture",
    "Segmenter",
    "compare_dissections",
    "DissectionComparison",
    "UnitConcept",
    "dissect_words",
    "WordDissection",
    "Progress",
    "singular_vectors",
    "RandomRotation",
    "random_rotation",
    "SparseBasis",
    "SparseEncoder",
    "read_basis",
    "sparse_basis",
    "Overlap",
    "Counts",
    "ShuffledOverlap",
    "IoUNull",
    "LabelBatch",
    "as_maps",
    "average_precision",
    "support",
    "pool",
    "gain",
    "concept_matrix",
    "p_values",
    "permutation_test",
    "correct",
    "best_labels",
    "unique_detectors",
    "encoded",
    "unique_concepts",
    "polysemanticity",
]
