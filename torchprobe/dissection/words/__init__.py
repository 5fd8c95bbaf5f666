"""Words as concepts, for images without labels: another model, the labeler, says how much each image shows each word.

=========================  ==================================================================================
:func:`dissect_words`      a model, some layers, images, a labeler: a :class:`WordDissection` for each layer
:class:`WordDissection`    which words the units of a layer agree with; saved, summarized, drawn
:class:`Concepts`          words with kinds; :func:`read_concepts` reads a file, :func:`builtin_concepts` are 1,000
:class:`SoftLabels`        how much each image shows each word; from a labeler, from embeddings, from a file
:func:`match`              the measure of scores and soft labels, with p-values; :data:`MEASURES` lists them
=========================  ==================================================================================

================  =======================================================================
file              subject
================  =======================================================================
``dissect``       the arguments of :func:`dissect_words`, and its stages
``passes``        the two passes over the images
``concepts``      words and their captions; ``concepts.txt`` is the built-in list
``soft_labels``   soft labels, their files, and what a labeler is
``measures``      the measures of CLIP-Dissect, and average precision
``matching``      permutations
``word_tables``   the tables of one layer
``result``        the same, saved, loaded and drawn
``report``        its page
================  =======================================================================
"""

from torchprobe.dissection.words.concepts import Concepts, builtin_concepts, read_concepts
from torchprobe.dissection.words.dissect import dissect_words
from torchprobe.dissection.words.matching import Match, match
from torchprobe.dissection.words.measures import MEASURES, WPMI, CosineCubed, RankReorder, SoftWPMI, TopPrecision
from torchprobe.dissection.words.result import WordDissection
from torchprobe.dissection.words.soft_labels import CAVEAT, SoftLabels, embed_concepts, read_soft_labels
from torchprobe.dissection.words.word_tables import UnitWord

__all__ = [
    "dissect_words",
    "WordDissection",
    "UnitWord",
    "Concepts",
    "builtin_concepts",
    "read_concepts",
    "SoftLabels",
    "read_soft_labels",
    "embed_concepts",
    "CAVEAT",
    "match",
    "Match",
    "MEASURES",
    "SoftWPMI",
    "WPMI",
    "CosineCubed",
    "RankReorder",
    "TopPrecision",
]
