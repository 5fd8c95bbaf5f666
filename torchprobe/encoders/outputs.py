"""Which part of the output of a network is the representation: one rule for tensors, tuples, dicts and the outputs of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from torchprobe.encoders.errors import EncoderError

AUTO = "auto"

POOLED = ("image_embeds", "text_embeds", "pooler_output")
"""The entries that hold one vector for each input, in the order in which ``"auto"`` looks for them."""

REPRESENTATIONS = {
    AUTO: "the tensor; of a tuple the first tensor; of a dict or a model output image_embeds, text_embeds or pooler_output, "
    "or its only tensor",
    "projection": "image_embeds or text_embeds: the space that images and texts share",
    "pooler": "pooler_output: what the network itself makes of its positions",
    "class": "the first position of last_hidden_state",
    "mean": "the mean of last_hidden_state over its positions, without class and register tokens, and without padding",
    "last": "the last position of last_hidden_state that is not padding",
}
"""The parts that can be chosen → what they are."""


def represent(output: Any, which: str = AUTO, *, special: int = 0, mask: Tensor | None = None) -> Tensor:
    """The representation in the output of a network.

    Args:
        output: a tensor, a tuple or list, or a mapping such as a ``ModelOutput`` of transformers.
        which: one of :data:`REPRESENTATIONS`.
        special: how many positions at the start are no patches (class and register tokens): the mean leaves them out.
        mask: bool (N, positions), False for padding.

    Returns:
        (N, features); for ``"auto"`` the tensor as it is, apart from a map of 1 × 1.

    Raises:
        EncoderError: the output has no such part; the message names those it has.

    >>> output = {"last_hidden_state": torch.tensor([[[1.0, 5.0], [3.0, 7.0]]]), "pooler_output": torch.tensor([[0.0, 1.0]])}
    >>> [represent(output, which).tolist() for which in ("auto", "class", "mean")]
    [[[0.0, 1.0]], [[1.0, 5.0]], [[2.0, 6.0]]]
    """
    if which not in REPRESENTATIONS:
        raise EncoderError(f"there is no representation {which!r}: choose one of {', '.join(REPRESENTATIONS)}")
    parts = _parts(output)
    if which in (AUTO, "pooler", "projection"):
        keys = {AUTO: POOLED, "pooler": POOLED[2:], "projection": POOLED[:2]}[which]
        found = next((parts[key] for key in keys if key in parts), None)
        if found is None and which == AUTO and len(parts) == 1 and "last_hidden_state" not in parts:
            found = next(iter(parts.values()))
        if found is None:
            raise EncoderError(f"{_described(parts)} has no {' or '.join(keys)}: choose one of {', '.join(available(output)) or 'none'}")
        return found.flatten(1) if found.dim() == 4 and found.shape[2:] == (1, 1) else found
    return _positions(parts, which, special, mask)


def available(output: Any, class_token: bool = True) -> list[str]:
    """The representations that an output has, without ``"auto"``. ``class_token``: whether its first position is a class token."""
    parts = _parts(output)
    found = ["projection"] if "image_embeds" in parts or "text_embeds" in parts else []
    found += ["pooler"] if "pooler_output" in parts else []
    tokens = parts.get("last_hidden_state")
    if tokens is not None and tokens.dim() == 3:
        found += ["class", "mean", "last"] if class_token else ["mean", "last"]
    elif tokens is not None and tokens.dim() == 4:
        found += ["mean"]
    return found


def _positions(parts: Mapping[str, Tensor], which: str, special: int, mask: Tensor | None) -> Tensor:
    tokens = parts.get("last_hidden_state", parts.get("", torch.empty(0)))
    if which == "mean" and tokens.dim() == 4:
        return reduce(tokens, "n feature h w -> n feature", "mean")
    if tokens.dim() != 3:
        raise EncoderError(f"{_described(parts)} has no positions (N, positions, features), so it has no {which!r}")
    if which == "class":
        return tokens[:, 0]
    if which == "last":
        if mask is None:
            return tokens[:, -1]
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), last]
    if mask is None:
        return tokens[:, special:].mean(1)
    counted = rearrange(mask, "n position -> n position 1")
    return tokens.where(counted, 0).sum(1) / counted.sum(1)


def _parts(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name; the name of a tensor alone, or of the first in a tuple, is empty."""
    if isinstance(output, Tensor):
        return {"": output}
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items() if isinstance(value, Tensor)}
    if isinstance(output, (tuple, list)):
        named: dict[str, Any] = output._asdict() if hasattr(output, "_asdict") else {}
        parts = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        if parts.keys() & {*POOLED, "last_hidden_state"}:
            return parts
        first = next((value for value in output if isinstance(value, Tensor)), None)
        return {} if first is None else {"": first}
    if hasattr(output, "__dict__"):
        return {key: value for key, value in vars(output).items() if isinstance(value, Tensor)}
    return {}


def _described(parts: Mapping[str, Tensor]) -> str:
    inside = ", ".join(f"{key or 'tensor'} {tuple(value.shape)}" for key, value in parts.items())
    return f"the output ({inside or 'no tensor'})"
