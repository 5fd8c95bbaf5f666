"""The measures of "Interpreting CLIP" (TMLR 2024), each usable alone.

================================  ==============================================================================================
:func:`embed`                     an encoder and images: their :class:`Embeddings`
:func:`evaluate`                  how often a head is right on them
:func:`vector_kurtosis`           the measure of outlier features; :func:`summarise` gives it with its controls
:func:`rotation_control`          the same with the axes forgotten
:func:`outlier_features`          which features, and what they are like
:func:`ablate`                    representations without some features; :func:`ablation` measures what it costs
:func:`privileged_directions`     the singular directions of a head and their importance; :func:`centred`, without the mean over classes
:func:`split`                     images to measure importance on, and others to evaluate on
:func:`prune`                     a head without some of its directions; :func:`pruning_curve`, :func:`pruning_bands`
:func:`concepts`                  what units and directions encode, beside the nulls; :func:`concept_sweep`
:func:`effective_robustness`      accuracy under shift beyond what standard models have; :func:`robustness`, :class:`Baseline`
:func:`cka`                       how alike the layers of two models are; :func:`similarity`
:func:`interpolate`               models between two models
:func:`rank_correlation`          do two numbers rise together over models?
:func:`bootstrap_interval`        how sure a mean is
================================  ==============================================================================================

The definitions of outliers by others – LLM.int8, massive activations, registers, He et al. – are in
:mod:`torchprobe.analysis.outliers` under their names.
"""

from torchprobe.analysis.ablation import Ablation, ablate, ablation
from torchprobe.analysis.baseline import FITS, SHIFTS, Baseline, Fit
from torchprobe.analysis.concepts import concept_names, concept_overlap, concept_sweep, concepts, in_basis
from torchprobe.analysis.correlation import RankCorrelation, rank_correlation
from torchprobe.analysis.directions import Directions, centred, privileged_directions, split
from torchprobe.analysis.embeddings import Embeddings, embed
from torchprobe.analysis.evaluation import Evaluation, evaluate
from torchprobe.analysis.interpolation import interpolate
from torchprobe.analysis.intervals import bootstrap_interval
from torchprobe.analysis.kurtosis import KurtosisSummary, RotationControl, rotation_control, summarise, vector_kurtosis
from torchprobe.analysis.outliers import OutlierFeatures, outlier_features
from torchprobe.analysis.pruning import PruningBands, PruningCurve, prune, pruning_bands, pruning_curve
from torchprobe.analysis.robustness import RobustnessTable, effective_robustness, mean_effective_robustness, robustness
from torchprobe.analysis.similarity import Similarity, cka, similarity

__all__ = [
    "embed",
    "Embeddings",
    "evaluate",
    "Evaluation",
    "vector_kurtosis",
    "summarise",
    "KurtosisSummary",
    "rotation_control",
    "RotationControl",
    "outlier_features",
    "OutlierFeatures",
    "ablate",
    "ablation",
    "Ablation",
    "privileged_directions",
    "Directions",
    "centred",
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
    "rank_correlation",
    "RankCorrelation",
    "bootstrap_interval",
]
