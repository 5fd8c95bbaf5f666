"""The error that each layer adds by itself: layers of one model run on what those of another were given.

While ``a`` runs, each layer of ``b`` runs on the input of its partner, and the layers inside it give what their partners inside of ``a``
gave. What then differs was made by this layer alone: by its weights, or by the code of a block around its inner layers. It is seen in what
the layer gives, and in what it hands to the layers inside it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.common.messages import reason
from torchprobe.recording.hook import takes_hooks
from torchprobe.recording.layers import Layer
from torchprobe.recording.pair_state import Buffers, as_before, buffers_of
from torchprobe.recording.pair_taps import compared_tensors
from torchprobe.recording.structure import mapped
from torchprobe.recording.tensor_difference import Difference, difference

Types = list[tuple[torch.dtype, torch.device]]
Key = tuple[str, int]


@dataclass
class _Frame:
    """A layer of ``a`` that is running: its call, its arguments and the buffers that its partner shares, copied before it could change
    them, and what the layers inside it gave."""

    key: Key
    given: Any
    random: list[Tensor]
    problem: str = ""
    buffers: Buffers = field(default_factory=list)
    inner: dict[str, list[_Inner]] = field(default_factory=dict)  # by the name in b


@dataclass
class _Inner:
    """A call of a layer inside one that is running: its number, what it was given, and what it gave."""

    number: int
    given: Any
    gave: Any


class Swap:
    """See the module.

    Args:
        pairs: layers of ``a``, each with its partner.

    Attributes:
        own: name in ``a`` and number of the call → place in the output → the error.
        within: the same call → name in ``b`` of the inner layer that is handed the largest error, and that error.
        problems: name in ``a`` → why the partner could not run alone.
    """

    def __init__(self, pairs: Sequence[tuple[Layer, Layer]]) -> None:
        self.pairs = [(a, b) for a, b in pairs if takes_hooks(a.module) and takes_hooks(b.module)]
        self.own: dict[Key, dict[str, Difference]] = {}
        self.within: dict[Key, tuple[str, Difference]] = {}
        self.problems: dict[str, str] = {}
        self._given: dict[Key, Types] = {}  # what layers of b are given and give: name in b and number of the call
        self._gave: dict[Key, Types] = {}
        self._counts: Counter[str] = Counter()
        self._stack: list[_Frame] = []
        self._busy = False
        inside = [{id(module) for layer in side for module in layer.module.modules()} for side in zip(*self.pairs, strict=True)] or [set()]
        self._shared = frozenset(set.intersection(*inside))

    def error(self, key: Key, place: str) -> tuple[Difference | None, str, str]:
        """Of one call in ``a`` and one tensor of its output: its own error, the inner layer that is handed it ("" if it is in the output),
        and why it is not known."""
        own, (inner, handed) = self.own.get(key, {}).get(place), self.within.get(key, ("", None))
        if own is not None and handed is not None and handed.size > own.size:
            return handed, inner, ""
        return own, "", "" if own is not None else self.problems.get(key[0], "")

    def told(self) -> str:
        """The first problem, in words."""
        name, problem = next(iter(self.problems.items()))
        return f"{name or '(output)'} ({problem})"

    @contextlib.contextmanager
    def noting_types(self) -> Iterator[None]:
        """During the block ``b`` runs, and the dtypes and devices of what its layers are given and give are noted."""
        open_calls: dict[str, list[int]] = {}
        counts: Counter[str] = Counter()

        def before(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, kwargs: Any) -> None:
                open_calls.setdefault(name, []).append(counts[name])
                self._given[name, counts[name]] = _types((args, kwargs))
                counts[name] += 1

            return note

        def after(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                self._gave[name, open_calls[name].pop()] = _types(output)

            return note

        with _hooks([(b.module, before(b.name), after(b.name)) for _, b in self.pairs]):
            yield

    @contextlib.contextmanager
    def testing(self) -> Iterator[None]:
        """During the block ``a`` runs, and each layer of ``b`` on what its partner was given."""
        with _hooks([(a.module, self._before(a, b), self._after(a, b)) for a, b in self.pairs]):
            yield
        self._stack.clear()

    def _before(self, a: Layer, b: Layer) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._busy:  # the models share modules
                return
            problem, given = "", None
            try:
                given = mapped((args, kwargs), _clone, copy.deepcopy)
            except Exception as error:  # what an argument does when it is copied is unknown
                problem = f"an argument cannot be copied: {reason(error)}"
            buffers = buffers_of(b.module, self._shared)
            self._stack.append(_Frame((a.name, self._counts[a.name]), given, _random_state(), problem, buffers))
            self._counts[a.name] += 1

        return enter

    def _after(self, a: Layer, b: Layer) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._busy:
                return
            while self._stack and self._stack[-1].key[0] != a.name:  # a call inside ended with an error that the model caught
                self._stack.pop()
            if not self._stack:
                return
            frame = self._stack.pop()
            if self._stack:
                try:
                    inner = _Inner(frame.key[1], frame.given, mapped(output, _clone, lambda other: other))
                    self._stack[-1].inner.setdefault(b.name, []).append(inner)
                except Exception as error:
                    self._stack[-1].problem = f"what {b.name!r} gives cannot be copied: {reason(error)}"
            self._busy = True
            try:
                self._test(frame, b, output)
            finally:
                self._busy = False

        return leave

    def _test(self, frame: _Frame, b: Layer, output: Any) -> None:
        name, number = frame.key
        types = self._given.get((b.name, number))
        if frame.problem or types is None:
            self.problems.setdefault(name, frame.problem or "it did not run in b as often")
            return
        expected = dict(compared_tensors(output))
        try:
            with ExitStack() as stack:
                by_name = {layer.name: layer.module for _, layer in self.pairs}
                handed: list[tuple[str, Difference]] = []
                for inner, calls in frame.inner.items():
                    gave = [self._fitted(one.gave, self._gave.get((inner, one.number))) for one in calls]
                    see = functools.partial(_compare_given, inner, [one.given for one in calls], handed)
                    stack.enter_context(_giving(by_name[inner], gave, see))
                stack.enter_context(_from_state(frame.random))
                stack.enter_context(as_before(frame.buffers))
                args, kwargs = self._fitted(frame.given, types)
                found = dict(compared_tensors(b.module(*args, **kwargs)))
        except Exception as error:  # a layer that cannot be fed alone, for any reason
            self.problems.setdefault(name, reason(error))
            return
        if handed:
            self.within[frame.key] = max(handed, key=lambda one: one[1].size)
        self.own[frame.key] = {
            place: difference(x, found[place]) if place in found else Difference(problem="b gives no such tensor")
            for place, x in expected.items()
        }

    @staticmethod
    def _fitted(value: Any, types: Types | None) -> Any:
        """Tensors with the dtypes and on the devices that ``b`` has there."""
        if types is None or len(types) != len(_types(value)):
            return mapped(value, _clone, lambda other: other)
        wanted = iter(types)

        def fit(x: Tensor) -> Tensor:
            dtype, device = next(wanted)
            return x.to(device, dtype if x.is_floating_point() and dtype.is_floating_point else None, copy=True)

        return mapped(value, fit, lambda other: other)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    mapped(value, note, lambda other: other)
    return found


def _types(value: Any) -> Types:
    return [(x.dtype, x.device) for x in _tensors(value)]


def _clone(x: Tensor) -> Tensor:
    return x.detach().clone()


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [])]


@contextlib.contextmanager
def _from_state(state: list[Tensor]) -> Iterator[None]:
    """During the block, random numbers continue from a state; afterwards from where they were."""
    with torch.random.fork_rng(range(len(state) - 1)):
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state_all(state[1:])
        yield


def _compare_given(name: str, given: list[Any], handed: list[tuple[str, Difference]], args: Any) -> None:
    """Compares what a block of ``b`` hands to a layer inside it with what that of ``a`` did, for the next call of this layer."""
    expected, found = _tensors(given.pop(0)), _tensors(args)
    if len(expected) == len(found):
        handed += [(name, difference(x, y)) for x, y in zip(expected, found, strict=True)]


@contextlib.contextmanager
def _giving(module: nn.Module, outputs: Sequence[Any], see: Callable[[Any], None]) -> Iterator[None]:
    """During the block, the first calls of a module give these outputs, and its own code does not run; ``see`` gets their arguments."""
    waiting, forward = list(outputs), module.forward
    before = module.__dict__.get("forward")

    def give(*args: Any, **kwargs: Any) -> Any:
        if not waiting:
            return forward(*args, **kwargs)
        see((args, kwargs))
        return waiting.pop(0)

    module.forward = give
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


@contextlib.contextmanager
def _hooks(places: Sequence[tuple[nn.Module, Callable[..., None], Callable[..., None]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, before, after in places:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield
