"""The kernel and the reference of overlap count the same, also where there is nothing to count."""

from __future__ import annotations

import random

import pytest
import torch
from processes import python
from torch import Tensor

from torchprobe.dissection import LabelBatch, Overlap
from torchprobe.ops import kernels, overlap, overlap_tally_
from torchprobe.ops.overlap import Arguments, reference

native = pytest.mark.skipif(not kernels()["cpu"].startswith("loaded"), reason=f"no native kernel: {kernels()['cpu']}")
CASES = 150  # of each of the ten seeds


def drawn(moments: random.Random, seed: int) -> Arguments:
    """Any shapes, empty ones too. In half of the cases nothing is labeled and no unit is active."""
    images, units, labels = moments.choice((0, 1, 2, 3)), moments.choice((0, 1, 2, 5)), moments.choice((1, 2, 3, 9))
    planes, whole = moments.choice((0, 1, 2)), moments.choice((0, 1, 3))
    rows, columns, h, w = (moments.choice(sizes) for sizes in ((1, 2, 7, 40), (1, 3, 16), (1, 2, 5), (1, 2, 3)))
    empty, grid = moments.random() < 0.5, moments.choice(("half_pixel", "anchored"))
    generator = torch.Generator().manual_seed(seed)
    maps, thresholds = torch.randn(images, units, h, w, generator=generator), torch.randn(units, generator=generator)
    if empty:
        maps, thresholds = torch.zeros_like(maps), thresholds.abs()
    most = 1 if empty else labels
    boxed = grid == "half_pixel" and moments.random() < 0.3
    return Arguments(
        torch.zeros(units, labels, dtype=torch.int64),
        torch.zeros(units, 3, dtype=torch.int64),
        torch.zeros(labels, dtype=torch.int64),
        maps,
        thresholds,
        torch.randint(-1, 2, (labels,), generator=generator),
        torch.randint(0, most, (images * planes * rows * columns,), generator=generator, dtype=torch.int32),
        torch.tensor([[planes, rows, columns, whole]] * images, dtype=torch.int64).reshape(images, 4),
        torch.randint(0 if empty else -2, most, (images * whole,), generator=generator),
        grid,
        8 * h,
        8 * w,
        moments.random() < 0.5,
        torch.tensor([[-1.0, 0.0, 0.7 * rows, columns]] * images, dtype=torch.float64).reshape(images, 4) if boxed else None,
    )


def counted(function: object, case: Arguments) -> list[Tensor] | str:
    """What it counts, or its error."""
    state = [part.clone() for part in case[:3]]
    try:
        function(*state, *case[3:])  # type: ignore[operator]
    except ValueError as error:
        return str(error)
    return state


@native
@pytest.mark.parametrize("seed", range(10))
def test_the_kernel_counts_as_the_reference(seed: int) -> None:
    moments = random.Random(seed)
    for number in range(CASES):
        case = drawn(moments, seed * CASES + number)
        mine, theirs = counted(overlap_tally_, case), counted(reference, case)
        same = mine == theirs if isinstance(mine, str) or isinstance(theirs, str) else all(map(torch.equal, mine, theirs))
        assert same, (seed, number, [tuple(part.shape) if isinstance(part, Tensor) else part for part in case])


def test_an_image_of_many_labels_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference looks at few labels at a time."""
    sizes: list[int] = []
    monkeypatch.setattr("torchprobe.ops.overlap._BLOCK", (1 << 12, 1 << 12))
    plane = torch.randperm(32 * 32, generator=torch.Generator().manual_seed(0)).view(32, 32)

    def noted(planes: Tensor, whole: Tensor, labels: Tensor, per_plane: bool, real: object = overlap._masks) -> Tensor:
        found: Tensor = real(planes, whole, labels, per_plane)  # type: ignore[operator]
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(overlap, "_masks", noted)
    maps = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    packed = LabelBatch.pack([[("a", plane)]], [(32, 32)])
    mine, theirs = (Overlap(torch.zeros(3), torch.zeros(1024, dtype=torch.int64), 1) for _ in range(2))
    mine.update(maps, packed)
    state = theirs.intersection, theirs.activation, theirs.truth
    reference(*state, maps, theirs.thresholds, theirs.category, packed.planes, packed.sizes, packed.whole)
    assert max(sizes) <= 1 << 12 and len(sizes) == 256
    assert all(map(torch.equal, mine.counts(), theirs.counts()))


NOTHING = """
import tempfile
import numpy as np, torch
from torch import nn
from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.dissection import dissect
from torchprobe.ops import kernels
assert "disabled" in kernels()["cpu"]
folder = tempfile.mkdtemp()
with BrodenWriter(folder, {"object": ["sky"]}, size=8) as writer:
    for i in range(3):
        labels = {"object": np.zeros((4, 4), int) + (1 if i == 2 else 0)}
        writer.add(f"mine/{i}", np.full((8, 8, 3), 80 * i, np.uint8), labels)
def to_tensor(image):
    return torch.from_numpy(np.array(image)).movedim(2, 0) / 255
net = nn.Conv2d(3, 1, 4, stride=4)
nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
found = dissect(net, "", Broden(folder), preprocess=to_tensor, batch_size=1, thresholds={"": torch.zeros(1)})[""]
print(found.counts.intersection.tolist(), found.counts.activation.tolist(), found.counts.truth.tolist())
"""


def test_one_unit_that_is_never_active_without_kernels() -> None:
    """One image at a time, of which the first show nothing: there is nothing to divide by."""
    done = python(NOTHING, TORCHPROBE_DISABLE_KERNELS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[[0]] [[0]] [16]"
