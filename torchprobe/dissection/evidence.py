"""What in its top images speaks for a unit: a captum attribution of the unit to the pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprobe.common.distribution import install_hint
from torchprobe.dissection.ranking import pooled
from torchprobe.dissection.taps import find_sites
from torchprobe.recording.layers import select_layers
from torchprobe.recording.reader import LayerReader, device_of, eval_mode
from torchprobe.recording.tensors import first_tensor

if TYPE_CHECKING:
    from torchprobe.datasets.broden import Broden
    from torchprobe.dissection.dissection import Dissection

METHOD = "NeuronIntegratedGradients"
STEPS = 24
"""Of the integral from the baseline to the picture; captum's own default is 50."""


class Evidence(NamedTuple):
    """``ids`` (n,): rows of the data set; ``scores`` (n,) of the unit on them; ``pixels`` (n, 3, H, W) as the network takes them;
    ``attribution`` (n, 3, H, W): what each value of them contributes to the score, by the method."""

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
    basis: Tensor | None = None,
    positions: str = "patch",
    pooling: str = "max",
    feature_dim: int | None = None,
    **options: Any,
) -> Tensor:
    """The contribution of each input value to the pooled score of one unit, by a neuron attribution of captum.

    Args:
        model: any module.
        layer: its name.
        unit: which, or the row of ``basis``.
        images: (n, 3, H, W), as the network takes them.
        method: one of ``captum.attr`` that attributes a neuron of a layer, by name or as a class: ``"NeuronIntegratedGradients"``,
            ``"NeuronGradient"``, ``"NeuronGuidedBackprop"``, ``"NeuronDeconvolution"``, ….
        basis, positions, pooling, feature_dim: as for :func:`torchprobe.dissection.dissect`.
        options: for the method's ``attribute``, such as ``baselines``. Integrated gradients run from zeros – the mean colour, for most
            encoders – in 24 steps by default.

    Returns:
        (n, 3, H, W). It says what the score would follow to first order along a path, not what causes it in the world.

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
        raise ValueError(f"{method!r} is no neuron attribution of captum; there are {', '.join(known)}")
    with LayerReader(model, select_layers(model, [layer], feature_dim)) as reader:
        site = find_sites(reader, images[:1], positions, None if basis is None else {layer: basis})[layer]
        module = reader.layers[layer].module
    if not 0 <= unit < site.units:
        raise ValueError(f"layer {layer!r} has the units 0 to {site.units - 1}, got {unit}")

    def score(output: Any) -> Tensor:
        x = first_tensor(output)
        assert x is not None
        return pooled(site.read(x, x.shape[site.layout.batch_dim]), pooling)[:, unit]

    if kind.__name__ == METHOD:
        options = {"n_steps": STEPS, "internal_batch_size": max(len(images), STEPS), **options}
    with eval_mode(model), torch.enable_grad():
        found = kind(model, module).attribute(images.detach().clone().requires_grad_(), score, **options)
    attribution: Tensor = found.detach()
    return attribution


def evidence(
    dissection: Dissection,
    unit: int,
    broden: Broden,
    model: nn.Module,
    images: int = 5,
    *,
    method: str | type = METHOD,
    basis: Tensor | None = None,
    **options: Any,
) -> Evidence:
    """What in its top images speaks for a unit.

    Args:
        dissection: with top images.
        unit: which.
        broden: the data set it was made from.
        model: the network it was made from.
        images: how many of the top images.
        method, basis, options: see :func:`attribute`.

    Raises:
        ImportError: captum is not installed.
        ValueError: no top images were kept, or no such unit.
    """
    if dissection.top is None:
        raise ValueError(f"layer {dissection.layer!r}: no top images were kept: dissect with top=20")
    if not 0 <= unit < dissection.units:
        raise ValueError(f"layer {dissection.layer!r} has the units 0 to {dissection.units - 1}, got {unit}")
    ids, scores = (part[unit, :images] for part in dissection.top)
    ids, scores = ids[ids >= 0], scores[ids >= 0]
    preprocess: Any = broden.transform or getattr(model, "preprocess", None)
    if preprocess is None:
        raise ValueError("nothing says how a picture becomes a tensor: give Broden a transform")
    pixels = torch.stack([preprocess(broden.image(row)) for row in ids.tolist()]).to(device_of(model))
    chosen = {name: dissection.metadata[name] for name in ("positions", "pooling") if name in dissection.metadata}
    attribution = attribute(model, dissection.layer, unit, pixels, method=method, basis=basis, **chosen, **options)
    return Evidence(ids, scores, pixels.cpu(), attribution.cpu())
