"""Weights from local files: only tensors are read, and what does not fit is named."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from torchprobe.encoders.errors import EncoderError, nearest, reason, some
from torchprobe.encoders.head import Head

_NESTED = ("state_dict", "model_state_dict", "model", "module", "net")
"""Where training scripts put the weights inside a checkpoint."""

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What compiling and sharding put into the middle of names."""

HEADS = ("head", "fc", "classifier", "classification_head", "linear")
"""What the classification layer is called, at the end of its path."""

_STEPS = re.compile(r"(^|\.)\d+(\.\d+)*$")
"""The place within a stack, as in ``classifier.6``."""


def load_weights(module: nn.Module, checkpoint: str | os.PathLike[str], *, aside: Iterable[str] = ()) -> None:
    """Loads a local checkpoint into ``module``; every key must be met.

    Args:
        module: what receives the weights.
        checkpoint: as for :func:`load_encoder`. The prefix under which most of the module's keys lie is found and
            stripped; what lies elsewhere in the file, such as a text tower, is not touched.
        aside: keys that the file may have though the module does not, such as those of the head.

    Raises:
        EncoderError: the file cannot be read; keys are missing, unexpected or of another shape; two prefixes fit
            equally well. Nothing is loaded then.
    """
    fill(module, read_checkpoint(checkpoint), checkpoint, aside)


def fill(module: nn.Module, found: Mapping[str, Tensor], checkpoint: str | os.PathLike[str], aside: Iterable[str] = ()) -> str:
    """:func:`load_weights` from what was read already; returns the prefix under which the module lay."""
    expected = module.state_dict()
    prefix = _prefix(found, expected, checkpoint)
    weights = {key[len(prefix) :]: value for key, value in found.items() if key.startswith(prefix)}
    missing = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in expected and key not in set(aside)]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{len(keys)} {what}: {some(keys)}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        where = f" under {prefix!r}" if prefix else ""
        raise EncoderError(
            f"{checkpoint} does not fit {type(module).__name__} ({len(expected)} keys expected, {len(weights)} found"
            f"{where}); {'; '.join(parts)}. Choose the architecture the file was made with, or take out of the file "
            "what is no part of the image encoder."
        )
    module.load_state_dict({key: value for key, value in weights.items() if key in expected}, strict=False)
    return prefix


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a PyTorch checkpoint, on the CPU.

    The tensors may be nested, as in ``{"state_dict": …, "epoch": …}``. PyTorch files are read with
    ``weights_only=True``: no code in them is run.

    Raises:
        EncoderError: no such file, not a checkpoint, objects other than tensors in it, or no tensors at all.
    """
    path = Path(path)
    if not path.is_file():
        raise EncoderError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _tensors(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise EncoderError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain options that many training scripts save along
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{path} holds more than tensors, and loading it could run code, so it was not loaded ({reason(error)}). "
            "Where you trust it, keep its weights only: torch.save(model.state_dict(), …) or safetensors' save_file."
        ) from error
    except Exception as error:  # a torn zip, an empty file, a text file: each has its own exception
        if "TorchScript" in str(error):
            raise EncoderError(
                f"{path} is a TorchScript archive, which holds code, so it was not loaded. Where you trust it, keep "
                "its weights only: torch.save(torch.jit.load(path).state_dict(), …)."
            ) from error
        raise EncoderError(f"{path} cannot be read as a PyTorch checkpoint: {reason(error)}") from error
    tensors = _tensors(content)
    for key in _NESTED:
        if not tensors and isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            tensors = _tensors(content[key])
    if not tensors:
        raise EncoderError(
            f"{path} holds no state_dict: expected a mapping from names to tensors, bare or under one of {', '.join(_NESTED)}"
        )
    return tensors


def load_head(path: str | os.PathLike[str], features: int, *, key: str | None = None, normalize: bool | None = None) -> Head:
    """A trained head from a local file: one that :meth:`Head.save` wrote, or the linear layer of a checkpoint.

    Args:
        path: ``.safetensors`` or a PyTorch checkpoint, read as by :func:`read_checkpoint`. ``weight`` and ``bias`` may
            be bare, or lie under head, fc, classifier, classification_head or linear at the end of any path; of a
            stack such as ``classifier.6`` the last counts. Where no layer has such a name, the only one of the right
            width is taken.
        features: the width of the representation it goes with.
        key: the layer to take, where several fit: its path, with or without ``.weight``.
        normalize: whether representations are brought to unit length first; when None, what the file says, or else False.

    Returns:
        A float32 head on the CPU, with the names of its rows where the file has them.

    Raises:
        EncoderError: a file that cannot be read; no linear layer, none of that width, or several.

    >>> import tempfile
    >>> file = tempfile.mkdtemp() + "/head.safetensors"
    >>> Head(torch.eye(2, 3), names=["left", "right"]).save(file)
    >>> load_head(file, features=3).names
    ('left', 'right')
    """
    found = read_checkpoint(path)
    normalized, names = _metadata(path)
    chosen = _choose(linear_layers(found), features, key, path)
    return head_at(found, chosen, normalize=normalized if normalize is None else normalize, names=names, path=path)


def linear_layers(found: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The linear layers in a checkpoint: path → (classes, features)."""
    return {
        key[: -len("weight")].rstrip("."): (value.shape[0], value.shape[1])
        for key, value in found.items()
        if (key == "weight" or key.endswith(".weight")) and value.dim() == 2 and value.is_floating_point()
    }


