"""What the layers of one model are given and give in one pass, copied."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchprobe.recording.compiled import drop_graphs
from torchprobe.recording.hook import takes_hooks
from torchprobe.recording.nonfinite import tensors_in
from torchprobe.recording.structure import first_tensor, named_tensors
from torchprobe.recording.tensor_difference import incomparable

Key = tuple[str, int]
"""The name of a layer, and which of its calls it is, from 0."""


@dataclass
class Call:
    """One call of a layer: its place among all calls that end, the class of the module, the first tensor that it was given, and the tensors
    that it gave, by their place in the output."""

    order: int
    module: str
    given: Tensor | None
    tensors: list[tuple[str, Tensor]]


class Taps:
    """Hooks on some modules.

    Args:
        modules: name → module.
        found: called with each call that ends, in this order.
        start: the calls that end before this number are left out.
        memory: bytes of copies, from which on further calls are left out; one is always copied.
        host: whether copies go to the host.
        orders: the numbers of the calls, as an earlier pass over the same batch found them.

    Attributes:
        calls: how many calls ended.
        orders: the number of each call.
        next_start: the number of the first call that was left out for want of memory, or ``calls``.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        found: Callable[[Key, Call], object],
        start: int,
        memory: int,
        host: bool,
        orders: Mapping[Key, int] | None = None,
    ) -> None:
        self.modules, self.found, self.start, self.memory, self.host = modules, found, start, memory, host
        self.calls, self.bytes, self.full = 0, 0, False
        self._next: int | None = None
        self.orders: dict[Key, int] = {}
        self._earlier = orders or {}
        self._counts: Counter[str] = Counter()
        self._entered: Counter[str] = Counter()
        self._given: dict[str, list[Tensor | None]] = {}

    @property
    def next_start(self) -> int:
        return self.calls if self._next is None else self._next

    @contextlib.contextmanager
    def placed(self, compiled: bool) -> Iterator[None]:
        """During the block, the hooks are there. Those of a compiled model are part of its graphs, and what they copy is looked at in the
        end; graphs that were compiled without them, or with them, are dropped."""
        sink: list[tuple[str, bool, list[tuple[str, Tensor]]]] = []
        classes = {type(module) for module in self.modules.values()}
        with ExitStack() as stack:
            if compiled:
                drop_graphs(classes)
                stack.callback(drop_graphs, classes)
            for name, module in self.modules.items():
                if takes_hooks(module):
                    before, after = _traceable(name, sink) if compiled else (self._before(name), self._after(name))
                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            yield
        for name, ends, tensors in sink:
            if ends:
                self._ended(name, tensors)
            else:
                self._given.setdefault(name, []).append(tensors[0][1] if tensors else None)

    def _before(self, name: str) -> Callable[..., None]:
        def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
            key = name, self._entered[name]
            self._entered[name] += 1
            wanted = not self.full and self._earlier.get(key, self.start) >= self.start
            x = first_tensor((args, kwargs)) if wanted else None
            self._given.setdefault(name, []).append(None if x is None else self._copied(x))

        return entered

    def _after(self, name: str) -> Callable[..., None]:
        def ended(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._ended(name, compared_tensors(output))

        return ended

    def _ended(self, name: str, tensors: list[tuple[str, Tensor]]) -> None:
        order, key = self.calls, (name, self._counts[name])
        self.orders[key] = order
        self.calls += 1
        self._counts[name] += 1
        given = self._given[name].pop() if self._given.get(name) else None
        if order < self.start or not tensors:
            return
        if self.full:
            self._next = order if self._next is None else self._next
            return
        copies = [(place, self._copied(x)) for place, x in tensors]
        self.full = self.bytes >= self.memory
        self.found(key, Call(order, type(self.modules[name]).__name__, given, copies))

    def _copied(self, x: Tensor) -> Tensor:
        if incomparable(x) is not None:
            return x  # its values are not read
        self.bytes += x.numel() * x.element_size()
        return x.detach().to("cpu", copy=True) if self.host else x.detach().clone()


def compared_tensors(value: Any) -> list[tuple[str, Tensor]]:
    """The tensors in an output, each with its place: those that a recording reads first, and all others, such as a state in a tuple of its
    own, a loss, or the token that was chosen.

    >>> import torch
    >>> y, h, c = torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(1, 3)
    >>> [place for place, _ in compared_tensors((y, (h, c)))], [place for place, _ in compared_tensors({"ids": y.argmax(1), "logits": y})]
    (['0', '1.0', '1.1'], ['logits', 'ids'])
    """
    first = named_tensors(value)
    others = [(place, x) for place, x in tensors_in(value) if all(y is not x for _, y in first)]
    return [*first, *others]


def _traceable(name: str, sink: list[tuple[str, bool, list[tuple[str, Tensor]]]]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks that the compiler can trace: they copy, and nothing else."""

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_tensor((args, kwargs))
        sink.append((name, False, [] if x is None else [("", x.detach().clone())]))

    def ended(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        sink.append((name, True, [(place, x.detach().clone()) for place, x in compared_tensors(output)]))

    return entered, ended
