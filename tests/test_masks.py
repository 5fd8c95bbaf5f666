"""Positions and padding masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import Net, activations, batches
from torch import Tensor

import torchprobe

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("positions", ["class", "patch", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_positions_and_masks_against_float64(positions: str, masked: bool) -> None:
    model, x = Net(), batches(1)[0]
    mask = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)) > 0.4 if masked else torch.ones(5, 3, dtype=torch.bool)
    mask[4] = not masked  # an input without any token
    with torchprobe.record(model, "**", positions=positions) as rec:
        if masked:
            rec.mask(mask)
        model(x)
    for layer, flat in activations(model, [x]).items():
        h, m = torch.from_numpy(flat).reshape(5, 3, -1), mask
        if positions == "class":
            vectors = h[:, 0][m[:, 0]]
        elif positions == "patch":
            vectors = h[:, 1:][m[:, 1:]]
        else:
            vectors = torch.stack([h[i, m[i]].mean(0) for i in range(5) if m[i].any()])
        assert rec[layer].vectors == len(vectors)
        expected = stats.kurtosis(vectors.numpy(), axis=1, fisher=False).mean()
        assert rec[layer].vector_kurtosis == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(rec[layer].mean, vectors.mean(0), rtol=1e-5, atol=1e-6)


def test_mask_holds_until_changed_or_to_the_end_of_its_block() -> None:
    model, x = Net(), batches(1)[0]
    first, second = torch.zeros(5, 3, dtype=torch.bool), torch.zeros(5, 3, dtype=torch.bool)
    first[0], second[:2] = True, True
    seen = []
    with torchprobe.record(model, "head") as rec:

        def vectors() -> int:
            rec.reset()
            model(x)
            return rec["head"].vectors

        rec.mask(first)
        seen += [vectors(), vectors()]
        with rec.mask(second):
            seen.append(vectors())
        seen.append(vectors())
        rec.mask(None)
        seen.append(vectors())
    assert seen == [3, 3, 6, 3, 15]


def test_a_mask_ignores_one_vector_per_input() -> None:
    class Pooled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](x)[:, 0])

    model = Pooled()
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[:, 2] = False
    with torchprobe.record(model, ["blocks.0", "head"]) as rec, rec.mask(mask):
        model(batches(1)[0])
    assert (rec["blocks.0"].vectors, rec["head"].vectors) == (10, 5)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(4, 3, dtype=torch.bool), ValueError, r"layer 'head': the mask has shape \(4, 3\).*activation has shape \(5, 3, 4\)"),
        (torch.ones(5, 3), TypeError, r"bool tensor.* got torch.float32: try mask.bool\(\)"),
        ([[True]], TypeError, "got list"),
        (torch.ones(5, dtype=torch.bool), ValueError, r"shape \(batch, tokens\), got \(5,\)"),
    ],
)
def test_masks_that_do_not_fit(mask: Any, error: type[Exception], message: str) -> None:
    model = Net()

    def run() -> None:
        with torchprobe.record(model, "head") as rec:
            rec.mask(mask)
            model(batches(1)[0])

    with pytest.raises(error, match=message):
        run()
