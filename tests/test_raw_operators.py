"""Calls of the registered operators that no Python of ours makes, and that anybody can: refused at the entry, with the argument named."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchprobe.ops import average_precision, kernels, layout, new_state, observe_, overlap_tally_
from torchprobe.ops.average_precision import MOST_CONCEPTS
from torchprobe.ops.exponents import COUNTS, exponents_
from torchprobe.ops.exponents import reference as exponents_reference
from torchprobe.ops.exponents import shapes as exponents_shapes
from torchprobe.ops.observe import reference as observe_reference
from torchprobe.ops.quantile import keep_largest_, new_buffers
from torchprobe.ops.quantile import reference as keep_reference

ROOT = Path(__file__).parents[1]
native = pytest.mark.skipif("loaded" not in kernels()["cpu"], reason="no native kernels")
raw = torch.ops.torchprobe


def freed(x: Tensor, size: int = 0) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(size)
    return x


def shortened_view() -> Tensor:
    x = torch.randn(30, 8)
    view = x[:, 4:]
    x.untyped_storage().resize_(956)
    return view


def buffers(features: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    return new_buffers(features, slots)


def overlap(**changes: Any) -> dict[str, Any]:
    """The arguments of a call that is right, with some changes."""
    integers = {"dtype": torch.int64}
    return {
        "intersection": torch.zeros(2, 3, **integers),
        "activation": torch.zeros(2, 3, **integers),
        "truth": torch.zeros(3, **integers),
        "maps": torch.randn(1, 2, 4, 4),
        "thresholds": torch.zeros(2),
        "category": torch.tensor([-1, 0, 1]),
        "planes": torch.ones(64, dtype=torch.int32),
        "sizes": torch.tensor([[1, 8, 8, 0]]),
        "whole": torch.zeros(0, **integers),
        **changes,
    }


OBSERVE: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "a freed state": (lambda: (freed(new_state(4)), torch.randn(3, 4)), "state .*reaches beyond its storage of 0 bytes"),
    "a freed activation": (lambda: (new_state(4), freed(torch.randn(30, 4))), "x .*reaches beyond its storage of 0 bytes"),
    "a short activation": (lambda: (new_state(4), freed(torch.randn(30, 4), 16)), "x .*reaches beyond its storage of 16 bytes"),
    "one byte short": (lambda: (new_state(4), freed(torch.randn(30, 4), 479)), "x .*reaches beyond its storage of 479 bytes"),
    "a short view": (lambda: (new_state(4), shortened_view()), "x .*reaches beyond its storage of 956 bytes"),
    "a freed mask": (
        lambda: (new_state(4), torch.randn(3, 4), -1, 6.0, 1, freed(torch.ones(3, dtype=torch.bool))),
        "mask .*reaches beyond",
    ),
    "the state itself": (lambda: (s := new_state(4), s[:40].view(10, 4)), "state is written to and shares memory with x"),
    "more elements than memory": (lambda: (new_state(4), torch.zeros(1).expand(2**40, 4)), "x .*more than"),
    "every": (lambda: (new_state(4), torch.randn(3, 4), -1, 6.0, 2**60), "every must be at"),
    "outlier_sigma": (lambda: (new_state(4), torch.randn(3, 4), -1, math.nan), "outlier_sigma must be positive"),
    "damaged calls": (lambda: (new_state(4).fill_(math.nan), torch.randn(3, 4)), "the state is damaged"),
}


@pytest.mark.parametrize("call", [pytest.param(raw.observe_, marks=native, id="native"), observe_, observe_reference])
@pytest.mark.parametrize("case", OBSERVE)
def test_observe_refuses(case: str, call: Callable[..., None]) -> None:
    arguments, message = OBSERVE[case][0](), OBSERVE[case][1]
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(*arguments)


def test_what_shares_a_storage_but_no_memory_is_fine() -> None:
    memory = torch.zeros(layout.size(4) + 40, dtype=torch.float64)
    memory[-40:] = torch.randn(40)
    state, x = memory[:-40], memory[-40:].view(10, 4)
    raw.observe_(state, x)
    assert int(state[layout.VECTORS]) == 10
    torch.testing.assert_close(layout.rows(state)[6], x.mean(0))


def test_a_negated_view_is_what_it_means() -> None:
    x = torch.randn(50, 4)
    state = new_state(4)
    raw.observe_(state, torch._neg_view(x))
    torch.testing.assert_close(layout.rows(state)[6], -x.double().mean(0))
    with pytest.raises(ValueError, match="state is a negated"):
        raw.observe_(torch._neg_view(state), x)
    assert int(state[layout.CALLS]) == 1


def exponents(features: int = 4, **changes: Any) -> dict[str, Any]:
    """The arguments of a call that is right, with some changes."""
    state = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in exponents_shapes(features).items()}
    return {**state, "x": torch.randn(30, features), "feature_dim": -1, "mask": None, **changes}


def _one_memory(first: str, second: str) -> dict[str, Any]:
    """Two states that overlap."""
    found = exponents()
    memory = torch.zeros(found[first].numel() + found[second].numel() - 1, dtype=torch.float64)
    found[first] = memory[: found[first].numel()].view(found[first].shape)
    found[second] = memory[-found[second].numel() :].view(found[second].shape)
    return found


def _x_in(name: str) -> dict[str, Any]:
    found = exponents()
    return {**found, "x": found[name].view(-1)[:4].view(1, 4)}


def _mask_in_state() -> dict[str, Any]:
    largest = torch.zeros(4, dtype=torch.float64)
    return exponents(largest=largest, x=torch.randn(32, 4), mask=largest.view(torch.bool))


EXPONENTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    **{
        f"freed {name}": (
            lambda name=name: exponents(**{name: freed(exponents()[name])}),
            f"{name} .*reaches beyond its storage of 0 bytes",
        )  # type: ignore[misc]
        for name in ("counts", "largest", "sizes", "quarters", "levels", "x")
    },
    "a short activation": (lambda: exponents(x=freed(torch.randn(30, 4), 479)), "x .*reaches beyond its storage of 479 bytes"),
    "a short view": (lambda: exponents(x=shortened_view()), "x .*reaches beyond its storage of 956 bytes"),
    "a freed mask": (lambda: exponents(mask=freed(torch.ones(30, dtype=torch.bool))), "mask .*reaches beyond"),
    "two states that are one": (lambda: _one_memory("quarters", "levels"), "is written to and shares memory with"),
    "counts in sizes": (lambda: _one_memory("counts", "sizes"), "is written to and shares memory with"),
    "an activation in a state": (lambda: _x_in("sizes"), "sizes is written to and shares memory with x"),
    "a mask in a state": (_mask_in_state, "largest is written to and shares memory with mask"),
    "more elements than memory": (lambda: exponents(x=torch.zeros(1).expand(2**40, 4)), "x .*more than"),
    "a mask that repeats": (
        lambda: exponents(1, x=torch.zeros(1).expand(2**28, 1), mask=torch.ones(1, dtype=torch.bool).expand(2**28)),
        "repeats its memory",
    ),
    "whole numbers": (lambda: exponents(x=torch.ones(30, 4, dtype=torch.int64)), "float64, float32, bfloat16 or float16"),
    "complex numbers": (lambda: exponents(x=torch.ones(30, 4, dtype=torch.complex64)), "float64, float32, bfloat16 or float16"),
    "states of float32": (lambda: exponents(sizes=torch.zeros(3, 4)), "sizes "),
    "states of whole numbers": (lambda: exponents(counts=torch.zeros(COUNTS, dtype=torch.int64)), "counts "),
    "a state that is not contiguous": (lambda: exponents(sizes=torch.zeros(4, 3, dtype=torch.float64).T), "sizes must be contiguous"),
    "another width": (lambda: exponents(x=torch.randn(30, 5)), "5 features|of shape"),
    "too few levels": (lambda: exponents(levels=torch.zeros(3, 2, 100, dtype=torch.float64)), "states were not made|levels"),
    "another dimension": (lambda: exponents(feature_dim=2), "feature_dim"),
    "a dimension without end": (lambda: exponents(feature_dim=-(2**63)), "feature_dim"),
    "no dimension": (lambda: exponents(x=torch.tensor(1.0)), "feature_dim"),
    "a mask of numbers": (lambda: exponents(mask=torch.ones(30)), "mask"),
    "a mask of another length": (lambda: exponents(mask=torch.ones(29, dtype=torch.bool)), "mask must"),
    "an activation on another device": (lambda: exponents(x=torch.randn(30, 4, device="meta")), "meta|device|CPU"),
    "a mask on another device": (lambda: exponents(mask=torch.ones(30, dtype=torch.bool, device="meta")), "mask|meta"),
    "a sparse activation": (lambda: exponents(x=torch.randn(30, 4).to_sparse()), "layout|Sparse|sparse"),
}


@pytest.mark.parametrize("call", [pytest.param(raw.exponents_, marks=native, id="native"), exponents_, exponents_reference])
@pytest.mark.parametrize("case", EXPONENTS)
def test_exponents_refuses(case: str, call: Callable[..., None]) -> None:
    arguments, message = EXPONENTS[case][0](), EXPONENTS[case][1]
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(**arguments)


KEEP: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "a capacity that overflows": (lambda: (*buffers(1, 18), torch.randn(500, 1), 1, 2**63 - 1), "capacity must be at least 1, and at most"),
    "a freed buffer": (lambda: (freed(buffers(1, 18)[0]), *buffers(1, 18)[1:], torch.randn(500, 1), 1, 2), "values .*reaches beyond"),
    "a freed activation": (lambda: (*buffers(1, 18), freed(torch.randn(500, 1)), 1, 2), "x .*reaches beyond"),
    "values that are the activation": (
        lambda: (*(b := buffers(1, 18)), b[0][:, :5].view(5, 1), 1, 2),
        "values is written to and shares memory with x",
    ),
    "no room": (lambda: (*buffers(1, 18), torch.randn(500, 1), 1, 3), "no room for 500 positions"),
    "a bound that is nan": (lambda: (*(b := buffers(1, 18))[:2], b[2].fill_(math.nan), torch.randn(5, 1), 1, 2), "bound is damaged"),
    "negative counts": (lambda: ((b := buffers(1, 18))[0], b[1].fill_(-1), b[2], torch.randn(5, 1), 1, 2), "counts is damaged"),
    "too large counts": (lambda: ((b := buffers(1, 18))[0], b[1].fill_(19), b[2], torch.randn(5, 1), 1, 2), "counts is damaged"),
}


@pytest.mark.parametrize("call", [pytest.param(raw.keep_largest_, marks=native, id="native"), keep_largest_, keep_reference])
@pytest.mark.parametrize("case", KEEP)
def test_keep_largest_refuses(case: str, call: Callable[..., None]) -> None:
    arguments, message = KEEP[case][0](), KEEP[case][1]
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(*arguments)


@pytest.mark.parametrize("call", [pytest.param(raw.keep_largest_, marks=native, id="native"), keep_largest_, keep_reference])
@pytest.mark.parametrize("slots", [4112, 200_000])
def test_nan_among_kept_values_is_found(slots: int, call: Callable[..., None]) -> None:
    """At the entry where there are few; otherwise when they are sorted, before anything is read outside."""
    values, counts, bound = buffers(1, slots)
    values[:, : slots - 4] = torch.randn(slots - 4)
    values[0, 1000] = math.nan
    counts[0] = slots - 4
    with pytest.raises((RuntimeError, ValueError), match="values is damaged"):
        call(values, counts, bound, torch.randn(500, 1), 1, slots - 16)


@pytest.mark.parametrize("call", [pytest.param(raw.average_precision, marks=native, id="native"), average_precision])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(1, 2), torch.tensor([0, 0, 0]), torch.zeros(0, dtype=torch.int64), 2**31 - 2), "concepts|2147483646"),
        ((torch.zeros(2**40, 0), torch.tensor([0]), torch.zeros(0, dtype=torch.int64), 3), "scores"),
        ((freed(torch.randn(2, 3)), torch.tensor([0, 0, 1, 1]), torch.tensor([0]), 2), "scores .*reaches beyond"),
        ((torch.randn(2, 3), freed(torch.tensor([0, 0, 1, 1]), 24), torch.tensor([0]), 2), "crow .*reaches beyond"),
        (
            (torch.zeros(0, 2**30), torch.zeros(1, dtype=torch.int64).expand(2**30 + 1), torch.zeros(0, dtype=torch.int64), 2),
            "crow repeats",
        ),
        (
            (
                torch.zeros(1, 0),
                torch.tensor([0]),
                torch.zeros(0, dtype=torch.int64),
                1,
                torch.zeros(0, 2**40, dtype=torch.bool),
                torch.tensor([0]),
            ),
            "eligible",
        ),
    ],
)
def test_average_precision_refuses(arguments: tuple[Any, ...], message: str, call: Callable[..., Tensor]) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(*arguments)


def test_average_precision_divides_many_units(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["torchprobe.ops.average_precision"]
    scores, labels = torch.randn(9, 20), (torch.arange(21), torch.randint(4, (20,)))
    whole = [average_precision(scores, *labels, 4, both=both) for both in (False, True)]
    monkeypatch.setattr(module, "MOST_RESULTS", 16)
    assert all(torch.equal(average_precision(scores, *labels, 4, both=both), whole[both]) for both in (False, True))
    assert MOST_CONCEPTS == 1 << 22


def _shared_planes() -> dict[str, Any]:
    truth = torch.zeros(40, dtype=torch.int64)
    return overlap(truth=truth[:3], planes=truth.view(torch.int32)[:64])


def _shared_category() -> dict[str, Any]:
    counts = torch.zeros(20, dtype=torch.int64)
    return overlap(intersection=counts[:6].view(2, 3), category=counts[5:8])


OVERLAP: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "categories that are counts": (_shared_category, "intersection is written to and shares memory with category"),
    "planes that are counts": (_shared_planes, "truth is written to and shares memory with planes"),
    "two counts that are one": (lambda: overlap(activation=(t := torch.zeros(2, 3, dtype=torch.int64)), intersection=t), "shares memory"),
    "freed planes": (lambda: overlap(planes=freed(torch.ones(64, dtype=torch.int32))), "planes .*reaches beyond"),
    "freed counts": (lambda: overlap(truth=freed(torch.zeros(3, dtype=torch.int64))), "truth .*reaches beyond"),
    "a grid without end": (
        lambda: overlap(sizes=torch.tensor([[0, 2**20, 2**20, 0]]), planes=torch.zeros(0, dtype=torch.int32)),
        "impossible|sizes",
    ),
    "an input without end": (lambda: overlap(grid="anchored", height=2**62, width=2**62), "height and width|more than"),
}


@pytest.mark.parametrize("call", [pytest.param(raw.overlap_tally_, marks=native, id="native"), overlap_tally_])
@pytest.mark.parametrize("case", OVERLAP)
def test_overlap_refuses(case: str, call: Callable[..., None]) -> None:
    arguments, message = OVERLAP[case][0](), OVERLAP[case][1]
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(**arguments)


@pytest.mark.parametrize("call", [pytest.param(raw.overlap_tally_, marks=native, id="native"), overlap_tally_])
def test_label_masks_have_a_limit(call: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHPROBE_MOST_MASK_BYTES", "40000")
    labels, side = 400, 64
    arguments = overlap(
        intersection=torch.zeros(2, labels, dtype=torch.int64),
        truth=torch.zeros(labels, dtype=torch.int64),
        category=torch.zeros(labels, dtype=torch.int64),
        planes=torch.arange(side * side, dtype=torch.int32) % labels,
        sizes=torch.tensor([[1, side, side, 0]]),
    )
    with pytest.raises((RuntimeError, ValueError), match="TORCHPROBE_MOST_MASK_BYTES"):
        call(**arguments)
    assert not arguments["truth"].any()
    monkeypatch.delenv("TORCHPROBE_MOST_MASK_BYTES")
    call(**arguments)
    assert arguments["truth"].sum() == side * side - (side * side + labels - 1) // labels  # label 0 counts nothing


@pytest.mark.parametrize("name", ["observe_output", "observe_gradient", "observe_gradient_backward"])
def test_observers_refuse_freed_tensors(name: str) -> None:
    with pytest.raises(ValueError, match=r"(x|grad) .*reaches beyond its storage of 0 bytes"):
        getattr(raw, name)(freed(torch.randn(4, 3)), -1)
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="token is written to and shares memory with x"):
        raw.observe_activation_(x[0], x, -1)


def test_observers_of_calls_refuse_freed_tensors_and_wrong_tokens() -> None:
    x, token = torch.zeros(3), torch.zeros(())
    with pytest.raises(ValueError, match=r"outputs\[1\] .*reaches beyond its storage of 0 bytes"):
        raw.observe_call_(token, [x], [x, freed(torch.randn(4, 3))], -1)
    with pytest.raises(ValueError, match=r"token is written to and shares memory with inputs\[0\]"):
        raw.observe_call_(x[0], [x], [], -1)
    with pytest.raises(ValueError, match="token must be a single number"):
        raw.observe_call_(torch.zeros(2), [x], [x], -1)
    assert token == 0


@pytest.mark.slow("starts processes for raw calls")
def test_random_calls_find_no_fault() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fuzz.operators", "--calls", "400", "--seed", "11"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert run.returncode == 0 and "400 calls" in run.stdout, run.stdout + run.stderr


@pytest.mark.slow("damages many states")
def test_damaged_states_find_no_fault() -> None:
    run = subprocess.run([sys.executable, "-m", "fuzz.states", "--cases", "150"], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 0 and "Recorder" in run.stdout, run.stdout + run.stderr


_SUBNORMAL = """
import torch
from importlib import import_module
from torchprobe.ops import average_precision, layout, new_state, overlap_tally_
from torchprobe.ops.float_mode import every_number
from torchprobe.ops.observe import reference
from torchprobe.ops.quantile import keep_largest_, new_buffers

