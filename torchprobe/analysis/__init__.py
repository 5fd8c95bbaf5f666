"""The measures of "Interpreting CLIP" (TMLR 2024). Each can be used alone.

================================  ============================================================================================
:func:`embed`                     an encoder and images → their :class:`Embeddings`
:func:`evaluate`                  the accuracy of a head on embeddings
:func:`vector_kurtosis`           the measure of outlier features; :func:`summarize` adds its controls
:func:`rotation_control`          the same after random rotations of the axes
:func:`outlier_features`          the outlier features, and a table of all features
:func:`provenance`                which blocks and parameters write an outlier feature, and what happens when one of them is changed
:func:`ablate`                    representations without some features; :func:`ablation` measures the loss of accuracy
:func:`privileged_directions`     the singular directions of a head and their importance; :func:`centered` subtracts its class mean
:func:`split`                     images to measure importance on, and other images to evaluate on
:func:`prune`                     a head without some of its directions; :func:`pruning_curve`, :func:`pruning_bands`
:func:`concepts`                  the concepts that units and directions encode, with nulls; :func:`concept_sweep`
:func:`effective_robustness`      accuracy under shift beyond what standard models have; :func:`robustness`, :class:`Baseline`
:func:`cka`                       the similarity of the layers of two models; :func:`similarity` adds names and a heat map
:func:`interpolate`               models between two models
:func:`rank_correlation`          do two numbers rise together over models?
:func:`bootstrap_interval`        how certain a mean is; :func:`share_interval`, :func:`paired_difference`: an accuracy, two accuracies
:func:`compare_recordings`        what changed between two recordings, layer by layer, beyond the noise of their windows
:func:`modality_gap`              how far apart images and texts lie in their common space, and which features carry that
================================  ============================================================================================

=====================  ========================================================================================
file                   subject
=====================  ========================================================================================
``embeddings``         representations of images; ``embeddings_file`` is their file, written batch by batch
``positions``          a layer at some of its positions as the representation; ``vectors`` has the rows that a batch then gives
``hidden_states``      the outlier features of layers, and the kinds of positions at which they live
``reading``            batches of pixels and labels
``given``              representations that are given as arrays; ``given_files`` reads them from files
``inputs``             the arguments that most measures share
``evaluation``         accuracy of a head
``decisions``          the class that a head decides for: an exact argmax
``kurtosis``           vector kurtosis and its controls
``outlier_rule``       the bulk of a vector, what lies outside, and what is beyond chance
``outliers``           outlier features: our rule, LLM.int8, massive activations, registers, He et al.
``long_tokens``        tokens that are much longer than the others of their input, such as registers
``provenance``         where outlier features come from: blocks, submodules, parameters
``ablation``           accuracy without some features
``directions``         singular directions of a head, and their importance
``pruning``            accuracy with fewer directions
``concepts``           concepts of units and directions
``baseline``           standard models and their line, for effective robustness; ``standard_models``: the published ones
``robustness``         effective robustness; ``robustness_intervals``: how certain it is
``similarity``         linear CKA of layers; ``grams`` has the Gram matrices behind it
``interpolation``      weights between two models; batch norms measured again
``modality``           the gap between two modalities
``changes``            what changed between two recordings; ``layer_distance``: of the features of a layer; ``window_noise``: the test;
                       ``change_sides``: recordings of several ranks as one
``resampling``         bootstrap intervals, bands of draws, rank correlation
``shares``             intervals of accuracies and of their paired differences
=====================  ========================================================================================
"""

from torchprobe.analysis.ablation import Ablation, ablate, ablation
from torchprobe.analysis.baseline import FITS, SHIFTS, Baseline, Fit
from torchprobe.analysis.changes import FieldChange, LayerChange, RecordingComparison, compare_recordings
from torchprobe.analysis.concepts import concept_names, concept_overlap, concept_sweep, concepts, in_basis
from torchprobe.analysis.directions import Directions, centered, privileged_directions, split
from torchprobe.analysis.embeddings import Embeddings, embed
from torchprobe.analysis.evaluation import Evaluation, evaluate
from torchprobe.analysis.interpolation import interpolate
from torchprobe.analysis.kurtosis import KurtosisSummary, RotationControl, rotation_control, summarize, vector_kurtosis
from torchprobe.analysis.modality import ModalityGap, modality_gap
from torchprobe.analysis.outliers import OutlierFeatures, outlier_features
from torchprobe.analysis.provenance import Provenance, provenance
from torchprobe.analysis.pruning import PruningBands, PruningCurve, prune, pruning_bands, pruning_curve
from torchprobe.analysis.resampling import RankCorrelation, bootstrap_interval, rank_correlation
from torchprobe.analysis.robustness import RobustnessTable, effective_robustness, mean_effective_robustness, robustness
from torchprobe.analysis.shares import paired_difference, share_interval
from torchprobe.analysis.similarity import Similarity, cka, similarity
from torchprobe.common.deprecation import renamed

__all__ = [
    "embed",
    "Embeddings",
    "evaluate",
    "Evaluation",
    "vector_kurtosis",
    "summarize",
    "KurtosisSummary",
    "rotation_control",
    "RotationControl",
    "outlier_features",
    "OutlierFeatures",
    "provenance",
    "Provenance",
    "ablate",
    "ablation",
    "Ablation",
    "privileged_directions",
    "Directions",
    "centered",
    "split",
    "prune",
    "pruning_curve",
    "PruningCurve",
    "pruning_bands",
    "PruningBands",
    "concepts",
    "concept_sweep",
    "concept_names",
    "concept_overlap",
    "in_basis",
    "effective_robustness",
    "mean_effective_robustness",
    "robustness",
    "RobustnessTable",
    "Baseline",
    "Fit",
    "FITS",
    "SHIFTS",
    "cka",
    "similarity",
    "Similarity",
    "interpolate",
    "compare_recordings",
    "RecordingComparison",
    "LayerChange",
    "FieldChange",
    "modality_gap",
    "ModalityGap",
    "rank_correlation",
    "RankCorrelation",
    "bootstrap_interval",
    "share_interval",
    "paired_difference",
]

__getattr__ = renamed(__name__, {"summarise": "summarize", "centred": "centered"})
