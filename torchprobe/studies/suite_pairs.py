"""What takes two encoders of a suite at hand: CKA of their layers, and every measure along the interpolation of their weights."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchprobe.analysis.embeddings import embed
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.interpolation import interpolate
from torchprobe.analysis.kurtosis import vector_kurtosis
from torchprobe.analysis.similarity import FEWEST, similarity
from torchprobe.datasets import Images
from torchprobe.encoders import Encoder, Head
from torchprobe.encoders.suite import Row
from torchprobe.studies.compare.saved import Saved
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret.inputs import kept_head
from torchprobe.studies.interpret.measures import IMAGENET
from torchprobe.studies.interpret.passes import sample
from torchprobe.studies.interpret.stages import Plain, Stages

if TYPE_CHECKING:
    from torchprobe.studies.suite import Inputs

ALPHAS = tuple(step / 10 for step in range(11))
"""Of the interpolation, as in WiSE-FT."""

PAIR_IMAGES = 512
"""Images over which layers are compared and batch norms recalibrated (a choice of ours)."""


def run_pair(one: tuple[Row, Saved], other: tuple[Row, Saved], inputs: Inputs, out: str | os.PathLike[str], resume: bool = False) -> Plain:
    """What takes two networks at hand: CKA of all their layers, and every measure along the interpolation of their weights.

    Each encoder comes with its saved interpretation, which says what it was made from: what is there from the same is not computed again,
    and the networks are loaded only if something is missing. What cannot be done is in ``skipped`` with the reason: weights of different
    shapes have no interpolation.
    """
    name = file_names([f"{one[0].name}--{other[0].name}"]).popitem()[1]
    stages = Stages(Path(out), resume)
    facts = {"a": one[1].made(), "b": other[1].made(), "layers": inputs.layers, "batch_size": inputs.batch_size, "seed": inputs.seed}
    pair = _Pair(one[0], other[0], [each[1].folder for each in (one, other)], inputs, resume)
    found: Plain = {"skipped": {}}
    parts = {"cka": pair.cka, "interpolation": lambda: pair.along(stages, f"{name}-along", facts)}
    for part, compute in parts.items():
        try:
            found[part] = stages.run(f"{name}-{part}", facts, compute)
        except (ValueError, RuntimeError) as error:  # noqa: PERF203 (what the two do not have in common, or an encoder that cannot be had)
            found["skipped"][part] = str(error)
    return found


class _Pair:
    """Two encoders, loaded when they are first needed."""

    def __init__(self, one: Row, other: Row, folders: Sequence[Path], inputs: Inputs, resume: bool) -> None:
        self.rows, self.folders, self.inputs, self.resume = (one, other), folders, inputs, resume

    @functools.cached_property
    def loaded(self) -> list[tuple[Encoder, Images, dict[str, Images], Head | None]]:
        """Both, with what goes with them; their heads are kept from when they were interpreted."""
        return [self.inputs.load(row, kept_head(folder, True)) for row, folder in zip(self.rows, self.folders, strict=True)]

    def cka(self) -> Plain:
        """Of all pairs of layers, in one pass."""
        (a, images, _, _), (b, images_b, _, _) = self.loaded
        few, few_b = (sample(each, PAIR_IMAGES, self.inputs.seed) for each in (images, images_b))
        return _cka(a, b, few, few_b, *self.rows, self.inputs)

    def along(self, stages: Stages, name: str, facts: Plain) -> Plain:
        """Every measure from one to the other."""
        (a, images, shifts, head_a), (b, _, _, head_b) = self.loaded
        if head_a is None or head_b is None:
            raise ValueError("one of the two has no head")
        few = sample(images, PAIR_IMAGES, self.inputs.seed)
        return _along(a, b, (head_a, head_b), {IMAGENET: images, **shifts}, few, self.inputs, stages, name, facts)


def _cka(a: Encoder, b: Encoder, images: Images, images_b: Images, one: Row, other: Row, inputs: Inputs) -> Plain:
    """All pairs of layers, in one pass."""
    size = min(inputs.batch_size, 64)
    place = inputs.device or "cpu"

    def batches() -> Any:
        left, right = images.batches(a.preprocess, size, inputs.workers), images_b.batches(b.preprocess, size, inputs.workers)
        for mine, theirs in zip(left, right, strict=True):
            if mine.names != theirs.names:
                raise ValueError(f"the two read other images of one batch: {sorted(set(mine.names) ^ set(theirs.names))[:3]}")
            if len(mine.names) >= FEWEST:
                yield mine.pixels.to(place), theirs.pixels.to(place)

    layers = list(inputs.layers) if inputs.layers is not None else None
    found = similarity(a, b, batches(), layers, layers)
    return {
        "values": found.values.tolist(),
        "layers_a": found.layers_a,
        "layers_b": found.layers_b,
        "a": one.name,
        "b": other.name,
        "images": found.images,
        "batch_size": size,
    }


def _along(
    a: Encoder,
    b: Encoder,
    heads: tuple[Head, Head],
    sets: Mapping[str, Images],
    few: Images,
    inputs: Inputs,
    stages: Stages,
    name: str,
    facts: Plain,
) -> Plain:
    """Accuracy on every set, and the vector kurtosis of the representation, from the first network to the second; each step is kept."""
    if heads[0].normalize != heads[1].normalize:
        raise ValueError("one head sees vectors of length 1, the other does not")
    first, second = (
        Encoder(encoder.visual, features=encoder.features, preprocess=encoder.preprocess, name=encoder.name, head=_scaled(head))
        for encoder, head in ((a, heads[0]), (b, _in_order(heads[1], heads[0])))
    )
    place = inputs.device or "cpu"
    calibration = [batch.pixels.to(place) for batch in few.batches(a.preprocess, inputs.batch_size, inputs.workers) if batch.names]

    def measured(mixed: Encoder) -> Plain:
        assert mixed.head is not None
        accuracy, kurtosis = {}, math.nan
        for which, images in sets.items():
            embeddings = embed(mixed, images, batch_size=inputs.batch_size, device=inputs.device, workers=inputs.workers)
            accuracy[which] = evaluate(mixed.head, embeddings).accuracy
            if which == IMAGENET:
                kurtosis = float(vector_kurtosis(embeddings.h).nanmean())
        return {"accuracy": accuracy, "kurtosis": kurtosis}

    steps = [
        stages.run(f"{name}-{alpha:g}", facts | {"alpha": alpha}, functools.partial(measured, mixed))
        for alpha, mixed in interpolate(first, second, ALPHAS, recalibrate=calibration)
    ]
    return {
        "alphas": list(ALPHAS),
        "accuracy": {which: [step["accuracy"][which] for step in steps] for which in sets},
        "kurtosis": [step["kurtosis"] for step in steps],
    }


def _in_order(head: Head, other: Head) -> Head:
    """The head with its rows in the order of the other's, where both name the same classes; as it is where the names say nothing."""
    if head.names is None or other.names is None or head.names == other.names or sorted(head.names) != sorted(other.names):
        return head
    rows = [head.names.index(name) for name in other.names]
    bias = None if head.bias is None else head.bias.detach()[rows]
    return Head(head.weight.detach()[rows], bias, normalize=head.normalize, names=other.names)


def _scaled(head: Head) -> Head:
    """The head with a weight of length 1 in all, and a bias: no decision changes, and a head with large logits does not outweigh the other
    (a choice of ours; a zero-shot head has rows of length 1, a trained one whatever it needed)."""
    size = torch.linalg.matrix_norm(head.weight.detach())
    bias = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
    return Head(head.weight.detach() / size, bias.detach() / size, normalize=head.normalize, names=head.names)