quantile, overlap, ranks = (import_module(f"torchprobe.ops.{name}") for name in ("quantile", "overlap", "average_precision"))

def tallied(x, run):
    counts = [torch.zeros(shape, dtype=torch.int64) for shape in ((3, 3), (3, 2), (3,))]
    with every_number():
        maps, thresholds = x.flatten()[:24].float().reshape(1, 3, 2, 4), torch.full((3,), 7e-44)
    planes = torch.tensor([1, 2, 0, 1] * 2, dtype=torch.int32)
    category, sizes, whole = torch.tensor([-1, 0, 0]), torch.tensor([[1, 2, 4, 0]]), torch.zeros(0, dtype=torch.int64)
    run(*counts, maps, thresholds, category, planes, sizes, whole)
    return counts

def states(x, dim):
    a, b = new_state(x.shape[dim]), new_state(x.shape[dim])
    torch.ops.torchprobe.observe_(a, x, dim)
    reference(b, x, dim)
    found = [a, b]
    for run in (keep_largest_, quantile.reference):
        values, counts, bound = new_buffers(x.shape[dim], 40)
        run(values, counts, bound, x, dim, 3)
        with every_number():
            found += [values.sort(1).values, counts, bound]
    found += tallied(x, overlap_tally_) + tallied(x, overlap.reference)
    scores = x[:5].contiguous()
    col, crow = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1] + [1] * (scores.shape[1] - 1))
    with every_number():
        wide = scores.float() if scores.dtype != torch.float64 else scores
    found += [average_precision(scores, crow, col, 1), ranks.reference(wide, crow, col, 1)]
    assert torch.equal(found[-1], found[-2])
    return found

