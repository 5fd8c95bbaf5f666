"""The linear layer that turns a representation into classes, and reading it from a file."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from torchprobe.common import limits
from torchprobe.common.checked import DamagedError
from torchprobe.common.messages import did_you_mean, listing, reason
from torchprobe.common.reading import parse_json
from torchprobe.common.storage import Checksums, save_tensors
from torchprobe.encoders.checkpoint import read_checkpoint
from torchprobe.encoders.errors import EncoderError

HEAD_NAMES = ("head", "fc", "classifier", "classification_head", "linear")
"""The names of a classification layer, at the end of its path."""

_METADATA = ("format", "kind", "normalize", "names")

_POSITION = re.compile(r"(^|\.)\d+(\.\d+)*$")
"""The position within a stack of layers, as in ``classifier.6``."""


class Head(nn.Linear):
    """A linear layer over representations: h (N, features) → logits (N, classes).

    Every argument called ``head`` also accepts an ``nn.Linear``. This class adds the names of the rows, and says whether each
    representation is first divided by its length, as in CLIP and in models fine-tuned from it. The division changes no decision
    without a bias, but it does with a bias.

    Args:
        weight: floating (classes, features).
        bias: floating (classes,), or None.
        normalize: divide each representation by its length first.
        names: the names of the rows, in order; None if unknown.

    Raises:
        ValueError: the shapes do not fit together, or the numbers are not floating.

    >>> head = Head(torch.eye(2, 3), names=["left", "right"])
    >>> head(torch.tensor([[0.0, 2.0, 0.0]])).tolist()
    [[0.0, 2.0]]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, normalize: bool = False, names: Sequence[str] | None = None) -> None:
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"the weight of a head must have the shape (classes, features), got {tuple(weight.shape)}")
        if not weight.is_floating_point():
            raise ValueError(f"the weight of a head must be floating, got {weight.dtype}")
        classes, features = weight.shape
        if bias is not None and bias.shape != (classes,):
            raise ValueError(f"the bias of a head with {classes} classes must have the shape ({classes},), got {tuple(bias.shape)}")
        if isinstance(names, str) or (names is not None and len(names) != classes):
            raise ValueError(f"a head with {classes} classes needs {classes} names, got {1 if isinstance(names, str) else len(names)}")
        super().__init__(features, classes, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            self.weight.copy_(weight)
            if bias is not None:
                self.bias.copy_(bias)
        self.normalize = normalize
        self.names = None if names is None else tuple(names)

    @classmethod
    def of(cls, layer: nn.Linear) -> Head:
        """A linear layer as a head; a head as it is.

        >>> Head.of(nn.Linear(3, 2)).normalize
        False
        """
        return layer if isinstance(layer, cls) else cls(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    def forward(self, h: Tensor) -> Tensor:
        """Representations (N, features) → logits (N, classes)."""
        return super().forward(functional.normalize(h, dim=-1) if self.normalize else h)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a ``.safetensors`` file with ``weight``, ``bias``, and in its metadata ``normalize`` and ``names``.

        :func:`torchprobe.encoders.load_head` reads it. A file of that name is replaced as a whole.

        Raises:
            ValueError: the name has another ending.
            OSError: the file cannot be written.
        """
        if os.path.splitext(path)[1] != ".safetensors":
            raise ValueError(f"a head is saved in a .safetensors file, got {os.fspath(path)!r}")
        metadata = {"format": "1", "kind": "head", "normalize": json.dumps(self.normalize), "names": json.dumps(self.names)}
        save_tensors(path, {key: value.cpu().contiguous() for key, value in self.state_dict().items()}, metadata)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", normalize=True" if self.normalize else "")


def load_head(path: str | os.PathLike[str], features: int, *, key: str | None = None, normalize: bool | None = None) -> Head:
    """A trained head from a local file: a file of :meth:`Head.save`, or the linear layer of a checkpoint.

    Args:
        path: ``.safetensors`` or a PyTorch checkpoint, read by :func:`read_checkpoint`. The keys may be ``weight`` and ``bias`` alone, or
            they may end a path whose last part is head, fc, classifier, classification_head or linear. In a stack such as
            ``classifier.6``, the last layer is taken. If no layer has such a name, the only layer of the right width is taken.
        features: the width of the representation.
        key: the layer to take if several fit: its path, with or without ``.weight``.
        normalize: whether representations are divided by their length first; None: as the file says, or False.

    Returns:
        A float32 head on the CPU, with the names of its rows if the file has them.

    Raises:
        EncoderError: the file cannot be read or is damaged, or it has no linear layer, none of that width, or several.

    >>> import tempfile
    >>> file = tempfile.mkdtemp() + "/head.safetensors"
    >>> Head(torch.eye(2, 3), names=["left", "right"]).save(file)
    >>> load_head(file, features=3).names
    ('left', 'right')
    """
    found = read_checkpoint(path)
    normalized, names = _metadata(path, found)
    chosen = _choose(linear_layers(found), features, key, path)
    if why := limits.problem("head_numbers", math.prod(linear_layers(found)[chosen])):
        raise EncoderError(f"the head in {path} has {why}")
    return head_at(found, chosen, normalize=normalized if normalize is None else normalize, names=names, path=path)


def linear_layers(found: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The linear layers in a checkpoint: path → (classes, features)."""
    return {
        key[: -len("weight")].rstrip("."): (value.shape[0], value.shape[1])
        for key, value in found.items()
        if (key == "weight" or key.endswith(".weight")) and value.dim() == 2 and value.is_floating_point()
    }


def named_heads(layers: Iterable[str]) -> dict[str, list[str]]:
    """The layers with the name of a head: path → its layers, several if it is a stack."""
    heads: dict[str, list[str]] = {}
    for layer in layers:
        root = _POSITION.sub("", layer)
        if root.rpartition(".")[2] in ("", *HEAD_NAMES):
            heads.setdefault(root, []).append(layer)
    return {
        root: sorted(stack, key=lambda layer: [int(position) for position in layer[len(root) :].split(".") if position])
        for root, stack in heads.items()
    }


def head_at(
    found: Mapping[str, Tensor],
    layer: str,
    *,
    normalize: bool = False,
    names: list[str] | None = None,
    path: str | os.PathLike[str],
) -> Head:
    """The head at the path ``layer`` within a checkpoint, in float32."""
    prefix = f"{layer}." if layer else ""
    bias = found.get(f"{prefix}bias")
    try:
        return Head(found[f"{prefix}weight"].float(), None if bias is None else bias.float(), normalize=normalize, names=names)
    except ValueError as error:
        raise EncoderError(f"{path}: {layer or 'weight and bias'} cannot be a head: {error}") from error


def removed_keys(all_keys: Iterable[str], visual: nn.Module) -> tuple[str, ...]:
    """The keys that a network lost with its classification layer."""
    return tuple(sorted(set(all_keys) - set(visual.state_dict())))


def single_layer(keys: Sequence[str]) -> str | None:
    """The path of the layer if ``keys`` are the keys of one linear layer."""
    layers = {key.rpartition(".")[0] for key in keys}
    return layers.pop() if len(layers) == 1 and {key.rpartition(".")[2] for key in keys} in ({"weight"}, {"weight", "bias"}) else None


def trained_head(layer: nn.Module, features: int, names: list[str] | None) -> Head | None:
    """The head of a removed layer, if it is a linear layer over the representation."""
    if not isinstance(layer, nn.Linear) or layer.in_features != features:
        return None
    bias: Tensor | None = layer.bias
    fitting = names if names is not None and len(names) == layer.out_features else None
    return Head(layer.weight.detach(), None if bias is None else bias.detach(), names=fitting)


def _choose(layers: Mapping[str, tuple[int, int]], features: int, key: str | None, path: str | os.PathLike[str]) -> str:
    if key is not None:
        layer = key if key in layers else key[: -len("weight")].rstrip(".") if key.endswith("weight") else key
        if layer not in layers:
            raise EncoderError(f"{path} has no linear layer {key!r}; it has {listing(list(layers)) or 'none'}" + did_you_mean(key, layers))
        candidates = [layer]
    else:
        candidates = [stack[-1] for stack in named_heads(layers).values()] or list(layers)
    if not candidates:
        raise EncoderError(f"{path} has no linear layer: expected a weight (classes, {features}), with or without a bias")
    fitting = [layer for layer in candidates if layers[layer][1] == features]
    if not fitting:
        widths = listing([f"{layer or 'weight'} takes {layers[layer][1]}" for layer in candidates])
        transposed = any(layers[layer][0] == features for layer in candidates)
        raise EncoderError(
            f"the head in {path} does not fit a representation of {features} features: {widths}"
            + (". Is it transposed? A weight must have the shape (classes, features)" if transposed else "")
        )
    if len(fitting) > 1:
        raise EncoderError(f"{path} has several linear layers of {features} features: {listing(fitting)}; choose one with key=")
    return fitting[0]


def _metadata(path: str | os.PathLike[str], found: Mapping[str, Tensor]) -> tuple[bool, list[str] | None]:
    """``normalize`` and ``names`` as :meth:`Head.save` wrote them. A file with checksums must be as it was written."""
    if Path(path).suffix != ".safetensors":
        return False, None
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    try:
        sums = Checksums(os.fspath(path), metadata, earlier=_METADATA if metadata.get("kind") == "head" else None)
        sums.names(found)
        for name, tensor in found.items():
            sums.check(name, tensor)
    except DamagedError as error:
        raise EncoderError(str(error)) from error
    if metadata.get("kind") != "head":
        return False, None
    try:
        normalize, names = parse_json(metadata["normalize"]), parse_json(metadata["names"])
        if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
            raise ValueError("names is not a list of strings")
        if not isinstance(normalize, bool):
            raise ValueError(f"normalize is {normalize!r:.80}, not true or false")
    except (KeyError, ValueError) as error:
        raise EncoderError(f"{path}: the metadata cannot be read: {reason(error)}") from error
    return normalize, names
