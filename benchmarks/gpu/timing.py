"""Time on the device: many calls in one CUDA graph, between two events, contestants in turn.

A graph leaves out what the host does, so what is timed is the device alone. Each graph is replayed once unmeasured right before it is
measured: the host is then ahead of the device, and no gap falls between the events. On a CPU the calls are simply made and timed by the
host's clock; that is for tests, its figures mean nothing.
"""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Timing

WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 3, 5, 300
L2_MULTIPLE = 4  # the buffers that take turns are together this many times the size of the L2 cache
REPLAY_BYTES = 2 << 30  # one replay reads about this much, half a millisecond at 4 TB/s …
REPLAY_CALLS = 256  # … or makes this many calls, if that is less


@dataclass(frozen=True)
class Contestant:
    """What is timed: ``run`` makes ``calls`` calls."""

    run: Callable[[], object]
    calls: int = 1


class Mark:
    """A point in the work of the device: what was asked for before it, and what after."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        self._time = perf_counter()

    def since(self, earlier: Mark) -> float:
        """Seconds from ``earlier`` to here; waits until the device has got here."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def capture(
    calls: Callable[[], object],
    device: torch.device,
    *,
    warm_up: int = WARM_UP,
    stream: Any = None,
    pool: Any = None,
) -> Callable[[], object]:
    """``calls`` as one CUDA graph: what is returned replays it. Before that they are made ``warm_up`` times on the same stream.

    Graphs that share a ``pool`` also share a ``stream``, and none may read what another has left in that pool.
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
    with (
        no_garbage_collection(),
        torch.cuda.graph(graph, pool=pool, stream=stream),
    ):  # to destroy a graph while another is captured is an error
        calls()
    replay: Callable[[], object] = graph.replay
    return replay


def rotation(size: int, l2: int) -> int:
    """How many buffers of ``size`` bytes must take turns so that none is still in the L2 cache when its turn comes again."""
    return max(1, -(-L2_MULTIPLE * l2 // size))


def rotating(
    call: Callable[[Tensor], object],
    buffers: Sequence[Tensor],
    device: torch.device,
    replay_bytes: int = REPLAY_BYTES,
) -> Contestant:
    """``call`` on each of ``buffers`` in turn, the whole round as often as fills ``replay_bytes`` or makes ``REPLAY_CALLS``."""
    round_bytes = sum(x.nbytes for x in buffers)
    repeats = max(1, min(replay_bytes // round_bytes, REPLAY_CALLS // len(buffers)))

    def calls() -> None:
        for _ in range(repeats):
            for x in buffers:
                call(x)

    return Contestant(capture(calls, device), repeats * len(buffers))


def race(contestants: Mapping[str, Contestant], seconds: float, device: torch.device, *, lead_in: bool = True) -> dict[str, Timing]:
    """The time of one call of each contestant, once a round, in an order that changes, for about ``seconds`` in all.

    ``lead_in`` runs each once more, unmeasured, right before its turn. Leave it out for what is long against a launch, such as a whole
    training step.
    """
    for contestant in contestants.values():
        contestant.run()
    synchronize(device)
    order, shuffle = list(contestants), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in contestants}
    rounds, end = 0, perf_counter() + seconds
    with no_garbage_collection():
        while rounds < MIN_ROUNDS or (rounds < MAX_ROUNDS and perf_counter() < end):
            shuffle(order)
            for name in order:
                contestant = contestants[name]
                if lead_in:
                    contestant.run()
                start = Mark(device)
                contestant.run()
                times[name].append(Mark(device).since(start) / contestant.calls)
            rounds += 1
    return {name: Timing(tuple(seconds)) for name, seconds in times.items()}
