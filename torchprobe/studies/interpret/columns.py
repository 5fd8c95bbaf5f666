"""The columns of the tables of an interpretation, each with what it is in a line."""

from __future__ import annotations

from torchprobe.analysis.intervals import LEVEL
from torchprobe.rendering.tables import Column

ACCURACY_COLUMNS = (
    Column("set", "images", "which images; “imagenet” are the unshifted ones, whatever they are", "text"),
    Column("accuracy", "accuracy", "share of the images whose class has the largest logit", "share"),
    Column("low", "from", f"{LEVEL:.0%} interval over images: lower end", "share"),
    Column("high", "to", f"{LEVEL:.0%} interval over images: upper end", "share"),
    Column("top5", "top 5", "share of the images whose class is among the five largest logits", "share"),
    Column("images", "n", "labelled images", "count"),
    Column("classes", "classes", "rows of the head that compete", "count"),
    Column("unlabelled", "unlabelled", "images whose class is not known: left out", "count", optional=True),
    Column("outside", "outside", "images of other classes: left out", "count", optional=True),
    Column("nonfinite", "nonfinite", "images with nan or inf in their representation: counted as wrong", "count", optional=True),
)

ROBUSTNESS_COLUMNS = (
    Column("shift", "shift", "the shifted images; “mean”: of the mean accuracy over the five ImageNet shifts", "text"),
    Column("accuracy", "accuracy %", "accuracy under the shift, per cent"),
    Column("imagenet", "unshifted %", "accuracy on the unshifted images, per cent: the x axis of the fit"),
    Column("predicted", "expected %", "what a standard model of that unshifted accuracy has under the shift"),
    Column("effective_robustness", "ER", "accuracy − expected, percentage points"),
    Column("low", "from", f"{LEVEL:.0%} prediction interval of one more standard model, lower end of ER"),
    Column("high", "to", "its upper end"),
    Column("note", "note", "extrapolated beyond the standard models; a poor fit", "text"),
)

DIRECTION_COLUMNS = (
    Column("direction", "direction", "index, by falling singular value", "index"),
    Column("singular_value", "σ", "singular value of the head"),
    Column("importance", "importance", "σ · mean |cos(v, h)| over images"),
    Column("alignment", "alignment", "Σ v_j² over the outlier features: how far the direction lies along them", "share"),
    Column("gap", "gap", "distance to the nearest other σ, in units of the largest; near 1e-7 the direction itself is not determined"),
)

ABLATION_COLUMNS = (
    Column("how", "replaced by", "zero, or the mean of the feature over the other half of the images", "text"),
    Column("features", "features", "how many", "count"),
    Column("accuracy", "whole", "accuracy with all features", "share"),
    Column("ablated", "outliers ablated", "accuracy without the outlier features", "share"),
    Column("random_mean", "random ablated", "accuracy without equally many other features, mean over draws", "share"),
    Column("random_low", "from", f"{LEVEL:.0%} of the draws: lower end", "share"),
    Column("random_high", "to", f"{LEVEL:.0%} of the draws: upper end", "share"),
)

CONCEPT_COLUMNS = (
    Column("basis", "basis", "the axes, the directions of the head, and the controls", "text"),
    Column("unique", "unique concepts", "concepts that some direction encodes", "count"),
    Column("encoding", "encoding", "directions with at least one concept", "count"),
    Column("polysemanticity", "polysemanticity", "concepts per direction, mean over all directions"),
    Column("polysemanticity_encoding", "per encoding one", "the same, mean over the directions with at least one concept"),
)

BEST_COLUMNS = (
    Column("basis", "basis", "axes, or directions of the head", "text"),
    Column("unit", "index", "of the unit or direction", "index"),
    Column("label", "concept", "the one with the largest gain", "text"),
    Column("category", "category", "of the concept", "text"),
    Column("average_precision", "AP", "average precision"),
    Column("prevalence", "prevalence", "share of the annotated images that show it: what chance gives, about", "share"),
    Column("gain", "gain", "(AP − prevalence) / (1 − prevalence)"),
    Column("p_value", "p", "of this pair by itself, uncorrected"),
)

SKIPPED_COLUMNS = (Column("section", "section", "what is missing", "text"), Column("why", "why", "the input that was not there", "text"))
