"""Many encoders, one after the other, and the comparison of them: the study of the paper."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchprobe.analysis.baseline import Baseline, X
from torchprobe.analysis.embeddings import embed
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.interpolation import interpolate
from torchprobe.analysis.kurtosis import vector_kurtosis
from torchprobe.analysis.similarity import FEWEST, similarity
from torchprobe.datasets import Broden, DatasetError, Images
from torchprobe.dissection.progress import Told
from torchprobe.dissection.ranks import Ranks
from torchprobe.encoders import Encoder, EncoderError, Head
from torchprobe.encoders.encoder import Template
from torchprobe.encoders.suite import Row
from torchprobe.studies.compare import Comparison, compare
from torchprobe.studies.compare.pairs import pairs_within
from torchprobe.studies.compare.saved import load_results
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret import interpret
from torchprobe.studies.interpret.inputs import gather
from torchprobe.studies.interpret.measures import IMAGENET
from torchprobe.studies.interpret.run import sample
from torchprobe.studies.interpret.stages import Plain, Stages

ALPHAS = tuple(step / 10 for step in range(11))
"""Of the interpolation, as in WiSE-FT."""

PAIR_IMAGES = 512
"""Images over which layers are compared and batch norms recalibrated (a choice of ours)."""


@dataclass
class Inputs:
    """What every encoder of a suite is shown.

    Args:
        images: the folder of the unshifted images, see :func:`torchprobe.studies.interpret.inputs.load_images`.
        shifts: name → folder.
        broden: concepts, or None.
        baseline, x: of effective robustness.
        templates: of zero-shot heads; None: those of ImageNet.
        limit: take so many images of each set, chosen at random.
        layers: to record and to compare; None: the blocks.
        layer_images: see :func:`torchprobe.studies.interpret.interpret`.
        batch_size, device, workers, seed: of every run.
    """

    images: Path
    shifts: Mapping[str, Path] = field(default_factory=dict)
    broden: Broden | None = None
    baseline: Baseline | None = None
    x: X = "full"
    templates: Sequence[Template] | None = None
    limit: int | None = None
    layers: Sequence[str] | None = None
    layer_images: int = 1024
    batch_size: int = 64
    device: torch.device | str | None = None
    workers: int = 2
    seed: int = 0

    def load(self, row: Row) -> tuple[Encoder, Images, dict[str, Images], Head | None]:
        """An encoder of the suite with what goes with it."""
        encoder = row.load()
        head = row.head
        images, shifts, made = gather(encoder, self.images, self.shifts, head, self.templates, self.limit, self.seed)
        if made is not None and row.normalize is not None and row.normalize != made.normalize:
            made = Head(made.weight.detach(), None if made.bias is None else made.bias.detach(), normalize=row.normalize, names=made.names)
        return encoder, images, shifts, made


def run_suite(
    rows: Sequence[Row],
    inputs: Inputs,
    out: str | os.PathLike[str],
    *,
    pairs: bool = True,
    resume: bool = False,
    progress: Told | None = None,
    say: Callable[[str], object] = lambda message: None,
) -> Comparison:
    """Interprets every encoder of a suite and compares them.

    Each goes into a folder of its own beneath ``out``; the comparison is returned
    (:func:`torchprobe.studies.compare.write` puts it beside them). An encoder that cannot be had – no weights,
    its checkpoint is to be filled in – is skipped, and the comparison says why.

    Args:
        rows: from :func:`torchprobe.encoders.suite.load_suite`.
        inputs: what all are shown.
        out: a folder.
        pairs: load the encoders of one backbone in pairs again, for CKA of their layers and for weight interpolation; see :func:`run_pair`.
        resume: encoders that are finished are not run again, and unfinished ones go on.
        progress: see :func:`torchprobe.studies.interpret.interpret`.
        say: is told which encoder is next, and which are skipped.

    Raises:
        EncoderError: fewer than two encoders could be had; with the reasons.
        DatasetError: the images cannot be used.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names([row.name for row in rows])
    done: list[Row] = []
    skipped: list[dict[str, str]] = []
    for row in rows:
        why = row.missing()
        if why is None:
            say(row.name)
            try:
                _interpret(row, inputs, folder / names[row.name], resume, progress)
                done.append(row)
                continue
            except EncoderError as error:
                why = str(error)
        skipped.append({"model": row.name, "why": why})
        say(f"{row.name} is skipped: {why}")
    if len(done) < 2:
        reasons = "; ".join(f"{one['model']}: {one['why']}" for one in skipped)
        raise EncoderError(f"{len(done)} of {len(rows)} encoders of the suite could be run, a comparison takes two. {reasons}")
    with Ranks() as ranks:
        found = None
        if ranks.first:
            folders = [folder / names[row.name] for row in done]
            extras = _pairs(done, folders, inputs, folder / "pairs", resume, ranks.size, say) if pairs else {}
            found = compare(folders, extras=extras, skipped=skipped, seed=inputs.seed)
        shared: Comparison = ranks.from_first(found)
    return shared


