"""What ``torch.use_deterministic_algorithms(True)`` refuses on a GPU is not called, by any built-in statistic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from statistic_kinds import Kind, kinds
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchprobe
from torchprobe.ops.observe import reference
from torchprobe.statistics import DynamicStatistic, Moments, Quantile, Statistic, TopInputs
from torchprobe.statistics.factory import Factory

REFUSED = {
    *("median", "nanmedian", "kthvalue"),  # with indices
    *("histc", "put_", "put", "bincount", "index_reduce", "index_reduce_", "scatter_reduce", "scatter_reduce_"),
    *("cumsum", "cumsum_", "cumprod", "logcumsumexp"),  # of floating point
}
"""The names of the operations in the documentation of ``torch.use_deterministic_algorithms`` and in the sources, for forward passes."""
KINDS = {name: kind for name, kind in kinds().items() if name != "covariance"}  # a matrix product depends on cuBLAS


class Refusing(TorchDispatchMode):
    """As a GPU would, but on any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, overload = func.overloadpacket.__name__, func._overloadname
        whole = name in ("median", "nanmedian") and overload == "default"
        integer = name.startswith("cum") and not args[0].is_floating_point()
        if func.namespace == "aten" and name in REFUSED and not whole and not integer:
            raise RuntimeError(f"{func} does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


def parts(statistic: Statistic) -> Iterator[Statistic]:
    yield from getattr(statistic, "statistics", (statistic,))


def exercised(first: Statistic, second: Statistic, x: torch.Tensor) -> None:
    """Everything that a recorder does with statistics."""
    kind = type(first)
    for part in (*parts(first), *parts(second)):
        if isinstance(part, Moments) and x.is_meta:
            reference(part.state, x)  # what a GPU without the kernels runs
        elif not isinstance(part, Moments):
            part.update(x)
            part.update(x, mask=torch.ones(len(x), dtype=torch.bool, device=x.device))
    kind.summaries([first, second], True)
    closed = kind.close_windows([first, second], [None, None])
    closed = kind.close_windows([first, second], closed)
    closed[0].merge(closed[1]).add_window(first)
    kind.summaries(closed, True)
    first.saw_anything()
    kind.reset_all(closed)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_nothing_that_a_gpu_refuses_is_called(kind: Kind) -> None:
    make = Factory(kind.statistic)
    on_meta = not any(isinstance(part, DynamicStatistic) for part in parts(make.template))
    device = torch.device("meta" if on_meta else "cpu")  # the CPU may use faster operations, which are deterministic there
    x = torch.randn(50, 6).to(device)
    with Refusing() if on_meta else RefusingDynamic():
        exercised(make(6, device), make(6, device), x)


class RefusingDynamic(Refusing):
    """Moments among several statistics on the CPU may call ``nanmedian``; they have their own test."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "nanmedian":
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_quantiles_of_a_sketch_and_of_the_vector_kurtosis() -> None:
    sketch = Quantile(6, 0.2, memory=1 << 13)
    with Refusing():
        for _ in range(30):
            sketch.update(torch.randn(200, 6))
        other = Quantile(6, 0.2, memory=1 << 13, seed=1)
        other.update(torch.randn(200, 6))
        sketch.merge(other)
        assert not sketch.exact
        assert not sketch.value(0.1).isnan().any()
        sketch.summary()
        top = TopInputs(6, k=3, score="mean")
        top.update(torch.randn(20, 4, 6))
        top.summary()
        moments = Moments(6)
        moments.update(torch.randn(20, 6))
        for q in (0.0, 0.3, 1.0):
            moments.vector_kurtosis_quantile(q)


def test_the_mode_refuses() -> None:
    x = torch.randn(3, 4)
    for call in (x.nanmedian, x.median):
        with Refusing(), pytest.raises(RuntimeError, match="deterministic"):
            call(-1)
    with Refusing(), pytest.raises(RuntimeError, match="cumsum"):
        x.cumsum(0)
    with Refusing(), pytest.raises(RuntimeError, match="kthvalue"):
        x.kthvalue(1)
    with Refusing():
        x.median()
        x.long().cumsum(0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_everything_runs_on_a_gpu_that_refuses(kind: Kind) -> None:
    model = nn.Sequential(nn.Tanh(), nn.ReLU())  # no cuBLAS, which needs a variable of the environment
    torch.use_deterministic_algorithms(True)
    try:
        with torchprobe.record(model, "*", statistic=kind.statistic) as rec:
            for step in range(3):
                model(torch.randn(50, 6, device="cuda"))
                rec.snapshot(step)
                model(torch.randn(50, 6, device="cuda"))
        assert len(rec.total.merge(rec.total).rows()) == 2
        assert rec.metrics(fields="all")
        assert rec.history.values.shape[:2] == (3, 2)
        for part in (part for layer in rec for part in parts(rec[layer])):
            if isinstance(part, Quantile):
                part.value()
            if isinstance(part, Moments):
                part.vector_kurtosis_quantile(0.3)
    finally:
        torch.use_deterministic_algorithms(False)
