"""The operator, compared with two passes in float64 for every layout, type and hostile value."""

from __future__ import annotations

import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
from oracle import assert_close
from processes import python
from torch import Tensor

from torchprobe import Moments
from torchprobe.ops import kernels, layout, new_state, observe_, selfcheck
from torchprobe.ops.exponents import exponents_
from torchprobe.ops.observe import SCHEMA, reference

CSRC = Path(__file__).parents[1] / "csrc"
NAN, INF = float("nan"), float("inf")
native = pytest.mark.skipif(not kernels()["cpu"].startswith("loaded"), reason=f"no native kernel: {kernels()['cpu']}")


def student(*shape: int, df: float = 1.5) -> Tensor:
    return torch.distributions.StudentT(df).sample(shape)


# -- numbers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 10, 30, 100, 1000])
def test_any_offset(observe, offset):
    x = torch.randn(3000, 97) + offset
    assert_close(observe(x), x)


@pytest.mark.parametrize("implementation", [observe_, reference])
def test_offsets_that_only_float64_has(implementation):
    """The values differ in whole numbers of their last place, so that a rounded mean would be as far off as they are apart."""
    steps = torch.randint(-2000, 2000, (50, 17)).double()
    x = 2.0**50 + steps * 0.25
    small, large = new_state(17), new_state(17)
    implementation(small, steps)
    implementation(large, x)
    for slot in (layout.KURTOSIS_MEAN, layout.KURTOSIS_M2):
        assert abs(large[slot] - small[slot]) <= 1e-12 * (small[layout.KURTOSIS_MEAN] ** 2 * 50)
    m2, other = (layout.rows(state)[layout.ROWS.index("m2")] for state in (large, small))
    torch.testing.assert_close(m2, other * 0.25**2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e-3, 1e9, 1e20, 1e35])
@pytest.mark.parametrize("offset", [0, 1000])
def test_any_scale(observe, scale, offset):
    x = (torch.randn(700, 65) + offset) * scale
    assert_close(observe(x), x)


HOSTILE = {
    "log-normal": lambda: torch.randn(3000, 70).exp() * 3 + 1000,
    "heavy tails": lambda: student(4000, 60),
    "fifth power": lambda: torch.randn(3000, 60).pow(5),
    "skewed, relu": lambda: torch.randn(2000, 130).relu(),
    "an outlier in the first row": lambda: torch.cat([torch.full((1, 65), 1e6), torch.randn(3000, 65)]),
    "an outlier in every tile": lambda: torch.randn(2000, 65) * torch.where(torch.arange(2000) % 64 == 0, 1e4, 1.0)[:, None],
    "outlier features": lambda: torch.randn(2000, 300) * torch.where(torch.arange(300) % 100 == 7, 1e3, 1.0) + 3,
    "every feature on another scale": lambda: torch.randn(1000, 120) * torch.logspace(-25, 25, 120),
    "every vector on another scale": lambda: torch.randn(1000, 120) * torch.logspace(-10, 10, 1000)[:, None],
    "one step of rounding": lambda: torch.where(torch.rand(500, 90) < 0.5, 1000.0, 1000.0 + 2.0**-14),
    "ties": lambda: torch.randint(0, 3, (2000, 77)).float(),
    "largest values": lambda: torch.randn(300, 40).clamp(-3, 3) * 1e38,
    "smallest values": lambda: torch.randn(300, 40) * 1e-36,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values(observe, name):
    x = HOSTILE[name]()
    assert_close(observe(x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1023])
def test_every_width_and_type(observe, dtype, features):
    x = (torch.randn(200, features) * 2 + 3).to(dtype)
    assert_close(observe(x), x, rtol=1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("vectors", [0, 1, 2, 3, 5, 63, 64, 65, 129, 1000])
def test_every_number_of_vectors(observe, vectors):
    x = torch.randn(vectors, 50)
    assert_close(observe(x), x)


def test_a_hundred_thousand_features(observe):
    x = torch.randn(11, 100_000)
    assert_close(observe(x), x)


def test_float64_at_its_own_precision(observe):
    x = torch.randn(500, 80, dtype=torch.float64) * 1e30 + 1e36
    assert_close(observe(x), x, rtol=1e-8)


LAYOUTS = {
    "rows": lambda x: (x.flatten(1), -1),
    "rows of 3-D": lambda x: (x.flatten(2), -1),
    "channel-major": lambda x: (x, 1),
    "channels last": lambda x: (x.contiguous(memory_format=torch.channels_last), 1),
    "height": lambda x: (x, 2),
    "batch": lambda x: (x, 0),
    "negative dimension": lambda x: (x, -3),
    "every other channel": lambda x: (x[:, ::2], 1),
    "cut and strided": lambda x: (x[1:, 3:, ::2, 1::3], 1),
    "transposed": lambda x: (x.transpose(1, 3), 3),
    "permuted": lambda x: (x.permute(2, 0, 3, 1), 2),
    "expanded vectors": lambda x: (x[:1].expand(9, -1, -1, -1), 1),
    "expanded features": lambda x: (x[:, :1].expand(-1, 40, -1, -1), 1),
    "few positions": lambda x: (x[:, :, :3, :3].contiguous(), 1),
    "unaligned": lambda x: (x.flatten()[1:-18].view(-1, 19), -1),
    "one dimension": lambda x: (x[0, :, 0, 0], 0),
    "five dimensions": lambda x: (x[:, :, None], 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(observe, name, dtype):
    x, dim = LAYOUTS[name]((torch.randn(5, 37, 19, 23) * torch.logspace(-1, 1, 37)[:, None, None] + 1).to(dtype))
    before = x.clone()
    assert_close(observe(x, dim), x, dim, rtol=1e-10 if dtype == torch.float64 else 1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["rows of 3-D", "channel-major", "channels last", "transposed", "unaligned"])
def test_nan_and_inf_anywhere(observe, name):
    x, dim = LAYOUTS[name](torch.randn(5, 37, 19, 23))
    x = x.clone(memory_format=torch.preserve_format)
    x[torch.unravel_index(torch.randperm(x.numel())[:40], x.shape)] = torch.tensor([NAN, INF, -INF, NAN]).repeat(10)
    x.select(dim, 3)[0] = NAN
    assert_close(observe(x, dim), x, dim)


def test_nothing_but_nan(observe):
    x = torch.full((70, 20), NAN)
    m = observe(x)
    assert m.nonfinite.tolist() == [70] * 20 and m.invalid_vectors == 70
    assert m.mean.isnan().all() and m.min.isnan().all() and m.vectors == 0


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, -1e-20, 3e38])
def test_constant_features_and_vectors(observe, value):
    x = torch.randn(300, 50)
    x[:, 7] = value
    x[11] = value
    x[12] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = observe(x)
        if abs(value) < 1e30:
            assert_close(m, x)
        alone = observe(torch.full((130, 50), value))
    assert m.constant_vectors == 2
    assert alone.variance.tolist() == [0.0] * 50 and alone.kurtosis.isnan().all() and alone.skewness.isnan().all()
    assert alone.constant_vectors == 130 and alone.vectors == 0


@pytest.mark.parametrize("outlier_sigma", [0.1, 2.0, 3.0, 6.0])
def test_outliers_are_those_of_the_definition(observe, outlier_sigma):
    x = torch.randn(800, 150)
    x[:, 3] += 40
    x[:400, 90] -= 25
    assert_close(observe(x, outlier_sigma=outlier_sigma), x)
    y = x.T.reshape(1, 150, 20, 40).contiguous()
    assert_close(observe(y, 1, outlier_sigma=outlier_sigma), y, 1)


def test_mask(observe):
    x = torch.randn(6, 50, 40)
    for dim in (-1, 1):
        mask = torch.rand([size for d, size in enumerate(x.shape) if d != dim % 3]) < 0.4
        assert_close(observe(x, dim, mask), x, dim, mask)
        assert_close(observe(x, dim, mask.T.contiguous().T), x, dim, mask)
    nothing = torch.zeros(6, 50, dtype=torch.bool)
    assert_close(observe(x, -1, nothing), x, -1, nothing)


# -- invariances -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [-100, -37, -1, 1, 20, 60, 100, 117])
@pytest.mark.parametrize("shape", [(900, 70), (3, 70, 15, 20)])
def test_bitwise_invariant_under_powers_of_two(observe, k, shape):
    if observe.run is reference:
        pytest.skip("the reference works in float64 without a scale")
    x = torch.randn(shape) * torch.logspace(-2, 2, 70).reshape(-1, *[1] * (len(shape) - 2)) if len(shape) == 4 else torch.randn(shape)
    a, b = observe(x, 1), observe(x * 2.0**k, 1)
    for name in ("kurtosis", "skewness", "outlier_frequency", "count"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name, power in (("mean", 1), ("mean_abs", 1), ("min", 1), ("max", 1), ("variance", 2)):
        assert torch.equal(getattr(a, name) * 2.0 ** (k * power), getattr(b, name)), name
    assert (a.vector_kurtosis, a.vector_kurtosis_std) == (b.vector_kurtosis, b.vector_kurtosis_std)


@pytest.mark.parametrize("shape", [(5000, 96), (20, 64, 28, 28)])
def test_bitwise_the_same_for_any_number_of_threads(shape):
    x = torch.randn(shape) + 5
    x.view(-1)[12345] = NAN
    threads = torch.get_num_threads()
    states = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            m = Moments(shape[1])
            m.update(x, 1)
            states.append(m.state)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("offset", [0, 1000])
def test_any_partition_and_any_merge_order(offset):
    x = student(3000, 66, df=5.0) + offset
    x[1] = 1e4
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        cuts = torch.randperm(3000, generator=generator)[:7].sort().values
        parts = []
        for part in torch.tensor_split(x, cuts):
            parts.append(Moments(66))
            parts[-1].update(part)
        while len(parts) > 1:  # any two, in any order
            i, j = torch.randperm(len(parts), generator=generator)[:2].tolist()
            parts[i].merge(parts[j])
            del parts[j]
        assert_close(parts[0], x)
    whole = Moments(66)
    for part in x.split(113):
        whole.update(part)
    assert_close(whole, x)


def test_a_state_with_nan_takes_more_values():
    x = torch.randn(400, 40)
    x[3, 5] = NAN
    m = Moments(40)
    for part in x.split(50):
        m.update(part)
    assert_close(m, x)


# -- the operator ----------------------------------------------------------------------------------------------------------


def test_layout_is_the_same_in_c():
    header = (CSRC / "layout.h").read_text()
    slots = re.search(r"enum Slot : int64_t \{([^}]*)\}", header)[1]
    assert [name.strip() for name in slots.split(",")] == [
        "CALLS", "VECTORS", "CONSTANT", "INVALID", "KURTOSIS_MEAN", "KURTOSIS_M2", f"HISTOGRAM = {layout.HISTOGRAM}"
    ]  # fmt: skip
    rows = re.search(r"enum Row : int64_t \{([^}]*)\}", header)[1]
    assert [name.strip().lower() for name in rows.split(",")] == [*layout.ROWS, "rows"]
    log2 = int(re.search(r"BINS_PER_OCTAVE_LOG2 = (\d+)", header)[1])
    assert 2**log2 == layout.BINS_PER_OCTAVE and re.search(r"BINS = (\d+) <<", header)[1] == str(layout.BINS // 2**log2)


def test_schema():
    schema = torch.ops.torchprobe.observe_.default._schema
    assert schema == torch._C.parse_schema(f"torchprobe::{SCHEMA}")
    assert schema.arguments[0].alias_info.is_write and not schema.returns


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck itself looks at its copies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, requires_grad):
    x = torch.randn(4, 6, 8, dtype=dtype, requires_grad=requires_grad)
    operator = torch.ops.torchprobe.observe_.default
    torch.library.opcheck(operator, (new_state(8), x))
    torch.library.opcheck(operator, (new_state(6), x, 1, 3.0, 2))
    torch.library.opcheck(operator, (new_state(8), x, -1, 6.0, 1, torch.rand(4, 6) < 0.5))


def test_nothing_requires_grad_afterwards():
    x = torch.randn(4, 8, requires_grad=True)
    m = Moments(8)
    y = x * 2
    m.update(y)
    y.sum().backward()
    assert not m.state.requires_grad and torch.equal(x.grad, torch.full((4, 8), 2.0))


def test_every_counts_calls_inside_the_operator(observe):
    parts = torch.randn(7, 10, 5)
    m = observe.calls(list(parts), every=3)
    assert m.calls == 7
    assert_close(m, torch.cat([parts[0], parts[3], parts[6]]))


@pytest.mark.parametrize("call", [observe_, reference])
def test_what_does_not_fit_is_refused_in_words(call):
    state, x = new_state(8), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"made for 8 features.*\(4, 9\).*9 along feature_dim=-1"):
        call(state, torch.randn(4, 9))
    with pytest.raises(ValueError, match=r"no features"):
        call(state, torch.randn(4, 0))
    with pytest.raises(ValueError, match=r"feature_dim=2 is outside a tensor of shape \(4, 8\)"):
        call(state, x, 2)
    with pytest.raises(ValueError, match=r"float64, float32, bfloat16 and float16; got torch.int64"):
        call(state, x.long())
    with pytest.raises(ValueError, match=r"not a state of observe_"):
        call(torch.zeros(17, dtype=torch.float64), x)
    with pytest.raises(ValueError, match=r"every must be at least 1, got 0"):
        call(state, x, every=0)
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(4,\)"):
        call(state, x, mask=torch.ones(8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"state must be float64"):
        call(state.half(), x)
    with pytest.raises(ValueError, match=r"reads a tensor, got list"):
        call(state, [1.0, 2.0])
    assert not state.any()


def test_vmap_is_refused():
    state = new_state(3)
    with pytest.raises(RuntimeError, match=r"inside torch.func.vmap.*Record outside vmap"):
        torch.func.vmap(lambda x: (observe_(state, x), x)[1])(torch.randn(4, 5, 3))


def test_inference_mode_leaves_a_state_that_can_be_updated_outside():
    with torch.inference_mode():
        m = Moments(4)
        m.update(torch.randn(3, 4))
    m.update(torch.randn(2, 4))
    assert m.vectors == 5


def test_four_threads_on_one_state_lose_nothing():
    m, x = Moments(48), torch.randn(4, 40, 70, 48)

    def work(parts: Tensor) -> None:
        for part in parts:
            m.update(part)

    threads = [threading.Thread(target=work, args=(parts,)) for parts in x]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert m.calls == 160
    assert_close(m, x.reshape(-1, 48))


@native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to read the memory high-water mark")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim"), [((1, 200, 256), -1), ((1, 256, 16, 14), 1)])
def test_memory_does_not_grow_with_x(dtype, shape, dim):
    def high_water() -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    x = torch.randn(shape, dtype=dtype)
    m = Moments(256)
    m.update(x.expand(1000, *shape[1:]), dim)  # workspaces are made
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    m.update(x.expand(5000, *shape[1:]), dim)  # 1 GB of float32, if it were copied
    assert high_water() - before < 32 << 10


@native
@pytest.mark.parametrize(("isa", "name"), [("avx512", "AVX-512"), ("avx2", "AVX2"), ("baseline", "baseline")])
def test_every_instruction_set(isa, name):
    code = (
        "from torchprobe.ops import kernels, selfcheck\n"
        "print(kernels()['cpu'])\n"
        "print([c for c in selfcheck.run() if not c.passed] or 'all passed')"
    )
    done = python(code, TORCHPROBE_ISA=isa)
    kernel, verdict = done.stdout.splitlines()
    assert verdict == "all passed"
    if name not in kernel:
        pytest.skip(f"this processor has no {name}: {kernel}")


def test_selfcheck_notices_a_wrong_kernel(monkeypatch):
    assert all(check.passed for check in selfcheck.run())
    monkeypatch.setattr(selfcheck, "observe_", lambda state, x, *a, **k: observe_(state, x * (1 + 1e-3 * (x > 1)), *a, **k))
    assert not all(check.passed for check in selfcheck.run())
    monkeypatch.setattr(selfcheck, "observe_", lambda *a, **k: 1 / 0)
    monkeypatch.setattr(selfcheck, "exponents_", lambda *a, **k: exponents_(*a, **{**k, "x": k["x"] * (1 + 1e-3 * (k["x"] > 1))}))
    checks = selfcheck.run()
    own = [check for check in checks if check.name.startswith("exponents")]
    assert len(own) > 10 and not all(check.passed for check in own)
    assert all(not check.passed and "ZeroDivisionError" in check.detail for check in checks if check not in own)
