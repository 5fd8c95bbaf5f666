"""``observe_`` beside the same formulas in eager PyTorch and under inductor, at a few sizes.

All of them are replayed from a graph, which is kind to the eager formulas: their twenty launches cost the host nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import formulas
from benchmarks.gpu.device import Device
from benchmarks.gpu.results import Figure, time
from benchmarks.gpu.timing import REPLAY_BYTES, race, rotating, rotation
from benchmarks.inputs import DTYPES
from torchprobe.ops import new_state, observe_


@dataclass(frozen=True)
class Plan:
    """``vectors`` of each input; ``seconds`` for each input of each type, compilation not counted."""

    vectors: Sequence[int] = (1576, 12_608, 403_456)  # 8, 64 and 2048 images of 197 tokens: 5 MB, 39 MB and 1.2 GB in float32
    features: int = 768
    compiled: bool = True
    replay_bytes: int = REPLAY_BYTES
    seconds: float = 1.5


QUICK = Plan(vectors=(256,), compiled=False, replay_bytes=1, seconds=0)


def run(device: Device, plan: Plan) -> Iterator[Figure]:
    failure: Exception | None = None
    for vectors in plan.vectors:
        for name, dtype in DTYPES.items():
            labels: dict[str, str | int] = {"dtype": name, "shape": f"{vectors} × {plan.features}"}
            buffers = _buffers(vectors, plan.features, dtype, device)
            enter = partial(rotating, buffers=buffers, device=device.torch_device, replay_bytes=plan.replay_bytes)
            contestants = {what: enter(call) for what, call in _calls(plan.features, device).items()}
            if plan.compiled and failure is None:
                try:
                    contestants["inductor"] = enter(torch.compile(formulas.eager, fullgraph=True, dynamic=False))
                except Exception as error:  # the compiler wants a C compiler and more, and what it raises is its own
                    failure = error
            times = race(contestants, plan.seconds, device.torch_device)
            for what, timing in times.items():
                yield time(what, timing, note=f"{timing.median / times['observe_'].median:.2f} × observe_", **labels)
    if failure is not None:
        raise RuntimeError(f"inductor: {type(failure).__name__}: {failure}") from failure


def _calls(features: int, device: Device) -> dict[str, Callable[[Tensor], object]]:
    return {
        "x.sum()": torch.sum,
        "observe_": partial(observe_, new_state(features, device.torch_device)),
        "eager": formulas.eager,
    }


def _buffers(vectors: int, features: int, dtype: torch.dtype, device: Device) -> list[Tensor]:
    count = rotation(vectors * features * dtype.itemsize, device.l2)
    pool = torch.randn(count, vectors, features, dtype=dtype, device=device.torch_device)
    return list(pool.unbind(0))
