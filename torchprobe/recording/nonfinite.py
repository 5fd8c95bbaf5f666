"""Which values of a tensor are nonfinite, and where they are.

:func:`suspicious` is what every call costs: one sum. Everything else runs only when something was found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.recording.tensors import unreadable

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)

KINDS = ("nan", "inf", "-inf")
"""What can be allowed."""

ROWS = 8
"""How many row indices are kept, the first ones."""


@dataclass(frozen=True)
class TensorFacts:
    """What is nonfinite in one tensor.

    Attributes:
        name: of the argument, the parameter, or the place in the output.
        shape, dtype: of the tensor, on this rank.
        nan, inf, minus_inf: how many values are nan, +inf and −inf.
        low, high: the smallest and the largest finite value; nan if there is none.
        rows: the indices along dimension 0 of the first rows that hold such a value, at most 8.
        bad_rows: how many rows hold one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nan: int
    inf: int
    minus_inf: int
    low: float
    high: float
    rows: tuple[int, ...] = ()
    bad_rows: int = 0

    @property
    def nonfinite(self) -> int:
        """How many values are nan or infinite."""
        return self.nan + self.inf + self.minus_inf

    @property
    def values(self) -> int:
        """How many values there are."""
        return math.prod(self.shape)

    def bad(self, allowed: frozenset[str] = frozenset()) -> bool:
        """Whether there is a nonfinite value of a kind that is not allowed."""
        counts = dict(zip(KINDS, (self.nan, self.inf, self.minus_inf), strict=True))
        return any(count for kind, count in counts.items() if kind not in allowed)

    def __str__(self) -> str:
        what = f"{self.name} {self.shape} {self.dtype}".strip()
        if not self.nonfinite:
            return f"{what}: finite, from {self.low:.4g} to {self.high:.4g}" if self.values else f"{what}: empty"
        found = ", ".join(f"{count:,} {kind}" for kind, count in (("nan", self.nan), ("inf", self.inf), ("−inf", self.minus_inf)) if count)
        where = ""
        if len(self.shape) > 1:
            more = ", …" if self.bad_rows > len(self.rows) else ""
            where = f", in {self.bad_rows:,} of {self.shape[0]:,} rows: {', '.join(map(str, self.rows))}{more}"
        return f"{what}: {self.nonfinite:,} of {self.values:,} values nonfinite ({found}){where}"


def readable(x: Any) -> Tensor | None:
    """The numbers of a tensor on this rank, as an ordinary tensor without autograd; None if there are none to read.

    >>> readable(torch.zeros(2, requires_grad=True)).requires_grad, readable(torch.zeros(2, dtype=torch.int64))
    (False, None)
    """
    if hasattr(x, "to_local"):
        x = x.to_local()
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()) or x.is_meta or type(x).__name__ == "FakeTensor":
        return None
    if x.is_nested:
        x = x.values() if x.layout == torch.jagged else torch.cat([part.reshape(-1) for part in x.unbind()] or [x.new_zeros(0)])
    if x.layout in _SPARSE:
        x = x.detach().coalesce().values() if x.layout == torch.sparse_coo else x.values()
    if "float8" in str(x.dtype):
        x = x.detach().float()
    if unreadable(x) is not None:
        return None
    x = x.detach()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def hidden(x: Tensor) -> str | None:
    """Why a nonfinite value in a tensor would not be seen; None if :func:`readable` can read it, or if it holds none.

    >>> hidden(torch.zeros(2)), hidden(torch.zeros(2, dtype=torch.bool))
    (None, None)
    """
    if not (x.is_floating_point() or x.is_complex()) or x.is_meta or type(x).__name__ == "FakeTensor" or readable(x) is not None:
        return None
    return unreadable(x) or "its values cannot be read"


def on_host(x: Tensor) -> bool:
    """Whether the host can read it without waiting."""
    return x.device.type == "cpu"


def suspicious(x: Tensor) -> bool:
    """Whether a tensor on the CPU may hold a nonfinite value. False is certain: a nonfinite value makes the sum nonfinite.

    True may also be a sum that overflows, so :func:`facts` has the last word.

    >>> suspicious(torch.tensor([1.0, -math.inf])), suspicious(torch.ones(3))
    (True, False)
    """
    total = torch.sum(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return not math.isfinite(total.numpy())


@torch.no_grad()
def facts(name: str, x: Tensor) -> TensorFacts:
    """Counts, range and rows of one readable tensor. It waits for the device.

    >>> print(facts("x", torch.tensor([[0.0, 1.0], [math.nan, 2.0]])))
    x (2, 2) float32: 1 of 4 values nonfinite (1 nan), in 1 of 2 rows: 1
    """
    dtype = str(x.dtype).removeprefix("torch.")
    if not x.numel():
        return TensorFacts(name, tuple(x.shape), dtype, 0, 0, 0, math.nan, math.nan)
    finite = x.isfinite()
    low = float(x.where(finite, math.inf).amin())
    high = float(x.where(finite, -math.inf).amax())
    none = low > high
    bad = (~finite).flatten(1).any(1) if x.dim() > 1 else ~finite.flatten()
    rows = bad.nonzero().flatten()
    return TensorFacts(
        name,
        tuple(x.shape),
        dtype,
        int(x.isnan().sum()),
        int((x == math.inf).sum()),
        int((x == -math.inf).sum()),
        math.nan if none else low,
        math.nan if none else high,
        tuple(rows[:ROWS].tolist()),
        len(rows),
    )


def tensors_in(value: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """Every tensor in tuples, lists, mappings and dataclasses, each with its path, as a compiled graph can find them, too.

    >>> [name for name, _ in tensors_in({"a": torch.zeros(1), "b": (None, torch.zeros(2))})]
    ['a', 'b.1']
    """
    if isinstance(value, Tensor):
        return [(name, value)]
    if value is None or isinstance(value, (int, float, str)):
        return []
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    else:
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return []
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    found: list[tuple[str, Tensor]] = []
    for key, item in items:
        found += tensors_in(item, f"{name}.{key}" if name else str(key))
    return found


def weights_of(module: nn.Module) -> list[TensorFacts]:
    """The facts of every parameter and buffer inside of a module that can be read on this rank, with their names in it."""
    found = list[TensorFacts]()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        with contextlib.suppress(Exception):  # parameters of other packages may refuse anything
            x = readable(tensor)
            if x is not None and x.untyped_storage().nbytes() >= x.numel() * x.element_size():  # FSDP frees what it has gathered
                found.append(facts(name, x))
    return found