types = ((torch.float16, torch.int16), (torch.bfloat16, torch.int16), (torch.float32, torch.int32), (torch.float64, torch.int64))
for dtype, bits in types:
    numbers = torch.randint(1, 120, (40, 24)).to(bits).view(dtype)
    for x, dim in ((numbers, -1), (numbers.T.contiguous(), 0), (numbers[:, ::2], -1), (numbers[:1], -1)):
        torch.set_flush_denormal(False)
        expected = states(x, dim)
        assert torch.set_flush_denormal(True)
        found = states(x, dim)
        torch.set_flush_denormal(False)
        for number, (one, other) in enumerate(zip(expected, found)):
            assert one.numpy().tobytes() == other.numpy().tobytes(), (number, dtype, tuple(x.shape))
        assert int(found[0][layout.VECTORS]) == len(x) if dim == -1 else True
        torch.set_flush_denormal(True)
        with every_number() as flushed:
            assert flushed
            assert (layout.rows(found[0])[3] > 0).all() and (layout.rows(found[1])[3] > 0).all()
            assert torch.equal(*(layout.rows(state)[:5] for state in found[:2]))
        assert float(torch.tensor(5e-324, dtype=torch.float64)) * 1.0 == 0  # the mode is what it was
        torch.set_flush_denormal(False)
"""


@pytest.mark.parametrize("isa", ["", "avx2", "baseline"])
def test_subnormal_numbers_count_whatever_the_mode_of_the_thread(isa: str) -> None:
    environment = {**os.environ, "TORCHPROBE_ISA": isa}
    run = subprocess.run([sys.executable, "-c", _SUBNORMAL], capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr
