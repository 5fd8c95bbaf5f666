from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cuda_shim
import pytest
import torch
import wheels
from drawing import stop_drawing
from torch import Tensor

from torchprobe import Moments
from torchprobe.ops import observe_
from torchprobe.ops.library import KERNELS_FROM, torch_release
from torchprobe.ops.observe import reference

collect_ignore = ["statistic_kinds.py"]  # collected for doctests, its classes would be defined twice


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        slow = item.get_closest_marker("slow")
        if slow and not slow.args:
            raise pytest.UsageError(f'{item.nodeid}: give the reason, as in @pytest.mark.slow("compiles with inductor")')
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _terminal() -> None:
    """Tables have their default width. pytest-xdist sets the variable in its workers."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="module", autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """What one file compiled must not make models of the same class in another file look compiled."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.10, compiled graphs are not recorded, and a warning says so."""
    if torch_release(torch.__version__) < KERNELS_FROM:
        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.skip("torch is older than 2.10"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that write pages but do not look at their plots."""
    stop_drawing(monkeypatch)


@dataclass(frozen=True)
class Observe:
    """One way to the numbers: ``observe(x, …)`` gives the moments of one call."""

    run: Callable[..., None]
    device: str = "cpu"

    def __call__(self, x: Tensor, feature_dim: int = -1, mask: Tensor | None = None, outlier_sigma: float = 6.0) -> Moments:
        return self.calls([x], feature_dim, mask, outlier_sigma)

    def calls(
        self, parts: list[Tensor], feature_dim: int = -1, mask: Tensor | None = None, outlier_sigma: float = 6.0, every: int = 1
    ) -> Moments:
        m = Moments(parts[0].shape[feature_dim], outlier_sigma=outlier_sigma)
        state = m.state.to(self.device)
        for x in parts:
            self.run(state, self.place(x), feature_dim, outlier_sigma, every, None if mask is None else mask.to(self.device))
        m.state.copy_(state)
        return m

    def place(self, x: Tensor) -> Tensor:
        """The same values at the same strides on the device."""
        if self.device == "cpu":
            return x
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(self.device)
        return memory.as_strided(x.shape, x.stride(), x.storage_offset())


IMPLEMENTATIONS = {
    "operator": Observe(observe_),
    "reference": Observe(reference),
    "cuda kernels on the host": Observe(cuda_shim.observe),
    "cuda": Observe(observe_, "cuda"),
}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in IMPLEMENTATIONS])
def observe(request: pytest.FixtureRequest) -> Observe:
    """Every way to the numbers: what the dispatcher has for the CPU, plain PyTorch, the CUDA kernels on the host, and on a GPU."""
    if "host" in request.param and cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler")
    return IMPLEMENTATIONS[request.param]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> wheels.Build:
    """The wheel as ``make wheel`` builds it; takes minutes."""
    return wheels.make_wheel(tmp_path_factory.mktemp("wheel"))