def _pairs(
    rows: Sequence[Row], folders: Sequence[Path], inputs: Inputs, out: Path, resume: bool, ranks: int, say: Callable[[str], object]
) -> dict[str, dict[str, Any]]:
    by_name = {row.name: row for row in rows}
    extras: dict[str, dict[str, Any]] = {}
    for one, other in pairs_within([load_results(each) for each in folders]):
        say(f"{one.name} and {other.name}")
        if ranks > 1:
            why = "one process computes it: run the same command once more without torchrun, with --resume"
            extras[f"{one.name} → {other.name}"] = {"skipped": {"CKA and interpolation": why}}
        else:
            extras[f"{one.name} → {other.name}"] = run_pair(by_name[one.name], by_name[other.name], inputs, out, resume)
    return extras


def _interpret(row: Row, inputs: Inputs, out: Path, resume: bool, progress: Told | None) -> None:
    encoder, images, shifts, head = inputs.load(row)
    about = {"name": row.name, "role": row.role, "backbone": row.backbone, "pretraining": row.pretraining, "source": row.source}
    interpret(
        encoder,
        images,
        out,
        head=head,
        shifts=shifts,
        broden=inputs.broden,
        baseline=inputs.baseline,
        x=inputs.x,
        layers=inputs.layers,
        layer_images=inputs.layer_images,
        about=about,
        published=row.accuracy,
        batch_size=inputs.batch_size,
        device=inputs.device,
        workers=inputs.workers,
        seed=inputs.seed,
        resume=resume,
        progress=progress,
    )


def run_pair(one: Row, other: Row, inputs: Inputs, out: str | os.PathLike[str], resume: bool = False) -> Plain:
    """What takes two networks at hand: CKA of all their layers, and every measure along the interpolation of their weights.

    What cannot be done is in ``skipped`` with the reason: weights of different shapes have no interpolation.
    """
    (a, images, shifts, head_a), (b, images_b, _, head_b) = inputs.load(one), inputs.load(other)
    place = inputs.device or "cpu"
    a, b = a.to(place), b.to(place)
    facts = {"a": one.source + (one.checkpoint or ""), "b": other.source + (other.checkpoint or ""), "images": str(inputs.images)}
    facts |= {"limit": str(inputs.limit), "seed": str(inputs.seed), "layers": str(inputs.layers)}
    stages = Stages(Path(out), resume)
    name = file_names([f"{one.name}--{other.name}"]).popitem()[1]
    few, few_b = sample(images, PAIR_IMAGES, inputs.seed), sample(images_b, PAIR_IMAGES, inputs.seed)
    found: Plain = {"skipped": {}}
    try:
        found["cka"] = stages.run(f"{name}-cka", facts, lambda: _cka(a, b, few, few_b, one, other, inputs))
    except (ValueError, DatasetError) as error:
        found["skipped"]["CKA"] = str(error)
    if head_a is None or head_b is None:
        found["skipped"]["interpolation"] = "one of the two has no head"
        return found
    heads = head_a, head_b
    try:
        found["interpolation"] = stages.run(
            f"{name}-interpolation",
            facts | {"shifts": str(sorted(shifts))},
            lambda: _along(a, b, heads, {IMAGENET: images, **shifts}, few, inputs),
        )
    except ValueError as error:
        found["skipped"]["interpolation"] = str(error)
    return found


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


def _along(a: Encoder, b: Encoder, heads: tuple[Head, Head], sets: Mapping[str, Images], few: Images, inputs: Inputs) -> Plain:
    """Accuracy on every set, and the vector kurtosis of the representation, from the first network to the second."""
    if heads[0].normalize != heads[1].normalize:
        raise ValueError("one head sees vectors of length 1, the other does not")
    first, second = (
        Encoder(encoder.visual, features=encoder.features, preprocess=encoder.preprocess, name=encoder.name, head=_scaled(head))
        for encoder, head in ((a, heads[0]), (b, _in_order(heads[1], heads[0])))
    )
    place = inputs.device or "cpu"
    calibration = [batch.pixels.to(place) for batch in few.batches(a.preprocess, inputs.batch_size, inputs.workers) if batch.names]
    accuracy: dict[str, list[float]] = {name: [] for name in sets}
    kurtosis = []
    for _, mixed in interpolate(first, second, ALPHAS, recalibrate=calibration):
        assert mixed.head is not None
        for name, images in sets.items():
            embeddings = embed(mixed, images, batch_size=inputs.batch_size, device=inputs.device, workers=inputs.workers)
            accuracy[name].append(evaluate(mixed.head, embeddings).accuracy)
            if name == IMAGENET:
                kurtosis.append(float(vector_kurtosis(embeddings.h).nanmean()))
    return {"alphas": list(ALPHAS), "accuracy": accuracy, "kurtosis": kurtosis}


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
