"""Two encoders side by side: what differs, with an interval where images can be paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import nn

from torchprobe.analysis.concepts import UNITS
from torchprobe.analysis.intervals import bootstrap_interval
from torchprobe.analysis.similarity import FEWEST, cka
from torchprobe.studies.compare.saved import Saved

ZERO_SHOT = "zero-shot"


def pairs_within(saved: Sequence[Saved]) -> list[tuple[Saved, Saved]]:
    """Pairs with the same backbone: a zero-shot encoder first, each with every other; where nothing says which is which, all pairs.

    Encoders without a backbone – interpreted one by one – are taken to be for each other, since nothing says otherwise.
    """
    found = []
    for one, other in combinations(saved, 2):
        if one.about("backbone") != other.about("backbone"):
            continue
        roles = (one.about("role"), other.about("role"))
        if ZERO_SHOT in roles or not any(roles):
            found.append((other, one) if roles[1] == ZERO_SHOT and roles[0] != ZERO_SHOT else (one, other))
    return found


def pair_name(one: Saved, other: Saved) -> str:
    """What a pair is called."""
    return f"{one.name} → {other.name}"


def difference(one: Saved, other: Saved, seed: int = 0) -> dict[str, Any]:
    """``one`` minus ``other``.

    The intervals of kurtosis and accuracy are bootstraps over the images both have seen, pair by pair; nan where these are fewer than two.
    Effective robustness is over the shifts both have.
    """
    mine, theirs = one.summary(), other.summary()
    shared = [name for name in one.kurtosis if name in other.kurtosis]
    each = np.array([one.kurtosis[name] - other.kurtosis[name] for name in shared], dtype=np.float64)
    known = each[np.isfinite(each)]
    low, high = bootstrap_interval(known, seed)
    row: dict[str, Any] = {
        "pair": f"{one.name} − {other.name}",
        "a": one.name,
        "b": other.name,
        "backbone": one.about("backbone"),
        "images": len(known),
        "kurtosis": float(known.mean()) if known.size else math.nan,
        "kurtosis_low": low,
        "kurtosis_high": high,
    }
    right = np.array([float(one.right[name]) - float(other.right[name]) for name in one.right if name in other.right], dtype=np.float64)
    row["accuracy_low"], row["accuracy_high"] = bootstrap_interval(right, seed)
    mine["robustness"], theirs["robustness"], row["shifts"] = common_robustness(one, other)
    for key in ("accuracy", "robustness", "concepts", "polysemanticity", "outlier_features"):
        row[key] = None if mine[key] is None or theirs[key] is None else mine[key] - theirs[key]
    names = [set(each.results["concepts"]["names"][UNITS]) if "concepts" in each.results else None for each in (one, other)]
    row["shared_concepts"] = None if names[0] is None or names[1] is None else len(names[0] & names[1])
    row["cka"] = representation_cka(one, other)
    return row


def common_robustness(one: Saved, other: Saved) -> tuple[float | None, float | None, int]:
    """The mean effective robustness of each over the shifts that both have, and how many these are."""
    mine, theirs = one.robustness(), other.robustness()
    shared = [shift for shift in mine if shift in theirs]
    if not shared:
        return None, None, 0
    first, second = (math.fsum(values[shift] for shift in shared) / len(shared) for values in (mine, theirs))
    return first, second, len(shared)


def representation_cka(one: Saved, other: Saved, batch: int = 256) -> float | None:
    """Linear CKA of the two representations over the images both have seen; None where the representations were not kept, or there are
    fewer than four such images.

    See :func:`torchprobe.analysis.cka`. Batches are equally large, so what does not fill one is left out, unless there is no other.
    """
    a, b = one.embeddings(), other.embeddings()
    if a is None or b is None:
        return None
    where = {name: i for i, name in enumerate(b.ids)}
    common = torch.tensor([(i, where[name]) for i, name in enumerate(a.ids) if name in where], dtype=torch.int64)
    if len(common) < FEWEST:
        return None
    whole = common[: max(batch, len(common) // batch * batch)]
    return float(cka(nn.Identity(), nn.Identity(), [(a.h[rows[:, 0]], b.h[rows[:, 1]]) for rows in whole.split(batch)], "", "")[0, 0])
