"""Which pixels of its top images contribute to a unit: a captum attribution of the unit to the pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.common.deprecation import renamed_arguments
from torchprobe.common.messages import install_hint
from torchprobe.dissection.average_precision import pooled
from torchprobe.dissection.bases import same_basis
from torchprobe.dissection.batches import Preprocess, same_preprocess, stack, to_tensor
from torchprobe.dissection.facts import require_same_data, require_same_network, require_same_pictures
from torchprobe.dissection.scores import LayerScores
from torchprobe.dissection.sparse import SparseBasis
from torchprobe.dissection.taps import find_sites
from torchprobe.recording.layers import select_layers
from torchprobe.recording.reader import LayerReader, as_input, device_of, eval_mode
from torchprobe.recording.structure import first_tensor

if TYPE_CHECKING:
    from torchprobe.datasets.broden import Broden

METHOD = "NeuronIntegratedGradients"
STEPS = 24
"""Steps of the integral from the baseline to the image; the default of captum is 50."""


class Evidence(NamedTuple):
    """``ids`` (n,): rows of the data set. ``scores`` (n,) of the unit on them. ``pixels`` (n, 3, H, W) as the network takes them.
    ``attribution`` (n, 3, H, W): the contribution of each value of ``pixels`` to the score, by the method."""

    ids: Tensor
    scores: Tensor
    pixels: Tensor
    attribution: Tensor

    @property
    def heat(self) -> Tensor:
        """Contribution of each pixel, summed over the channels: (n, H, W)."""
        return self.attribution.sum(1)


def attribute(
    model: nn.Module,
    layer: str,
    unit: int,
    images: Tensor,
    *,
    method: str | type = METHOD,
    basis: Tensor | SparseBasis | None = None,
    positions: str = "patch",
    pooling: str = "max",
    feature_dim: int | None = None,
    **options: Any,
) -> Tensor:
    """The contribution of each input value to the pooled score of one unit, by a neuron attribution of captum.

    Args:
        model: any module.
        layer: the name of the layer.
        unit: index of the unit, or of the row of ``basis``.
        images: (n, 3, H, W), as the network takes them.
        method: a class of ``captum.attr`` that attributes a neuron of a layer, or its name: ``"NeuronIntegratedGradients"``,
            ``"NeuronGradient"``, ``"NeuronGuidedBackprop"``, ``"NeuronDeconvolution"``, ….
        basis, positions, pooling, feature_dim: as for :func:`torchprobe.dissection.dissect`.
        options: for the ``attribute`` method of captum, such as ``baselines``. The default of integrated gradients is 24 steps from zeros,
            which are the mean color for most encoders.

    Returns:
        (n, 3, H, W). It says how the score depends on the pixels, to first order along a path. It does not say what causes the score in
        the world.

    Raises:
        ImportError: captum is not installed.
        ValueError: no such layer, unit or method.

    >>> net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.ReLU())
    >>> attribute(net, "0", 1, torch.ones(1, 3, 4, 4)).shape
    torch.Size([1, 3, 4, 4])
    """
    try:
        from captum import attr
    except ImportError as error:
        raise ImportError(f"this needs captum: {install_hint('captum')}") from error
    kind = getattr(attr, method, None) if isinstance(method, str) else method
    if not isinstance(kind, type) or not kind.__name__.startswith("Neuron"):
        known = sorted(name for name in dir(attr) if name.startswith("Neuron"))
        raise ValueError(f"{method!r} is not a neuron attribution of captum; choose one of {', '.join(known)}")
    with LayerReader(model, select_layers(model, [layer], feature_dim)) as reader:
        name, selected = next(iter(reader.layers.items()))
        site = find_sites(reader, images[:1], positions)[name].in_basis(basis)
    if not 0 <= unit < site.units:
        raise ValueError(f"layer {layer!r} has the units 0 to {site.units - 1}, got {unit}")

    def score(output: Any) -> Tensor:
        x = first_tensor(output)
        assert x is not None
        return pooled(site.read(x, x.shape[site.layout.batch_dim]), pooling)[:, unit]

    if kind.__name__ == METHOD:
        options = {"n_steps": STEPS, "internal_batch_size": max(len(images), STEPS), **options}
    # The path is followed in float32, and the model computes in its own precision.
    cast = model.register_forward_pre_hook(lambda module, args: (as_input(args[0], model), *args[1:]), prepend=True)
    with cast, eval_mode(model), torch.enable_grad():
        found = kind(model, selected.module).attribute(images.detach().to(torch.float32, copy=True).requires_grad_(), score, **options)
    attribution: Tensor = found.detach()
    return attribution


def attribute_dissected(
    dissection: LayerScores, unit: int, model: nn.Module, pixels: Tensor, basis: Tensor | SparseBasis | None = None, **options: Any
) -> Tensor:
    """:func:`attribute`, with the layer, the basis, the positions and the pooling of a dissection. ``basis``: that of the dissection, if it
    was given there.

    Raises:
        ValueError: ``basis`` is another one than that of the dissection.
    """
    basis = same_basis(dissection.metadata, dissection.layer, dissection.units, basis)  # a rotation has as many units as features
    read_as = {name: dissection.metadata[name] for name in ("positions", "pooling") if name in dissection.metadata}
    return attribute(model, dissection.layer, unit, pixels.to(device_of(model)), basis=basis, **read_as, **options)


def scores_of(
    dissection: LayerScores,
    unit: int,
    model: nn.Module,
    pixels: Tensor,
    basis: Tensor | SparseBasis | None = None,
    feature_dim: int | None = None,
) -> list[float]:
    """The scores of one unit on images, with the layer, the basis, the positions and the pooling of a dissection."""
    basis = same_basis(dissection.metadata, dissection.layer, dissection.units, basis)
    with LayerReader(model, select_layers(model, [dissection.layer], feature_dim)) as reader:
        site = find_sites(reader, pixels[:1], dissection.metadata.get("positions", "patch"))[dissection.layer].in_basis(basis)
        maps = site.read(reader.activations(pixels)[dissection.layer][0], len(pixels))
    scores: list[float] = pooled(maps, dissection.metadata.get("pooling", "max"))[:, unit].tolist()
    return scores


@renamed_arguments(images="top_images")
def evidence(
    dissection: LayerScores,
    unit: int,
    broden: Broden,
    model: nn.Module,
    top_images: int = 5,
    *,
    method: str | type = METHOD,
    basis: Tensor | SparseBasis | None = None,
    preprocess: Preprocess | str | None = None,
    **options: Any,
) -> Evidence:
    """Which pixels of its top images contribute to a unit.

    Args:
        dissection: with top images.
        unit: index of the unit.
        broden: the data set of the dissection.
        model: the network of the dissection.
        top_images: how many of the top images.
        method, options: see :func:`attribute`.
        basis, preprocess: those of the dissection, if they were given there.

    Raises:
        ImportError: captum is not installed.
        ValueError: no top images were kept, no such unit, or the data set, the network, the basis or the preprocessing are not those of
            the dissection, as far as it says which they were, or a picture has another score than it had. What an older one does not
            say gives a warning.
    """
    if dissection.top is None:
        raise ValueError(f"layer {dissection.layer!r}: no top images were kept: dissect with top=20")
    if not 0 <= unit < dissection.units:
        raise ValueError(f"layer {dissection.layer!r} has the units 0 to {dissection.units - 1}, got {unit}")
    require_same_data(dissection.metadata, dissection.images, broden)
    require_same_network(dissection.metadata, dissection.layer, model, needed=False)
    ids, scores = (part[unit, :top_images] for part in dissection.top)
    ids, scores = ids[ids >= 0], scores[ids >= 0]
    preprocess = same_preprocess(dissection.metadata, broden, model, preprocess)
    rows = ids.tolist()
    pixels = stack([to_tensor(preprocess, broden.image(row)) for row in rows], broden, rows)
    for row, score in zip(rows, scores_of(dissection, unit, model, pixels, basis, options.get("feature_dim")), strict=True):
        require_same_pictures(dissection, broden, row, {unit: score})
    attribution = attribute_dissected(dissection, unit, model, pixels, method=method, basis=basis, **options)
    return Evidence(ids, scores, pixels, attribution.cpu())