def named_heads(layers: Iterable[str]) -> dict[str, list[str]]:
    """The layers that are called like a head: where each lies → its layers; more than one when it is a stack."""
    heads: dict[str, list[str]] = {}
    for layer in layers:
        root = _STEPS.sub("", layer)
        if root.rpartition(".")[2] in ("", *HEADS):
            heads.setdefault(root, []).append(layer)
    return {
        root: sorted(stack, key=lambda layer: [int(step) for step in layer[len(root) :].split(".") if step])
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


def _choose(layers: Mapping[str, tuple[int, int]], features: int, key: str | None, path: str | os.PathLike[str]) -> str:
    if key is not None:
        layer = key if key in layers else key[: -len("weight")].rstrip(".") if key.endswith("weight") else key
        if layer not in layers:
            raise EncoderError(f"{path} has no linear layer {key!r}; it has {some(list(layers)) or 'none'}" + nearest(key, layers))
        candidates = [layer]
    else:
        candidates = [stack[-1] for stack in named_heads(layers).values()] or list(layers)
    if not candidates:
        raise EncoderError(f"{path} has no linear layer: expected weight (classes, {features}), with or without bias, bare or under a name")
    fitting = [layer for layer in candidates if layers[layer][1] == features]
    if not fitting:
        widths = some([f"{layer or 'weight'} takes {layers[layer][1]}" for layer in candidates])
        turned = any(layers[layer][0] == features for layer in candidates)
        raise EncoderError(
            f"the head in {path} does not fit a representation of {features} features: {widths}"
            + (". Is it transposed? A weight has the shape (classes, features)" if turned else "")
        )
    if len(fitting) > 1:
        raise EncoderError(f"{path} has several linear layers of {features} features: {some(fitting)}; say which with key=")
    return fitting[0]


def _metadata(path: str | os.PathLike[str]) -> tuple[bool, list[str] | None]:
    """``normalize`` and ``names`` as :meth:`Head.save` wrote them."""
    if Path(path).suffix != ".safetensors":
        return False, None
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    if metadata.get("kind") != "head":
        return False, None
    try:
        normalize, names = json.loads(metadata["normalize"]), json.loads(metadata["names"])
        if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
            raise ValueError("names is no list of strings")
    except (KeyError, ValueError) as error:
        raise EncoderError(f"{path}: its metadata cannot be read: {reason(error)}") from error
    return bool(normalize), names


def _prefix(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]) -> str:
    """The prefix under which most expected keys are found."""
    votes: Counter[str] = Counter()
    for key in found:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in expected:
                votes["".join(f"{part}." for part in parts[:i])] += 1
    ranking = votes.most_common(2)
    if len(ranking) == 2 and ranking[0][1] == ranking[1][1] > len(expected) / 2:
        raise EncoderError(f"{path} holds the encoder twice, under {ranking[0][0]!r} and {ranking[1][0]!r}: keep one of them in the file")
    return ranking[0][0] if ranking else ""


def _tensors(content: object) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for wrapper in _WRAPPERS:
        tensors = {key.replace(wrapper, ""): value for key, value in tensors.items()}
    return tensors
