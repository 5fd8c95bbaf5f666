"""Padding masks: which vectors of an activation count."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from torchprobe.recording.layers import canonical, matches_glob

_ATTENTION = (nn.MultiheadAttention, nn.RNNBase)  # they have a `batch_first`


def check(mask: object) -> None:
    """Raises TypeError or ValueError for what is not a mask: a bool tensor (batch, tokens)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"a mask is a bool tensor, True for the tokens that count; got {what}: try mask.bool()")
    if mask.dim() != 2:
        raise ValueError(f"a mask has the shape (batch, tokens), got {tuple(mask.shape)}")


def pattern_for(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The first pattern that is one of the names of a layer, or a glob that matches one; None if there is none."""
    own = list(names)
    for pattern in patterns:
        if any(name in (pattern, canonical(pattern)) or matches_glob(pattern, name) for name in own):
            return pattern
    return None


def tokens_first(module: nn.Module, around: Iterable[nn.Module]) -> bool | None:
    """Whether a layer works on (tokens, batch, features): what the nearest attention or recurrent layer says, first inside, then around it.

    None if there is none, or if the nearest ones differ.
    """
    for family in (module, *around):
        found = {not inner.batch_first for inner in family.modules() if isinstance(inner, _ATTENTION)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def any_tokens_first(model: nn.Module) -> bool:
    """Whether any attention or recurrent layer works on (tokens, batch, features)."""
    return any(not inner.batch_first for inner in model.modules() if isinstance(inner, _ATTENTION))


def fit(mask: Tensor, lead: list[int], swapped: bool | None) -> tuple[bool, Tensor | None]:
    """The mask for an activation.

    Args:
        mask: bool (batch, tokens).
        lead: the shape of the activation without its features.
        swapped: whether tokens come before the batch; None if that is unknown.

    Returns:
        Whether it is clear which vectors count; and the mask in the shape ``lead``, or None if all vectors count: those of an activation
        with one vector for each input, which is also a token that is generated after the masked ones.
    """
    batch, tokens = mask.shape
    if len(lead) == 2:
        straight, across = lead == [batch, tokens], lead == [tokens, batch]
        if straight and across and batch > 1:  # as many tokens as inputs
            return swapped is not None, mask.t() if swapped else mask
        if straight or across:
            return True, mask if straight else mask.t()
        if lead in ([batch, 1], [1, batch]):  # of a pooled activation, or of a decoder that continues a prompt
            return True, None
        if lead == [1, batch * tokens] and not swapped:
            return True, mask.reshape(1, -1)
        return False, None
    if len(lead) == 1:
        if lead[0] == batch:
            return True, None
        if lead[0] == batch * tokens:  # tokens of all inputs, one after the other
            return True, (mask.t() if swapped else mask).reshape(-1)
        return False, None
    if len(lead) == 3 and lead[0] == batch:  # attention heads, before or after the tokens
        places = [dim for dim in (1, 2) if lead[dim] == tokens]
        if len(places) == 1:
            return True, mask.unsqueeze(3 - places[0]).expand(lead)
    return False, None


def cut(mask: Tensor | None, positions: str) -> Tensor | None:
    """The mask of the vectors that :func:`torchprobe.ops.positions.vectors_of` returns."""
    if mask is None or positions == "all":
        return mask
    if mask.dim() == 1:
        return mask
    if positions == "mean":
        return mask.flatten(1).any(1).view(-1, *[1] * (mask.dim() - 1))
    return mask[:, :1] if positions == "class" else mask[:, 1:]
