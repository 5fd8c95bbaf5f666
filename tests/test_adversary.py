"""The operator against values chosen to defeat it: outliers where it samples, clusters, means far from 0; its invariances on them."""

from __future__ import annotations

import json

import adversary
import pytest
import torch
from processes import python
from threads import threads
from torch import Tensor

from torchprobe import Moments
from torchprobe.ops import kernels

native = pytest.mark.skipif(not kernels()["cpu"].startswith("loaded"), reason=f"no native kernel: {kernels()['cpu']}")
pytestmark = native


def observe(x: Tensor, feature_dim: int = -1) -> Moments:
    m = Moments(x.shape[feature_dim])
    m.update(x, feature_dim)
    return m


def assert_exact(x: Tensor, feature_dim: int = -1, limit: float = adversary.LIMIT) -> None:
    found = adversary.errors(observe(x, feature_dim), x, feature_dim)
    assert found and max(found.values()) <= limit, found


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_no_choice_of_values_defeats_it(isa):
    code = "import adversary, json; print(json.dumps(adversary.worst(seed=7, count=150)))"
    done = python(f"import sys; sys.path.insert(0, {str(adversary.__file__).rpartition('/')[0]!r}); {code}", TORCHPROBE_ISA=isa)
    assert done.returncode == 0, done.stderr
    largest = json.loads(done.stdout)
    assert set(largest) == {"variance", "skewness", "kurtosis", "vector kurtosis"}
    assert all(error <= adversary.LIMIT for error, _ in largest.values()), largest


@pytest.mark.slow("ten thousand activations")
def test_no_choice_of_ten_thousand_defeats_it():
    largest = adversary.worst(seed=1, count=10_000)
    assert all(error <= adversary.LIMIT for error, _ in largest.values()), largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("amplitude", [10.0, 1e3, -1e4])
def test_outliers_exactly_where_a_shift_is_sampled(dtype, amplitude):
    x = torch.randn(1, 256, 512).to(dtype)
    for positions in ([0, 128, 256], [0, 1, 2, 3, 128, 129, 130, 131, 256, 257, 258, 259], [*range(0, 512, 32)]):
        hostile = x.clone()
        hostile[..., positions] += amplitude
        assert_exact(hostile.view(1, 256, 16, 32), 1)
        for rows in (64, 256, 512):  # a strip, a tile, two tiles
            assert_exact(hostile[0, :, :rows].T.contiguous())
            assert_exact(hostile[0, :, :rows].T.contiguous().repeat(1, 9))  # blocks of features


@pytest.mark.parametrize("distance", [0.0, 0.3, 0.6, 0.9, 1.2, 2.0, 5.0, 1e3])
@pytest.mark.parametrize("shape", [(300, 768), (300, 3001), (1, 768, 14, 14)])
def test_two_values_at_any_distance_from_zero(shape, distance):
    """Their kurtosis is the smallest there is, so no large fourth power hides what a cancellation loses."""
    dim = 1
    scale = 1 + torch.rand(shape[0], *[1] * (len(shape) - 1)) if len(shape) == 2 else 1 + torch.rand(1, 1, *shape[2:])
    x = (torch.randn(shape).sign() + distance) * scale
    assert_exact(x, dim)


def test_vectors_that_change_their_mean_in_the_middle_of_a_tile():
    x = torch.randn(600, 512)
    x[70:75] += 3
    x[200:] += 10
    assert_exact(x)
    assert_exact(x.T.reshape(1, 512, 24, 25).contiguous(), 1)


HOSTILE = {
    "means": lambda x: x + 4 * (torch.arange(len(x)) % 3 == 0)[:, None],
    "outliers where a shift is sampled": lambda x: x + 1e3 * (torch.arange(len(x)) % 16 == 0)[:, None],
    "two values": lambda x: x.sign() + 0.7,
    "vectors on other scales": lambda x: x * 2.0 ** (torch.arange(len(x)) % 9 - 4)[:, None],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("layout", ["rows", "blocks", "maps"])
def test_bitwise_the_same_on_another_scale_and_for_any_number_of_threads(name, layout):
    x = HOSTILE[name](torch.randn(640, 3001 if layout == "blocks" else 96))
    dim = 1
    if layout == "maps":
        x = x.view(2, 16, 20, 96).permute(0, 3, 1, 2).contiguous()
    reference = observe(x, dim)
    for k in (-60, 9, 40):
        scaled = observe(x * 2.0**k, dim)
        for field in ("kurtosis", "skewness", "outlier_frequency"):
            assert torch.equal(getattr(reference, field), getattr(scaled, field)), (field, k)
        assert torch.equal(reference.variance * 2.0 ** (2 * k), scaled.variance)
        assert (reference.vector_kurtosis, reference.vector_kurtosis_std) == (scaled.vector_kurtosis, scaled.vector_kurtosis_std)
    for n in (2, 3):
        with threads(n):
            assert torch.equal(observe(x, dim).state, reference.state)
