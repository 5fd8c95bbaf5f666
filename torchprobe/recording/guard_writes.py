"""Which layers write into what they are given: after their call, an input does not show any more whether the damage came in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.recording.compiled import OwnHook, never_compile_alone
from torchprobe.recording.structure import writes

Written = dict[str, int | None]
"""Inputs that a call wrote to, by name, each with the number of writes before the call; None if it is not known, and whether it wrote."""

_OURS = "torch.nn.modules."


def may_write(module: nn.Module) -> bool:
    """Whether a module may make nan in its input. Those of PyTorch write there only as activation functions, which make none.

    >>> may_write(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2)))
    False
    """
    return any(not type(inner).__module__.startswith(_OURS) for inner in module.modules())


class Entry(OwnHook):
    """Notes before each call how often the arguments were written to.

    A call is known by its keyword arguments, a dict that lives as long as the call. Those of another thread, or of a call inside of this
    one, are other ones: then nothing is known.
    """

    def __init__(self) -> None:
        self.call = 0
        self.before: dict[int, int] = {}

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        before: dict[int, int] = {}
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and (count := writes(x)) is not None:
                before[id(x)] = count
        self.call, self.before = id(kwargs), before

    def written(self, kwargs: Any, inputs: list[tuple[str, Tensor]]) -> Written:
        """The inputs that the call with these keyword arguments, which ends now, has written to."""
        call, before = self.call, self.before
        if call != id(kwargs):
            return {}
        return {name: before[id(x)] for name, x in inputs if id(x) in before and writes(x) != before[id(x)]}


never_compile_alone(Entry.__call__)
