"""A pretended GPU: what runs on ``cuda:0`` runs on the CPU, so the benchmarks' own code for a GPU runs where there is none.

Tensors asked for on ``cuda`` are made on the CPU; events read the host's clock; a graph remembers the operations that were called while it
was captured and their results, and a replay calls them again and puts what comes out where it was, as a CUDA graph does. How fast a GPU is,
and whether a kernel can be captured, only a GPU can tell.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA Pretended 1",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=16 << 30,
    L2_cache_size=1 << 15,
    uuid="01234567-89ab-cdef-0123-456789abcdef",
)


class OnTheCpu(TorchFunctionMode):
    """Every device that a function of torch is given becomes the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda value: CPU if isinstance(value, torch.device) else value, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


class Capture(TorchDispatchMode):
    """Writes down every operation, and where its results are."""

    def __init__(self, operations: list[Any]) -> None:
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


class Graph:
    def __init__(self) -> None:
        self.operations: list[Any] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.operations:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing, "an event that cannot be timed"
        self.time: float | None = None

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)
        self.time = perf_counter()

    def synchronize(self) -> None:
        assert self.time is not None, "waits for an event that nobody has recorded"

    def elapsed_time(self, end: Event) -> float:
        assert self.time is not None and end.time is not None
        return 1e3 * (end.time - self.time)


class Generator(torch.Generator):
    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        return super().__new__(cls, device="cpu")


class AdamW(torch.optim.AdamW):
    """The CPU's, which knows nothing of capture; before every step torch asks an accelerator whether it is capturing."""

    def __init__(self, parameters: Any, lr: float, fused: bool, capturable: bool) -> None:
        super().__init__(parameters, lr=lr)

    def _accelerator_graph_capture_health_check(self) -> None:
        pass

    _cuda_graph_capture_health_check = _accelerator_graph_capture_health_check


class Stream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.waits_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits_for.append(other)


@contextlib.contextmanager
def capturing(graph: Graph, pool: Any = None, stream: Stream | None = None) -> Iterator[None]:
    assert stream is None or isinstance(stream, Stream)
    with Capture(graph.operations):
        yield


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts it in place of ``torch.cuda``; returns the modes in which synchronization was watched, as they come."""
    modes: list[str] = []
    current = Stream()
    api = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_properties": lambda device: PROPERTIES,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 3 << 20,
        "set_sync_debug_mode": modes.append,
        "current_stream": lambda device: current,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": capturing,
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": Stream,
    }
    for name, value in api.items():
        monkeypatch.setattr(torch.cuda, name, value)

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    return modes
