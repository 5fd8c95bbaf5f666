"""The buffers of a model, put back after it ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Buffers are afterwards what they were, such as the running means of batch norms in train mode."""
    before = [(module, name, buffer, buffer.clone()) for module in model.modules() for name, buffer in module._buffers.items()
              if buffer is not None]  # fmt: skip
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in before:
                if not _alike(buffer, values):
                    try:
                        buffer.copy_(values)
                    except RuntimeError:  # it cannot be written to, as a tensor of inference mode
                        buffer = values
                module._buffers[name] = buffer


Buffers = list[tuple[nn.Module, str, Tensor]]


def buffers_of(model: nn.Module, within: frozenset[int]) -> Buffers:
    """Copies of the buffers of those modules inside of a model whose ``id`` is in ``within``."""
    return [(module, name, buffer.clone()) for module in model.modules() if id(module) in within
            for name, buffer in module._buffers.items() if buffer is not None]  # fmt: skip


@contextlib.contextmanager
def as_before(buffers: Buffers) -> Iterator[None]:
    """Within the block the buffers are these; afterwards they are the same objects with the same values as now."""
    now = [(module, name, module._buffers.get(name)) for module, name, _ in buffers]
    for module, name, values in buffers:
        module._buffers[name] = values.clone()
    try:
        yield
    finally:
        for module, name, buffer in now:
            module._buffers[name] = buffer


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether the values are the same, bit by bit; False if that cannot be said."""
    if a.is_meta:
        return True
    if a.is_nested or a.layout is not torch.strided:
        return False
    if a.is_quantized or type(a) not in (Tensor, nn.Parameter):
        return torch.equal(a, b)
    bits = [(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x.resolve_neg()).contiguous().reshape(-1) for x in (a, b)]
    return torch.equal(*(x.view(torch.uint8) for x in bits))
