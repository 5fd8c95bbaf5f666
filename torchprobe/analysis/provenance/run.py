"""Where features of a representation come from: the pass over images, and the result."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.analysis.ablation import Features
from torchprobe.analysis.directions import feature_indices
from torchprobe.analysis.embeddings import Embeddings, embed
from torchprobe.analysis.inputs import HeadLike
from torchprobe.analysis.outliers import outlier_features
from torchprobe.analysis.provenance.attribution import Attribution
from torchprobe.analysis.provenance.changes import measure_changes
from torchprobe.analysis.provenance.parameters import Entry, entries, stem_parts
from torchprobe.analysis.provenance.results import FORMAT, ChangeRow, ParameterRow, PartRow, Provenance, StemRow
from torchprobe.analysis.provenance.stream import UnknownStructure, find_stream
from torchprobe.analysis.reading import Source
from torchprobe.common.messages import reason
from torchprobe.common.ranks import alone
from torchprobe.common.runs import CountCallback
from torchprobe.datasets.images import DatasetError

STEM = "(before the blocks)"


def provenance(
    encoder: nn.Module,
    images: Any,
    features: Features | None = None,
    *,
    head: HeadLike | None = None,
    most: int = 10,
    changes: int = 1,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    workers: int = 2,
    progress: CountCallback | None = None,
    stop: Callable[[], bool] | None = None,
) -> Provenance:
    """For each outlier feature: which blocks, submodules and parameters write it, and what happens when one parameter is changed.

    The representation is a sum along the residual stream: of what comes before the blocks, of what each attention and each MLP adds, and of
    the biases after them, all seen through the last LayerNorm and the projection. The scale of the LayerNorm is held at its actual value
    for each image, and centering is part of the sum. So the parts add up to the feature, up to rounding in float64; this is checked for
    every image. For residual CNNs the stream runs through the last stage with the gates of its ReLUs held, and the batch norms and last
    convolutions of its blocks write it.

    Parts are of the direct path: a branch may also change what later branches add, and that counts as theirs. The excess of a parameter,
    (θ − median of its peers) · ∂h/∂θ along the direct path, is how much of the feature is due to its being unlike its peers. The parameter
    comes first without whose excess the least would be left of the feature.
    The changes run the whole network again. They say what this network does with another parameter, not why training led there.

    Args:
        encoder: a :class:`torchprobe.Encoder`, or any module: images → (N, d). It is not changed; a copy in float64 is, so its memory is
            needed twice more.
        images: as for :func:`torchprobe.analysis.embed`, with or without labels. A few hundred are enough for means.
        features: indices, or the result of :func:`torchprobe.analysis.outlier_features`; None: the outlier features of these images.
        head: decides before and after a change; None: the head of the encoder, if it has one.
        most: parameters to list for each feature.
        changes: number of the first parameters of each feature to change. Each costs two passes over the images.
        batch_size: images in a batch. What every block adds is kept for one batch, in float64.
        device: the copies are moved there; None: where the encoder is. It must have float64.
        workers: threads that decode files.
        progress: called with (images done, images in all) after every batch, over the attribution and all changes; 0 images in all while it
            is not known how many features there are.
        stop: called before every batch; KeyboardInterrupt is raised if it returns True.

    It is not collective: under ``torch.distributed``, every rank that calls it does the whole work, and one rank may call it alone.

    Raises:
        UnknownStructure: a ``ValueError``: the network has no residual stream that is understood, or what follows it is not linear.
        DatasetError: no image could be read.
        ValueError: arguments that do not fit.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm, self.mlp = nn.LayerNorm(48), nn.Linear(48, 48)
    ...     def forward(self, x):
    ...         return x + self.mlp(self.norm(x))
    >>> encoder = nn.Sequential(nn.Sequential(Block(), Block()), nn.LayerNorm(48))
    >>> encoder[0][1].mlp.bias.data[7] = 90.0
    >>> found = provenance(encoder, list(torch.randn(8, 48)))
    >>> found.features, found.parts[0].block, found.parameters[0].parameter, found.error < 1e-12
    ([7], '0.1', '0.1.mlp.bias', True)
    """
    if most < 1 or changes < 0:
        raise ValueError(f"most must be at least 1 and changes at least 0, got {most} and {changes}")
    source = Source(images, getattr(encoder, "preprocess", None), batch_size, workers)
    plain = copy.deepcopy(encoder) if device is None else copy.deepcopy(encoder).to(device)
    plain.eval()

    done = total = 0

    def tell(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total)

    def represent() -> Embeddings:
        before = done
        with alone():
            found = embed(plain, images, batch_size=batch_size, workers=workers, progress=lambda i, _: tell(before + i - done), stop=stop)
        if found.partial:
            raise KeyboardInterrupt
        return found

    chosen = outlier_features(represent()).indices if features is None else features
    model = _in_float64(plain)
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: Attribution | None = None
    runs = 1 + 2 * changes * len(chosen) if changes and len(chosen) else 0
    total = done + len(source) * (1 + runs)
    for batch, _ in source.read(range(source.batches)):
        if stop is not None and stop():
            raise KeyboardInterrupt
        if batch.names:
            pixels = batch.pixels.to(place)
            pixels = pixels.double() if pixels.is_floating_point() else pixels
            found = found or _begin(model, pixels, chosen)
            found.add(pixels)
        tell(batch.files)
    if found is None:
        raise DatasetError(f"none of the {len(source)} images could be read")
    best = {feature: entries(model, found, feature, max(most, changes)) for feature in found.features}
    first = [(feature, entry) for feature, listed in best.items() for entry in listed[:changes]]
    head = getattr(encoder, "head", None) if head is None else head
    return _result(
        str(getattr(encoder, "name", type(encoder).__name__)),
        model,
        found,
        {feature: listed[:most] for feature, listed in best.items()},
        measure_changes(plain, first, represent, head if isinstance(head, (nn.Linear, Tensor)) else None),
    )


def _in_float64(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).to(torch.float64)
    for config in (getattr(module, "config", None) for module in copied.modules()):
        if getattr(config, "_experts_implementation", None) not in (None, "eager"):  # the fast kernels of transformers refuse float64
            config._experts_implementation = "eager"  # type: ignore[union-attr]
    return copied


def _begin(model: nn.Module, pixels: Tensor, features: Features) -> Attribution:
    few = pixels[:2]
    try:
        with torch.no_grad():
            h = model(few)
    except Exception as error:  # the network alone, without a hook of ours: it may hold float32 that is not a parameter, or refuse float64
        raise UnknownStructure(f"a copy of the network in double precision does not run ({reason(error)})") from error
    if not isinstance(h, Tensor) or h.dim() != 2 or len(h) != len(few):
        given = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise UnknownStructure(f"the encoder returned {given} for {len(few)} images; expected one vector each, (N, d)")
    index = feature_indices(features, h.shape[1]).tolist()
    return Attribution(model, find_stream(model, few), index)


def _result(name: str, model: nn.Module, found: Attribution, best: Mapping[int, list[Entry]], changes: list[ChangeRow]) -> Provenance:
    h = torch.cat(found.h).cpu()
    sizes = [float(h[:, feature].abs().mean()) for feature in found.features]
    parts: list[PartRow] = []
    stem: list[StemRow] = []
    parameters: list[ParameterRow] = []
    error, split = 0.0, True
    for feature, size in zip(found.features, sizes, strict=True):
        own, off = _parts(found, feature, h[:, feature], size)
        parts += sorted(own, key=lambda row: -abs(row.contribution))
        error = max(error, off)
        added = stem_parts(model, found, feature)
        split = split and added is not None
        for parameter, one in sorted((added or {}).items(), key=lambda pair: -abs(pair[1])):
            stem.append(StemRow(feature, parameter, one, _share(one, size)))
        for e in best[feature]:
            numbers = e.value, e.median, e.deviation, e.contribution, e.excess, _share(e.excess, size)
            parameters.append(ParameterRow(feature, e.peers.parameter, e.index, e.peers.kind, *numbers))
    features, remarks = list(found.features), _remarks(found, split)
    return Provenance(FORMAT, name, features, len(h), sizes, parts, parameters, stem, changes, error, remarks)


def _parts(found: Attribution, feature: int, value: Tensor, size: float) -> tuple[list[PartRow], float]:
    """What each part adds to a feature, the stem first, and the largest difference of the sum, as a share of the largest value."""
    sums = found.sums[feature]
    of_stream = torch.cat(sums.parts).cpu()
    sign = torch.where(value < 0, -1.0, 1.0).to(value)
    labels = [("", STEM, "stem"), *((b.block, b.name.removeprefix(f"{b.block}."), b.kind) for b in found.stream.branches)]
    rows = []
    for label, column in zip(labels, of_stream.unbind(1), strict=True):
        contribution = float((column * sign).mean())
        spread = float(column.std(correction=0))
        rows.append(PartRow(feature, *label, contribution, _share(contribution, size), float(column.mean()), spread))
    if not found.stem:
        del rows[0]  # only zeros
    for parameter, constant in sums.constants.items():
        contribution = constant * float(sign.mean())
        rows.append(PartRow(feature, "", parameter, "bias", contribution, _share(contribution, size), constant, 0.0))
    off = (of_stream.sum(1) + sum(sums.constants.values()) - value).abs().max()
    return rows, float(off / value.abs().max().clamp_min(torch.finfo(torch.float64).tiny))


def _remarks(found: Attribution, split: bool) -> list[str]:
    remarks = []
    stream = found.stream
    if unknown := [branch.name for branch in stream.branches if branch.writer is None and branch.kind != "shortcut"]:
        remarks.append(f"The layer that writes {', '.join(itertools.islice(unknown, 4))} was not found, so its parameters are not listed.")
    if not stream.whole:
        remarks.append(f"The blocks before {stream.blocks[0]} are not resolved: what they add is in one part.")
    if found.stem and not split and found.features:
        remarks.append("What comes before the blocks is not split into its parameters, because it is not a sum of them.")
    return remarks


def _share(part: float, size: float) -> float:
    return part / size if size else float("nan")
