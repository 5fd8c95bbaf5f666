"""Exponents against NumPy on the same values: exact counts at any scale, and the finer tables of the vectors that are read closely."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from torchprobe.ops import kernels
from torchprobe.ops.exponents import (
    BINS,
    COUNTS,
    HIGHEST,
    LEVELS,
    LOWEST,
    NONFINITE,
    QUARTERS,
    TAKEN,
    ZEROS,
    exponents_,
    octave,
    reference,
    shapes,
    taken,
)
from torchprobe.statistics import Exponents

native = pytest.mark.skipif("loaded" not in kernels()["cpu"], reason="no native kernels")
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def state(features: int) -> dict[str, Tensor]:
    made = {name: torch.zeros(size, dtype=torch.float64) for name, size in shapes(features).items()}
    made["largest"].fill_(-math.inf)
    return made


def every_exponent(dtype: torch.dtype) -> Tensor:
    """One positive and one negative value at both ends of every octave of the dtype, subnormal numbers included."""
    info = torch.finfo(dtype)
    low = {torch.float64: -1074, torch.float32: -149, torch.bfloat16: -133, torch.float16: -24}[dtype]
    high = math.frexp(info.max)[1] - 1
    powers = torch.ldexp(torch.ones(high - low + 1, dtype=torch.float64), torch.arange(low, high + 1))
    return torch.cat([powers, -powers, powers * (2 - 2 * info.eps)]).to(dtype)


INPUTS = {
    "ordinary": normal(200, 33),
    "after a ReLU": normal(200, 33).relu(),
    "wide": normal(64, 100) * torch.logspace(-30, 30, 100),
    "wide in one vector": normal(3, 2500) * torch.logspace(-36, 36, 2500),
    "subnormal": normal(50, 40) * 1e-40,
    "large": normal(50, 40) * 1e37,
    "zeros": torch.zeros(20, 5),
    "nonfinite": normal(50, 40).masked_fill(torch.arange(40) % 7 == 0, math.nan).masked_fill(torch.arange(50)[:, None] % 9 == 0, -math.inf),
    "one value": torch.full((1, 1), 0.75),
    "many equal": torch.full((700, 700), 3.0),
    "a strong feature": normal(90, 768) * torch.where(torch.arange(768) == 5, 2.0**40, 1.0),
    "far apart": normal(90, 768) * (5 * normal(90, 768)).exp(),
    "vectors of other scales": normal(90, 200) * 2.0 ** torch.randint(-120, 120, (90, 1), generator=GENERATOR),
    "first all nan": torch.cat([torch.full((9, 200), math.nan), normal(90, 200)]),
    "all that floats have": torch.tensor([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, -1.0, 3e38, math.inf, math.nan])[
        torch.randint(9, (90, 130), generator=GENERATOR)
    ],
    "more than the counters of a window hold": torch.full((5700, 768), -0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_counts_are_exact(name: str, dtype: torch.dtype) -> None:
    x = INPUTS[name].to(dtype)
    exponents = Exponents(x.shape[1])
    exponents.update(x)
    values = x.double().numpy()
    finite = values[np.isfinite(values)]
    _, found = np.frexp(abs(finite[finite != 0]))
    want = dict(zip(*(part.tolist() for part in np.unique((found - 1).clip(LOWEST - 1, HIGHEST + 1), return_counts=True)), strict=True))
    assert exponents.exponents == want
    assert int(exponents.zeros) == (finite == 0).sum() and int(exponents.nonfinite) == (~np.isfinite(values)).sum()
    size = np.where(np.isfinite(values), abs(values), -np.inf)
    assert exponents.largest.tolist() == size.max(0).tolist()
    assert int(exponents.vectors) == len(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_exponent_has_its_bin(dtype: torch.dtype) -> None:
    x = every_exponent(dtype)
    exponents = Exponents(1)
    exponents.update(x[:, None])
    _, found = np.frexp(abs(x.double().numpy()))
    places, counts = np.unique((found - 1).clip(LOWEST - 1, HIGHEST + 1), return_counts=True)
    assert exponents.exponents == dict(zip(places.tolist(), counts.tolist(), strict=True))
    small = (abs(x.double()) < 2.0**-14).double().mean()
    assert exponents.half_subnormal == pytest.approx(float(small), rel=1e-12)


LAYOUTS: dict[str, tuple[Tensor, int]] = {
    "rows": (normal(300, 70), -1),
    "tokens": (normal(3, 37, 768), -1),
    "maps": (normal(4, 40, 9, 11), 1),
    "large maps": (normal(2, 5, 50, 60), 1),
    "channels last": (normal(4, 40, 9, 11).to(memory_format=torch.channels_last), 1),
    "first": (normal(3, 5, 4), 0),
    "every other": (normal(60, 80)[:, ::2], -1),
    "transposed": (normal(80, 60).T, -1),
    "one vector": (normal(7), -1),
    "one feature": (normal(100, 1), -1),
    "wide": (normal(3, 5000), -1),
    "expanded": (normal(1, 30).expand(50, 30), -1),
}


@native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_kernel_is_the_reference(layout: str, masked: bool, dtype: torch.dtype) -> None:
    x, dim = LAYOUTS[layout]
    x = x.to(dtype)
    lead = [size for place, size in enumerate(x.shape) if place != dim % x.dim()]
    mask = torch.rand(lead, generator=GENERATOR) < 0.6 if masked else None
    mine, theirs = state(x.shape[dim]), state(x.shape[dim])
    for _ in range(2):
        exponents_(**mine, x=x, feature_dim=dim, mask=mask)
        reference(**theirs, x=x, feature_dim=dim, mask=mask)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0 if name in ("counts", "largest") else 1e-11, atol=0, msg=name)


EXTREME: dict[str, tuple[Tensor, int]] = {
    "maps with a feature of nan": (normal(2, 5, 50, 60).masked_fill(torch.arange(5)[:, None, None] == 2, math.nan), 1),
    "a feature of inf": (normal(5, 60).masked_fill(torch.arange(5)[:, None] == 2, math.inf), 0),
    **{f"float64 of {scale:g}": (torch.rand(20, 40, generator=GENERATOR).double() * scale, -1) for scale in (1e308, 1e160, 1e-308, 1e-320)},
    "small blocks beside large ones": (torch.ones(3, 64, dtype=torch.float64).where(torch.arange(64) < 32, 1e-310), -1),
}


@pytest.mark.parametrize("call", [pytest.param(exponents_, marks=native, id="native"), reference])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_values(name: str, call: Callable[..., None]) -> None:
    """Squares beyond float64 are inf, and nothing else is; nothing was seen of a feature of nan; levels are those of values of about 1."""
    x, dim = EXTREME[name]
    made = state(x.shape[dim])
    call(**made, x=x, feature_dim=dim, mask=None)
    assert not any(one.isnan().any() for one in made.values())
    if "float64" not in name:
        seen = x.movedim(dim, -1).reshape(-1, x.shape[dim])
        assert made["largest"].tolist() == seen.double().abs().where(seen.isfinite(), -math.inf).amax(0).tolist()
    if x.dtype == torch.float64 and "1e-320" not in name:
        common = state(x.shape[dim])
        largest = x.abs().amax()
        call(**common, x=x / 2.0 ** (math.frexp(largest)[1] - 1) if "blocks" not in name else x * 2.0**30, feature_dim=dim, mask=None)
        apart = (made["levels"][:, 0] - common["levels"][:, 0]).abs().sum(1)
        assert apart.max() <= 0.01 * x.numel()  # subnormal numbers lose bits


def test_what_is_read_closely() -> None:
    """All three finer tables of a small call, against the definitions."""
    x = (normal(40, 50) * torch.logspace(-1, 1, 40)[:, None]).double()
    exponents = Exponents(50)
    exponents.update(x)
    size = x.abs().numpy()
    assert int(exponents.taken) == 40
    np.testing.assert_allclose(exponents.sizes, [np.full(50, 40.0), size.sum(0), (size**2).sum(0)], rtol=1e-12)
    _, place = np.frexp(size)
    quarter = np.floor((size / 2.0 ** (place - 1.0) - 1) * QUARTERS).astype(int)
    want = np.bincount(((place - LOWEST) * QUARTERS + quarter).ravel(), minlength=QUARTERS * BINS)
    np.testing.assert_array_equal(exponents.quarters, want)
    blocks = np.stack([np.repeat(np.maximum.reduceat(size, range(0, 50, b), 1), b, 1)[:, :50] for b in (32, 16)])
    scales = [np.repeat(size.max(1, keepdims=True) / 127, 50, 1), 2 ** (np.floor(np.log2(blocks[0])) - 8), blocks[1] / 6]
    for row, scale in enumerate(scales):
        low = np.concatenate([[0], (2.0 ** np.arange(-12, 9)[:, None] * (1 + np.arange(8) / 8)).ravel(), [np.inf]])
        for part, weights in ((0, None), (1, (scale**2).ravel())):
            # the largest value of a block lies on an edge, so it may be in either bin: the sums over both are compared
            found = exponents.levels[row, part].numpy()
            want, _ = np.histogram((size / scale).ravel(), low, weights=weights)
            np.testing.assert_allclose(found[:112].sum(), want[:112].sum(), rtol=1e-12)
            np.testing.assert_allclose(found.sum(), want.sum(), rtol=1e-12)
            assert len(found) == LEVELS


def test_a_large_call_is_read_closely_in_part_and_rare_scales_always() -> None:
    x = normal(20_000, 64)
    x[12_345] *= 1e4
    exponents = Exponents(64)
    exponents.update(x)
    assert 128 <= int(exponents.taken) < 400
    energy = float((x.double() ** 2).sum())
    assert float(exponents.sizes[2].sum()) == pytest.approx(energy, rel=1e-3)  # one vector is nearly all of it
    assert float(exponents.sizes[0].sum()) == pytest.approx(x.numel(), rel=1e-9)


@pytest.mark.parametrize("members", [[5], [1000], [3, 100_000], [1, 1, 50_000, 7]])
def test_the_rule_of_what_is_taken(members: list[int]) -> None:
    peak = torch.cat([torch.full((n,), 4.0**place, dtype=torch.float64) for place, n in enumerate(members)])
    weight = taken(peak[torch.randperm(len(peak), generator=GENERATOR)], features=64)
    assert float(weight.sum()) == pytest.approx(len(peak), rel=1e-12)
    peak = peak[torch.randperm(len(peak), generator=GENERATOR)]
    weight = taken(peak, features=64)
    for place, n in enumerate(members):
        chosen = weight[octave(peak) == octave(torch.tensor(4.0**place, dtype=torch.float64))]
        assert float(chosen.sum()) == pytest.approx(n, rel=1e-12) and int((chosen > 0).sum()) >= min(n, 4)


def test_the_number_of_threads_changes_no_bit() -> None:
    x = normal(3000, 96)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(state(96))
            exponents_(**found[-1], x=x)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@native
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_every_instruction_set_counts_the_same(isa: str) -> None:
    code = (
        "import torch; from torchprobe.statistics import Exponents; g = torch.Generator().manual_seed(1); e = Exponents(100)\n"
        "x = torch.randn(400, 100, generator=g) * torch.logspace(-20, 20, 100)\n"
        "for t in (torch.float32, torch.bfloat16, torch.float16): e.update(x.to(t)); e.update(x.T.to(t).contiguous(), 0)\n"
        "print(e.counts.tolist(), e.largest.tolist(), float(e.levels.sum()))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "TORCHPROBE_ISA": one}, capture_output=True, text=True, check=True
        ).stdout
        for one in ("", isa)
    ]
    assert outputs[0] == outputs[1]


def test_opcheck() -> None:
    x, mask = normal(2, 5, 3), torch.rand(2, 3, generator=GENERATOR) < 0.5
    torch.library.opcheck(torch.ops.torchprobe.exponents_.default, (*state(5).values(), x, 1, mask))


@pytest.mark.parametrize("damage", ["counts", "largest", "levels"])
def test_damaged_states_are_refused(damage: str) -> None:
    exponents = Exponents(4)
    exponents.update(normal(10, 4))
    saved = exponents.state_dict()
    saved[damage].view(-1)[0] = -0.5
    with pytest.raises(ValueError, match=f"{damage} in the saved state of Exponents"):
        Exponents.from_state(saved)


def test_refusals_name_the_argument() -> None:
    made = state(4)
    with pytest.raises(ValueError, match="largest must be contiguous torch.float64 of shape"):
        exponents_(**{**made, "largest": torch.zeros(3, dtype=torch.float64)}, x=normal(5, 4))
    with pytest.raises(ValueError, match="mask must be bool"):
        exponents_(**made, x=normal(5, 4), mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="written to and shares memory"):
        exponents_(**made, x=made["sizes"])
    assert made["counts"].sum() == 0 and len(made["counts"]) == COUNTS == NONFINITE + 2 == ZEROS + 3 == TAKEN + 1
