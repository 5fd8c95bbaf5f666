"""Whether two encoders started from the same weights: only then is there something between them, as WiSE-FT needs.

What is known of them must not say otherwise, and their weights must show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SHARED = 0.5
"""The least median cosine of the weight matrices of two networks that share their start.

Fine-tuning moves weights by a small part of their length, so the cosine stays close to 1. The matrices of networks that were trained on
their own are nearly orthogonal, about 1/√n for n entries, also with the same data, since hidden units have no order. In between there is
little, so the limit matters little (we chose it).
"""

FROM_SCRATCH = ("supervised", "imagenet-captions")
"""The roles of encoders that were trained from random weights."""


def no_start_by_facts(about: Mapping[str, Any], about_other: Mapping[str, Any]) -> str | None:
    """Why two encoders have no shared start by what is known of them, or None: a role that is trained from random weights, or two sorts of
    pretraining.

    Args:
        about, about_other: what is known, with the keys ``role`` and ``pretraining``.

    >>> no_start_by_facts({"role": "zero-shot"}, {"role": "supervised"})
    'they share no start: the role supervised is trained from random weights'
    >>> no_start_by_facts({"role": "zero-shot", "pretraining": "LAION"}, {"role": "fine-tuned", "pretraining": "LAION"})
    """
    roles = [each.get("role") for each in (about, about_other)]
    if roles[0] != roles[1] and (scratch := [role for role in roles if role in FROM_SCRATCH]):
        return f"they share no start: the role {scratch[0]} is trained from random weights"
    sorts = [each.get("pretraining") for each in (about, about_other)]
    if all(sorts) and sorts[0] != sorts[1]:
        return f"they share no start: one was pretrained on {sorts[0]}, the other on {sorts[1]}"
    return None


def no_start_by_weights(one: nn.Module, other: nn.Module) -> str | None:
    """Why two networks of one architecture have no shared start by their weights, or None; see :data:`SHARED`.

    >>> _ = torch.manual_seed(0)
    >>> a, b, c = nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30)
    >>> _ = b.load_state_dict({key: value + 0.01 * torch.randn_like(value) for key, value in a.state_dict().items()})
    >>> no_start_by_weights(a, b)
    >>> no_start_by_weights(a, c)[:61]
    'their weights share no start: the median cosine of the matric'
    """
    cosine = weight_cosine(one, other)
    if cosine is not None and not cosine >= SHARED:
        return f"their weights share no start: the median cosine of the matrices is {cosine:.2f}, and {SHARED} or more after fine-tuning"
    return None


def weight_cosine(one: nn.Module, other: nn.Module) -> float | None:
    """The median over weight matrices and filters of the cosine between the two networks; None if there are none in common.

    >>> weight_cosine(nn.Linear(2, 2), nn.LayerNorm(2)) is None
    True
    """
    theirs = dict(other.named_parameters())
    found = [
        _cosine(weight, theirs[name])
        for name, weight in one.named_parameters()
        if weight.dim() > 1 and name in theirs and theirs[name].shape == weight.shape
    ]
    return float(torch.tensor(found, dtype=torch.float64).median()) if found else None


def _cosine(a: Tensor, b: Tensor) -> float:
    x, y = (each.detach().flatten().cpu().double() for each in (a, b))
    return float(x @ y / (x.norm() * y.norm()).clamp_min(torch.finfo(torch.float64).tiny))
