"""From a model, a folder of images and words to what the units of its layers agree with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchprobe.common.messages import stable_repr
from torchprobe.common.networks import modules_fact
from torchprobe.common.ranks import Ranks
from torchprobe.common.runs import Clock, ProgressCallback
from torchprobe.common.storage import digest
from torchprobe.datasets.geometry import fingerprint
from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.protocol import ImageSet
from torchprobe.datasets.readers import open_images
from torchprobe.dissection.bases import Basis, basis_of, check_layers, describe_basis
from torchprobe.dissection.batches import Preprocess
from torchprobe.dissection.facts import run_facts, transform_fact
from torchprobe.dissection.ranking import top_images
from torchprobe.dissection.taps import POSITIONS, Site, find_sites
from torchprobe.dissection.walk import Checkpoint
from torchprobe.dissection.words.concepts import Concepts, find_concepts
from torchprobe.dissection.words.matching import find_measure, match
from torchprobe.dissection.words.measures import AnyMeasure, TopPrecision
from torchprobe.dissection.words.passes import ImagePass, ImageScores, check_labeler, images_fact, label_images, read_layers
from torchprobe.dissection.words.result import WordDissection
from torchprobe.dissection.words.soft_labels import CAVEAT, SoftLabels, labeler_name, labeler_weights
from torchprobe.recording.layers import Selection, select_layers
from torchprobe.recording.reader import LayerReader


def dissect_words(
    model: nn.Module,
    layers: Selection,
    images: ImageSet | str | os.PathLike[str] | Any,
    labeler: Any,
    concepts: Concepts | Sequence[str] | str | os.PathLike[str] | None = None,
    *,
    measure: str | AnyMeasure = "soft_wpmi",
    templates: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    permutations: int = 99,
    basis: Basis = None,
    positions: str = "patch",
    feature_dim: int | Mapping[str, int] | None = None,
    pooling: str = "mean",
    top: int = 20,
    preprocess: Preprocess | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    workers: int = 2,
    seed: int = 0,
    keep_scores: bool = False,
    save_labels: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, WordDissection]:
    """Compares every unit of some layers with words, over images without labels: CLIP-Dissect (Oikarinen & Weng, ICLR 2023).

    Another model, the labeler, says how much each image shows each word. A unit and a word agree if the unit is high on the images that the
    labeler finds close to the word. The p-values say how often a unit that is unrelated to the words agrees as well; see :func:`match`.
    They do not say that the labeler is right.

    The images pass the labeler once, and the model once. Memory is needed for the activations (units × images, float32), the soft labels
    (images × concepts, a few tables of float64) and the result (units × concepts, a few tables of float64). Under ``torchrun`` the ranks
    share the passes, and every rank returns the same result.

    Args:
        model: an :class:`torchprobe.Encoder` or any module that takes images (N, 3, H, W). It runs in eval mode, without gradients.
        layers: see :func:`torchprobe.record`.
        images: what :func:`torchprobe.datasets.open_images` takes: a folder, images, shards, a data set … Images that cannot be read are
            left out and named in ``metadata``.
        labeler: a CLIP encoder (:func:`torchprobe.load_encoder`), or any module with ``preprocess`` and ``encode_text``; or
            :class:`SoftLabels`, which have their own concepts.
        concepts: words, :class:`Concepts`, or a file of them (:func:`read_concepts`). Default: the built-in list.
        measure: "soft_wpmi", "wpmi", "cosine_cubed", "rank_reorder" or "average_precision"; see :data:`MEASURES`.
        templates: captions for the words; see :func:`embed_concepts`.
        permutations: for the p-values, see :func:`match`.
        basis: directions (k, features), a :class:`SparseBasis` or a module from features to latents; one for all layers, or by layer; or
            "rotation" for a random rotation with ``seed``.
        positions: which tokens: "patch" (without class token and registers), "class" or "all".
        feature_dim: see :func:`torchprobe.record`.
        pooling: how a map becomes one activation for an image: "mean", as in CLIP-Dissect, or "max".
        top: top images to keep for each unit; 0 for none.
        preprocess: PIL image → tensor (3, H, W), without random steps. Default: that of the encoder.
        batch_size: images in a batch. A network gives slightly different numbers in batches of another size.
        device: where model and labeler run; default: where each is.
        workers: threads that decode images.
        seed: of permutations and of the rotation.
        keep_scores: keep activations and soft labels in the result.
        save_labels: a file for the soft labels, which :func:`read_soft_labels` reads, for other models over the same images.
        checkpoint, checkpoint_every, resume, progress, stop: see :func:`torchprobe.dissection.dissect`.

    Returns:
        {layer: WordDissection}, in the order of the model.

    Raises:
        ValueError: an argument does not fit, or an activation or embedding is not finite; the message names the image.
        DatasetError: no image can be read, or soft labels do not fit the images.
        KeyboardInterrupt: ``stop`` returned True.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> for i in range(40):
    ...     Image.new("RGB", (8, 8), (6 * i, 0, 0)).save(folder / f"{i:02}.png")
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    >>> labels = SoftLabels(torch.stack([torch.arange(40.0), -torch.arange(40.0)], 1), ["bright red", "black"])
    >>> def to_tensor(image):
    ...     pixels = torch.tensor(list(image.resize((8, 8)).tobytes()), dtype=torch.float32)
    ...     return pixels.view(8, 8, 3).movedim(2, 0) / 255
    >>> found = dissect_words(net, "1", folder, labels, measure="cosine_cubed", preprocess=to_tensor)["1"]
    >>> found.score.shape
    torch.Size([2, 2])
    """
    chosen = find_measure(measure)
    _check(positions, pooling, top, permutations, batch_size)
    files = open_images(images)
    if not len(files):
        raise DatasetError("there are no images")
    if preprocess is None and (preprocess := getattr(model, "preprocess", None)) is None:
        raise ValueError("it is unknown how an image becomes a tensor: give preprocess=")
    labeler = _named(labeler, files) if isinstance(labeler, SoftLabels) else check_labeler(labeler)
    words = labeler.concepts if isinstance(labeler, SoftLabels) else find_concepts(concepts)
    if device is not None:
        model = model.to(device)
        labeler = labeler if isinstance(labeler, SoftLabels) else labeler.to(device)
    clock = Clock(progress, 1 if isinstance(labeler, SoftLabels) else 2)
    with Ranks() as ranks, LayerReader(model, select_layers(model, layers, feature_dim)) as reader:
        sites = _sites(reader, files, preprocess, positions, basis, seed)
        settings = {"positions": positions, "pooling": pooling, "batch_size": batch_size, "seed": seed}
        facts = {**_facts(model, labeler, words, templates, files, preprocess, sites), **settings}
        with contextlib.ExitStack() as stack:
            saved = None
            if checkpoint is not None:
                noted = ranks.on_first(lambda: {**facts, **_further(model, labeler, files, preprocess, sites)})
                saved = stack.enter_context(Checkpoint(Path(checkpoint), noted, resume, checkpoint_every, ranks))
            images_pass = ImagePass(files, batch_size, workers, ranks, saved, clock, stop)
            labels = labeler if isinstance(labeler, SoftLabels) else label_images(labeler, words, templates, images_pass)
            if save_labels is not None and ranks.first:
                labels.save(save_labels)
            found = read_layers(reader, sites, preprocess, pooling, images_pass)
            choices = {"top": top, "permutations": None if isinstance(chosen, TopPrecision) else permutations}
            facts |= {"measure": {"name": chosen.name, **asdict(chosen)}, **choices, "templates": labels.metadata.get("templates")}

            def results() -> dict[str, WordDissection]:
                rest = (found, labels, chosen, permutations, seed, top, keep_scores, facts, clock, stop)
                return {layer: _matched(layer, *rest) for layer in sites}

            return ranks.on_first(results)


def _matched(
    layer: str,
    found: ImageScores,
    labels: SoftLabels,
    measure: AnyMeasure,
    permutations: int,
    seed: int,
    top: int,
    keep: bool,
    facts: Mapping[str, Any],
    clock: Clock,
    stop: Callable[[], bool] | None,
) -> WordDissection:
    """The result of one layer, on the first rank."""
    scores, names = found.of(layer, labels)
    values = labels.rows_of(names)
    clock.start(f"permutations of {layer or '(output)'}", 0, permutations)

    def tell(done: int) -> None:
        clock.tell(done)
        if stop is not None and stop():
            raise KeyboardInterrupt

    score, p, adjusted = match(scores, values, measure, permutations=permutations, seed=seed, tell=tell)
    own = {"layer": layer, "basis": facts["sites"][layer]["basis"], "unreadable": found.unreadable, "images": len(names)}
    return WordDissection(
        layer=layer,
        concepts=labels.concepts,
        images=names,
        score=score,
        p_values=p,
        adjusted=adjusted,
        top=top_images(scores, torch.arange(len(names)), top) if top else None,
        density=found.density.get(layer),
        scores=scores if keep else None,
        labels=values if keep else None,
        metadata={**facts, **own, "caveat": CAVEAT},
    )


def _named(labels: SoftLabels, files: ImageSet) -> SoftLabels:
    """Given soft labels, by the names of the files; every file must have some."""
    names = [files.name(path) for path in files.paths]
    return SoftLabels(labels.rows_of(names), labels.concepts, names, labels.labeler, labels.metadata)


def _check(positions: str, pooling: str, top: int, permutations: int, batch_size: int) -> None:
    for name, value, choices in (("positions", positions, POSITIONS), ("pooling", pooling, ("max", "mean"))):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if top < 0 or permutations < 1 or batch_size < 1:
        raise ValueError(f"top must be at least 0, permutations and batch_size at least 1; got {top}, {permutations} and {batch_size}")


def _sites(reader: LayerReader, files: ImageSet, preprocess: Preprocess, positions: str, basis: Basis, seed: int) -> dict[str, Site]:
    """How to read each layer, from the first image that can be read."""
    for batch in files.batches(preprocess, 1, 1):
        if len(batch.names):
            break
    else:
        raise DatasetError(f"none of the {len(files)} images can be read: {batch.unreadable[0][1]}")
    sites = find_sites(reader, batch.pixels.to(reader.device), positions)
    check_layers(basis, sites)
    return {name: site.in_basis(basis_of(basis, name, site.features, seed)) for name, site in sites.items()}


def _further(model: nn.Module, labeler: Any, files: ImageSet, preprocess: Preprocess, sites: Mapping[str, Site]) -> dict[str, Any]:
    """What the passes depend on and the metadata do not say. Each file is read."""
    own = {} if isinstance(labeler, SoftLabels) else {"labeler_transform": transform_fact(labeler.preprocess)}
    modules = {} if isinstance(labeler, SoftLabels) else {"labeler_modules": modules_fact(labeler)}
    return {**run_facts(model, sites), "data": files.digest(), "transform": transform_fact(preprocess), **own, **modules}


def _facts(
    model: nn.Module,
    labeler: Any,
    concepts: Concepts,
    templates: Any,
    files: ImageSet,
    preprocess: Preprocess,
    sites: Mapping[str, Site],
) -> dict[str, Any]:
    """What the passes over the images depend on: metadata, which must be the same in a resumed run."""
    given = isinstance(labeler, SoftLabels)
    weights = digest([*model.parameters(), *model.buffers()])
    own = digest([labeler.values]) if given else labeler_weights(labeler)
    return {
        "model": str(getattr(model, "name", type(model).__name__)),
        "weights": weights,
        "dataset": {
            "name": files.root.name if files.root else "images",
            "images": len(files),
            "digest": images_fact(files),
        },
        "labeler": labeler.labeler if given else labeler_name(labeler),
        "labeler_weights": own,
        "labeler_fingerprint": None if given else fingerprint(labeler.preprocess),
        "labeler_is_model": not given and digest([*labeler.parameters(), *labeler.buffers()]) == weights,
        "concepts": {
            "count": len(concepts),
            "source": concepts.source,
            "remarks": list(concepts.remarks),
            "digest": hashlib.sha256(json.dumps([concepts.names, concepts.kinds]).encode()).hexdigest(),
        },
        "templates_given": None if templates is None else hashlib.sha256(repr(templates).encode()).hexdigest(),
        "preprocess": stable_repr(preprocess),
        "fingerprint": fingerprint(preprocess),
        "sites": {
            name: {
                "units": site.units,
                "grid": None if site.grid is None else list(site.grid),
                "basis": describe_basis(site.basis),
            }
            for name, site in sites.items()
        },
    }
