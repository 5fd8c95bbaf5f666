"""Wide vectors: the CPU kernels divide features into blocks and tiles into strips, and nothing may show where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import assert_close, moments
from torch import Tensor

from torchprobe import Moments

NAN, INF = float("nan"), float("inf")
BLOCK = 1536  # csrc/cpu/observe.cpp
MANY = 400_000  # elements; from about here on threads share the blocks


def observe(x: Tensor, feature_dim: int = -1, mask: Tensor | None = None, outlier_sigma: float = 6.0) -> Moments:
    m = Moments(x.shape[feature_dim], outlier_sigma=outlier_sigma)
    m.update(x, feature_dim, mask)
    return m


def rows(vectors: int, features: int) -> Tensor:
    """Blocks and strips have their own means and spreads, and a few elements are outliers."""
    x = torch.randn(vectors, features) * (1 + torch.arange(features) // 1000 % 3) + 2 * (torch.arange(features) / 500).sin() + 3
    x[vectors // 2 :] += 1
    x.view(-1)[:: max(features // 2, 999)] += 60
    return x


# -- every boundary --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257])
@pytest.mark.parametrize("features", [767, 768, 769, 1023, 1025, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 4095, 4096, 4097])
def test_every_width_and_number_of_vectors(vectors, features):
    x = rows(vectors, features)
    assert_close(observe(x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vectors", [1, 9, 130])
@pytest.mark.parametrize("features", [383, 385, 768, 1025, BLOCK + 1, 4097])
def test_every_type(dtype, vectors, features):
    x = rows(vectors, features).to(dtype)
    assert_close(observe(x), x, rtol=1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("vectors", "features"), [(16, 50_257), (1, 151_936), (5, 151_936)])
def test_vocabularies(vectors, features):
    x = rows(vectors, features)
    assert_close(observe(x), x)


LAYOUTS: dict[str, Callable[[], tuple[Tensor, int]]] = {
    "strided rows": lambda: (rows(200, 4096)[:, :3001], -1),
    "every other row": lambda: (rows(400, 2500)[::2], -1),
    "unaligned": lambda: (rows(200, 3002).view(-1)[1:-3001].view(-1, 3002), -1),
    "every other feature": lambda: (rows(150, 6200)[:, ::2], -1),
    "features first": lambda: (rows(3100, 150), 0),
    "features in the middle": lambda: (rows(20 * 3100, 9).view(20, 3100, 9), 1),
    "maps": lambda: (rows(2 * 1600, 17 * 16).view(2, 1600, 17, 16), 1),
    "small maps": lambda: (rows(3 * 4200, 49).view(3, 4200, 7, 7), 1),
    "large maps": lambda: (rows(700, 30 * 40).view(1, 700, 30, 40), 1),
    "channels last": lambda: (rows(15 * 15, 3001).view(1, 15, 15, 3001).permute(0, 3, 1, 2), 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name, dtype):
    x, dim = LAYOUTS[name]()
    x = x.to(dtype) if dtype != torch.float32 else x
    before = x.clone()
    assert_close(observe(x, dim), x, dim, rtol=1e-10 if dtype == torch.float64 else 1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_mask(share):
    x = rows(300, 3000).view(3, 100, 3000)
    mask = torch.rand(3, 100) < share
    assert_close(observe(x, -1, mask), x, -1, mask)


@pytest.mark.parametrize(("blocks", "features", "repeats"), [("shared by threads", 5 * BLOCK, 70), ("in chunks of vectors", BLOCK + 1, 40)])
def test_thousands_of_vectors(blocks, features, repeats):
    """More than one band of tiles, or partial states: the same 64 vectors many times, without a copy of them."""
    x = rows(64, features)
    got, want = observe(x.expand(repeats, 64, features)), moments(x)
    for name in ("mean", "variance", "skewness", "kurtosis", "mean_abs"):
        torch.testing.assert_close(getattr(got, name), torch.from_numpy(want[name]), rtol=1e-5, atol=1e-5)
    for name in ("min", "max", "outlier_frequency"):
        torch.testing.assert_close(getattr(got, name), torch.from_numpy(want[name]), rtol=1e-15, atol=0)
    assert got.vectors == 64 * repeats and (got.count == 64 * repeats).all()
    assert got.vector_kurtosis == pytest.approx(want["vector_kurtosis"], rel=1e-5)
    assert got.vector_kurtosis_std == pytest.approx(want["vector_kurtosis_std"], rel=1e-5)


# -- hostile values --------------------------------------------------------------------------------------------------------


def nonfinite(x: Tensor) -> Tensor:
    x[0, 0], x[1, BLOCK - 1], x[2, BLOCK], x[3, -1] = NAN, INF, -INF, NAN
    x[70 % len(x), 1000:2000] = NAN
    x[:, 2345] = INF
    return x


def blocks_of(values: list[float]) -> Callable[[Tensor], Tensor]:
    """Vectors that are constant within every block, though not as a whole."""
    return lambda x: x * 0 + torch.tensor(values).repeat_interleave(-(-x.shape[1] // len(values)))[: x.shape[1]]


def noisy(scale: Tensor, center: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.randn_like(x) * scale[: x.shape[1]] + center[: x.shape[1]]


J = torch.arange(20_000)
HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "nan and inf": nonfinite,
    "only nan": lambda x: x * NAN,
    "zeros": lambda x: x * 0,
    "constant": lambda x: x * 0 + 1000.1,
    "constant blocks": blocks_of([1.0, 2.0, -7.0]),
    "constant blocks that differ by one rounding": blocks_of([1000.0, 1000.0 + 2.0**-14]),
    "far from zero": lambda x: x + 1000,
    "a block far from the others": noisy(torch.ones(20_000), 1e4 * (J < 700)),
    "blocks on other scales": noisy(torch.where(J // 700 % 2 == 0, 1e-6, 1e3), torch.zeros(20_000)),
    "tiny deviations in the first block": noisy(torch.where(J < 1000, 1e-12, 1.0), torch.full((20_000,), 0.5)),
    "zero but for one element": lambda x: torch.where(J[: x.shape[1]] == 2000, 1.0, 0.0) + x * 0,
    "sparse": lambda x: x * (torch.rand_like(x) < 0.001),
    "largest values": lambda x: x.clamp(-3, 3) * 1e38,
    "smallest values": lambda x: x * 1e-36,
    "every vector on another scale": lambda x: x * torch.logspace(-10, 10, len(x))[:, None],
    "every feature on another scale": lambda x: x * torch.logspace(-12, 12, x.shape[1]),
    "heavy tails": lambda x: x.pow(5),
    "an outlier at each end of a block": lambda x: x / 10 + 1e3 * ((J[: x.shape[1]] % 800 == 0) & (torch.rand_like(x) < 0.1)),
    "another offset in every strip": lambda x: x + 50.0 * (torch.arange(len(x)) // 8 % 5)[:, None],
}


@pytest.mark.parametrize("vectors", [9, 140])  # by tiles, and by blocks
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values(name, vectors):
    x = HOSTILE[name](rows(vectors, 3001))
    assert_close(observe(x), x)


@pytest.mark.parametrize("name", ["nan and inf", "constant blocks", "every vector on another scale", "heavy tails"])
def test_hostile_maps(name):
    x = HOSTILE[name](rows(290, 2400)).T.reshape(1, 2400, 29, 10)
    assert_close(observe(x, 1), x, 1)


@pytest.mark.parametrize("outlier_sigma", [0.1, 3.0, 6.0])
def test_outliers_are_those_of_the_definition(outlier_sigma):
    x = rows(150, 3001)
    assert_close(observe(x, outlier_sigma=outlier_sigma), x)
    assert_close(observe(x[:9], outlier_sigma=outlier_sigma), x[:9])
    y = x.T.reshape(1, 3001, 15, 10)
    assert_close(observe(y, 1, outlier_sigma=outlier_sigma), y, 1)


def test_a_state_takes_calls_of_every_size():
    x = rows(600, 3001)
    x[300, 2000] = NAN
    m = Moments(3001)
    for part in x.split([1, 140, 9, 250, 200]):
        m.update(part)
    assert_close(m, x)


# -- invariances -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [-100, -37, 1, 60, 110])
@pytest.mark.parametrize(("shape", "dim"), [((9, 3001), 1), ((200, 3001), 1), ((1, 3001, 12, 12), 1)])
def test_bitwise_invariant_under_powers_of_two(k, shape, dim):
    x = torch.randn(shape)
    a, b = observe(x, dim), observe(x * 2.0**k, dim)
    for name in ("kurtosis", "skewness", "outlier_frequency", "count"):
        assert torch.equal(getattr(a, name).nan_to_num(), getattr(b, name).nan_to_num()), name
    for name, power in (("mean", 1), ("mean_abs", 1), ("min", 1), ("max", 1), ("variance", 2)):
        assert torch.equal(getattr(a, name) * 2.0 ** (k * power), getattr(b, name)), name
    assert (a.vector_kurtosis, a.vector_kurtosis_std) == (b.vector_kurtosis, b.vector_kurtosis_std)


@pytest.mark.parametrize(("shape", "dim"), [((300, 7001), 1), ((2100, BLOCK + 1), 1), ((2, 3001, 16, 15), 1)])
def test_bitwise_the_same_for_any_number_of_threads(shape, dim):
    x = torch.randn(shape) + 5
    x.view(-1)[12345], x.view(-1)[54321] = NAN, 1e5
    assert x.numel() > MANY
    threads = torch.get_num_threads()
    states = []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            m = Moments(shape[dim])
            m.update(x, dim)
            m.update(x * 3, dim)
            states.append(m.state)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(states[0], state) for state in states)
