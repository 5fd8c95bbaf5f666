"""Arguments of the operators that read labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

CATEGORIES = 3


@st.composite
def overlaps(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of overlap_tally_, and the same for the definition."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mode = draw(st.sampled_from(("default", "default", "boxes", "netdissect")))
    labels, units, images = draw(st.sampled_from((2, 5, 40))), draw(st.sampled_from((1, 2, 17))), draw(st.sampled_from((0, 1, 2, 3)))
    h, w = draw(st.sampled_from((1, 2, 3, 7))), draw(st.sampled_from((1, 2, 5, 8)))
    kind, q = (
        draw(st.sampled_from(("normal", "ties", "constant", "tiny", "huge", "nonfinite", "zeros"))),
        draw(st.sampled_from((0.0, 0.5, 0.9))),
    )
    shape = (images, units, h, w)
    maps = rng.standard_normal(shape)
    with np.errstate(over="ignore"):
        maps = {
        "normal": maps, "ties": np.round(maps), "constant": np.full(shape, 0.1), "tiny": maps * 1e-42, "huge": maps * 2e38,
        "nonfinite": rng.choice([np.nan, np.inf, -np.inf, 0.0, 1.0, 2.0], shape), "zeros": np.zeros(shape),
    }[kind].astype(np.float32)  # fmt: skip
    flat = np.sort(np.nan_to_num(maps).transpose(1, 0, 2, 3).reshape(units, -1), 1)
    thresholds = flat[:, int(q * (flat.shape[1] - 1))] if images else np.zeros(units, np.float32)
    thresholds = np.where(rng.random(units) < 0.1, np.nan, thresholds).astype(np.float32)
    given_size = (h * 4, w * 4) if mode == "netdissect" else (0, 0)
    pictures, boxes, whole, sizes, planes = [], [], [], [], []
    for _ in range(images):
        grid = (h * 4, w * 4) if mode == "netdissect" else (int(rng.integers(1, 20)), int(rng.choice([1, 3, 15, 16, 17, 33])))
        numbers = rng.integers(0, labels, 4)
        layers = [rng.choice(numbers, grid).astype(np.int32) for _ in range(int(rng.integers(0, 3)))]
        everywhere = rng.integers(0, labels, int(rng.integers(0, 3))).tolist()
        notes = rng.integers(0, CATEGORIES, int(rng.integers(0, 2))).tolist()
        pictures.append((layers, everywhere, grid, notes))
        corner, extent = rng.uniform(-5, 15, 2), rng.uniform(0.1, 30, 2)
        boxes.append([*corner, *(corner + extent)] if rng.random() < 0.8 else [0.0, 0.0, float(grid[0]), float(grid[1])])
        entries = [*everywhere, *(-1 - c for c in notes)]
        whole += rng.permutation(entries).astype(int).tolist()
        sizes.append([len(layers), *grid, len(entries)])
        planes += [layer.reshape(-1) for layer in layers]
    category = rng.integers(-1, CATEGORIES, labels)
    category[0] = -1  # unlabeled
    return {
        "mode": mode, "maps": maps, "thresholds": thresholds, "category": category, "given": given_size, "pictures": pictures,
        "planes": np.concatenate([np.zeros(0, np.int32), *planes]), "sizes": np.array(sizes, np.int64).reshape(-1, 4),
        "whole": np.array(whole, np.int64), "boxes": np.array(boxes).reshape(-1, 4), "per_plane": mode == "netdissect",
    }  # fmt: skip


def arguments_of(a: dict[str, Any]) -> tuple[Any, ...]:
    """What follows the three tensors of counts."""
    names = ("maps", "thresholds", "category", "planes", "sizes", "whole")
    boxes = torch.from_numpy(a["boxes"]) if a["mode"] == "boxes" else None
    return (
        *(torch.from_numpy(a[name]) for name in names),
        "anchored" if a["mode"] == "netdissect" else "half_pixel",
        *a["given"],
        a["per_plane"],
        boxes,
    )


@dataclass(frozen=True)
class Ranking:
    """Arguments of average_precision; ``shows`` and ``counts`` are the same as bool (images, concepts)."""

    scores: Tensor
    crow: Tensor
    col: Tensor
    eligible: Tensor | None
    group: Tensor | None
    both: bool
    shows: np.ndarray
    counts: np.ndarray


@st.composite
def rankings(draw: st.DrawFn) -> Ranking:
    images, units = draw(st.sampled_from((0, 1, 2, 3, 10, 30))), draw(st.sampled_from((0, 1, 3)))
    concepts, groups = draw(st.sampled_from((0, 1, 2, 5))), draw(st.sampled_from((0, 1, 3, 9)))
    kind = draw(st.sampled_from(("normal", "ties", "equal", "signed zeros", "infinite", "subnormal", "large")))
    dtype = draw(st.sampled_from((torch.float32, torch.float64, torch.float16, torch.bfloat16)))
    index, strided = draw(st.sampled_from((torch.int64, torch.int32))), draw(st.booleans())
    both = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((units, images))
    x = {
        "normal": x, "ties": np.round(x), "equal": np.full_like(x, 1.5), "signed zeros": np.where(x > 0, 0.0, -0.0),
        "infinite": np.where(np.abs(x) > 1, np.sign(x) * np.inf, x), "subnormal": x * 1e-44, "large": x * 1e38,
    }[kind]  # fmt: skip
    scores = torch.from_numpy(x).to(dtype)
    if strided:
        scores = scores.repeat_interleave(2, 1)[:, ::2]
    shows = rng.random((images, concepts)) < rng.choice([0.1, 0.5, 0.9])
    rows = [rng.permutation(np.flatnonzero(row)) for row in shows]
    crow = torch.tensor([0, *np.cumsum([len(row) for row in rows])], dtype=index)
    col = torch.from_numpy(np.concatenate([np.zeros(0, int), *rows])).to(index)
    if not groups:
        return Ranking(scores, crow, col, None, None, both, shows, np.ones((images, concepts), bool))
    allowed, of = rng.random((images, groups)) < 0.6, rng.integers(0, groups, concepts)
    return Ranking(scores, crow, col, torch.from_numpy(allowed), torch.from_numpy(of), both, shows, allowed[:, of])
