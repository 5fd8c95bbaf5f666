"""Time on the device: many calls in one CUDA graph, between two events, contestants in turn.

A graph leaves out the work of the host, so only the device is timed. Each graph is replayed once, unmeasured, right before it is measured.
The host is then ahead of the device, and no gap falls between the events. On a CPU the calls are simply made and timed by the host's
clock. This is for tests only; the figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Timing, no_garbage_collection, synchronize, turns

WARM_UP, MAX_ROUNDS = 3, 300
L2_MULTIPLE = 4  # the buffers that take turns are together this many times the size of the L2 cache
REPLAY_BYTES = 2 << 30  # one replay reads about this much, half a millisecond at 4 TB/s …
REPLAY_CALLS = 256  # … or makes this many calls, if that is less


@dataclass(frozen=True)
class Contestant:
    """What is timed: ``run`` makes ``calls`` calls."""

    run: Callable[[], object]
    calls: int = 1


class Mark:
    """A point in the work of the device, between the work requested before it and after it."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        self._time = perf_counter()

    def since(self, earlier: Mark) -> float:
        """Seconds from ``earlier`` to here. Waits until the device has reached this point."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1e3


def capture(
    calls: Callable[[], object],
    device: torch.device,
    *,
    warm_up: int = WARM_UP,
    stream: Any = None,
    pool: Any = None,
) -> Callable[[], object]:
    """Captures ``calls`` in one CUDA graph and returns its replay. Before that, it makes them ``warm_up`` times on the same stream.

    Graphs that share a ``pool`` must also share a ``stream``, and none may read what another has left in that pool.
    """
    if device.type != "cuda":
        return calls
    stream = stream or torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            calls()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The garbage collector must not destroy one graph while another is captured: CUDA reports this as an error.
    with no_garbage_collection(), torch.cuda.graph(graph, pool=pool, stream=stream):
        calls()
    replay: Callable[[], object] = graph.replay
    return replay


def rotation(size: int, l2: int) -> int:
    """How many buffers of ``size`` bytes must take turns, so that each has left the L2 cache before its next turn."""
    return max(1, -(-L2_MULTIPLE * l2 // size))


def rotating(
    call: Callable[[Tensor], object],
    buffers: Sequence[Tensor],
    device: torch.device,
    replay_bytes: int = REPLAY_BYTES,
) -> Contestant:
    """``call`` on each of ``buffers`` in turn, repeated until ``replay_bytes`` are read or ``REPLAY_CALLS`` made."""
    round_bytes = sum(x.nbytes for x in buffers)
    repeats = max(1, min(replay_bytes // round_bytes, REPLAY_CALLS // len(buffers)))

    def calls() -> None:
        for _ in range(repeats):
            for x in buffers:
                call(x)

    return Contestant(capture(calls, device), repeats * len(buffers))


def race(contestants: Mapping[str, Contestant], seconds: float, device: torch.device, *, lead_in: bool = True) -> dict[str, Timing]:
    """The time of one call of each contestant, once a round, in an order that changes, for about ``seconds`` in all.

    ``lead_in`` runs each once more, unmeasured, right before its turn. Leave it out for calls that take much longer than a launch, such as
    a whole training step.
    """
    for contestant in contestants.values():
        contestant.run()
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for name in turns(contestants, seconds, MAX_ROUNDS):
        contestant = contestants[name]
        if lead_in:
            contestant.run()
        start = Mark(device)
        contestant.run()
        times[name].append(Mark(device).since(start) / contestant.calls)
    return {name: Timing(tuple(seconds)) for name, seconds in times.items()}
