"""The class that a head decides for: the argmax of the exact logits, independent of the order of the sums.

The last digits of float32 logits depend on the batch size, the number of threads and the processor. If two logits are close, the argmax
would depend on these too. Here float32 decides only if the two largest logits are further apart than rounding can move them. The other
decisions are made in float64, and those that are still open, such as true ties, exactly. The lowest row wins a tie.

The bound is the standard one of a dot product of d terms in any order: |fl(w·h) − w·h| ≤ γ_d |w|·|h| with γ_d = d·u / (1 − d·u), and
|w|·|h| ≤ ‖w‖‖h‖. See Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchprobe.common.precision import full_products

_BLOCK = 1 << 22  # logits at a time; 16 MB in float32
_EPS = 1e-12  # the smallest number that torch.nn.functional.normalize divides by
_HUGE = {torch.float32: 1e37, torch.float64: 1e290}  # larger sums may overflow while they are computed


def predict(
    weight: Tensor, bias: Tensor | None, h: Tensor, classes: Iterable[int] | None = None, normalize: bool = False, top: int = 1
) -> Tensor:
    """The class of the largest logit of each representation, decided as if there were no rounding.

    Works block by block, so a memory-mapped ``h`` is never copied whole.

    Args:
        weight: floating point (C, d), finite.
        bias: (C,), or None.
        h: floating point (n, d).
        classes: the rows of the head to choose from; None: all.
        normalize: whether the logits are those of h / ‖h‖.
        top: 1, or k for the k largest logits, in descending order.

    Returns:
        int64 (n,), or (n, k) for ``top`` = k > 1: rows of the head, also if ``classes`` is given. −1 if a representation has nan or inf
        (or, for a float64 head and representation, if logits exceed 1e290).

    Raises:
        ValueError: shapes that do not match, ``classes`` that are not distinct rows of the head, or ``top`` above their number.

    >>> predict(torch.eye(3), None, torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]]))
    tensor([1, 0])
    >>> predict(torch.eye(3), None, torch.tensor([[0.0, 2.0, 1.0]]), classes=[0, 2])
    tensor([2])
    """
    if weight.dim() != 2 or h.dim() != 2 or weight.shape[1] != h.shape[1]:
        raise ValueError(f"expected a weight (classes, d) and representations (n, d), got {tuple(weight.shape)} and {tuple(h.shape)}")
    rows = rows_of(classes, len(weight))
    columns = len(weight) if rows is None else len(rows)
    if not 1 <= top <= columns:
        raise ValueError(f"top must be between 1 and the number of classes, {columns}, got {top}")
    place = h.device if h.device.type in ("cpu", "cuda") else torch.device("cpu")  # other devices may lack float64
    if rows is not None:
        index = torch.tensor(rows, device=weight.device)
        weight, bias = weight[index], None if bias is None else bias[index]
    logits = _Logits(weight.to(place), None if bias is None else bias.to(place), normalize)
    found = torch.full((len(h), top), -1, dtype=torch.int64, device=place)
    step = max(1, _BLOCK // columns)
    with torch.inference_mode(), torch.autocast(place.type, enabled=False):
        for start in range(0, len(h), step):
            block = h[start : start + step].to(place)
            finite = block.isfinite().all(-1).nonzero().flatten()
            found[start + finite] = logits.best(block if len(finite) == len(block) else block[finite], top)
    if rows is not None:
        found = torch.tensor([*rows, -1], device=place)[found]
    return found[:, 0] if top == 1 else found


def settle(logits: Tensor, bound: Tensor | float, exact: Callable[[Tensor], Tensor]) -> Tensor:
    """The argmax of each row of rounded logits if rounding cannot have changed it; ``exact`` decides the other rows.

    Args:
        logits: floating point (n, C).
        bound: the largest error of the difference of two logits of a row, (n,) or one for all rows; inf leaves the row to ``exact``.
        exact: called with the rows, int64 (m,), whose two largest logits are not further apart than ``bound``, or whose largest logit is
            not finite. It returns the columns, int64 (m,). It is not called if there are no such rows.

    Returns:
        int64 (n,): columns.

    >>> settle(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), 0.1, lambda rows: torch.zeros_like(rows))
    tensor([1, 0])
    """
    return _settle(logits, bound, 1, lambda rows: exact(rows)[:, None])[:, 0]


def rows_of(classes: Iterable[int] | None, size: int) -> list[int] | None:
    """``classes`` sorted, after a check that they are distinct rows of a head with ``size`` rows; None for None.

    Raises:
        ValueError: they are not distinct rows of the head, or empty.
    """
    if classes is None:
        return None
    rows = sorted(int(c) for c in classes)
    if not rows or len(set(rows)) < len(rows):
        raise ValueError(f"classes must be distinct rows of the head, at least one; got {len(rows)} of which {len(set(rows))} are distinct")
    if rows[0] < 0 or rows[-1] >= size:
        raise ValueError(f"class {rows[0] if rows[0] < 0 else rows[-1]} is not a row of the head, which has {size} rows (0 to {size - 1})")
    return rows


def _settle(logits: Tensor, bound: Tensor | float, k: int, exact: Callable[[Tensor], Tensor]) -> Tensor:
    """As :func:`settle`, for the ``k`` largest logits in descending order: int64 (n, k)."""
    values, columns = logits.topk(min(k + 1, logits.shape[1]), dim=-1)
    limit = torch.as_tensor(bound, device=logits.device).reshape(-1, 1)
    certain = values[:, 0].isfinite() & (values[:, :-1] - values[:, 1:] > limit).all(-1)
    columns = columns[:, :k]
    if len(rows := (~certain).nonzero().flatten()):
        columns[rows] = exact(rows)
    return columns


class _Logits:
    """The logits weight · h + bias · s with s = 1, or s = ‖h‖ to normalize: the same decisions without a division."""

    def __init__(self, weight: Tensor, bias: Tensor | None, normalize: bool) -> None:
        self.weight, self.bias = weight.double(), None if bias is None else bias.double()
        self.normalize = normalize and bias is not None
        self.longest = float(torch.linalg.vector_norm(self.weight, dim=-1).max())
        self.farthest = 0.0 if self.bias is None else float(self.bias.abs().max())
        single = full_products("cuda" if weight.is_cuda else "cpu")
        self.single = (weight.float(), None if bias is None else bias.float()) if single else None

    def best(self, h: Tensor, k: int) -> Tensor:
        """The columns of the ``k`` largest logits, int64 (n, k); ``h`` (n, d) is finite."""
        if self.single is None:
            return self._double(h.double(), k)
        length = torch.linalg.vector_norm(h, dim=-1, dtype=torch.float64)
        scale = length.clamp_min(_EPS) if self.normalize else torch.ones_like(length)
        logits = h.float() @ self.single[0].T
        if self.single[1] is not None:
            logits += self.single[1] * scale.float()[:, None]
        return _settle(logits, self._bound(length, scale, torch.float32), k, lambda rows: self._double(h[rows].double(), k))

    def _double(self, h: Tensor, k: int) -> Tensor:
        length = torch.linalg.vector_norm(h, dim=-1)
        scale = length.clamp_min(_EPS) if self.normalize else torch.ones_like(length)
        logits = h @ self.weight.T
        if self.bias is not None:
            logits += self.bias * scale[:, None]
        bound = self._bound(length, scale, torch.float64)

        def exact(rows: Tensor) -> Tensor:
            near = logits[rows] >= (logits[rows].topk(k, dim=-1).values[:, -1] - bound[rows])[:, None]
            bounded = bound[rows].isfinite().tolist()
            found = [
                self._exact(x, candidates.nonzero()[0], k) if decidable else [-1] * k
                for x, candidates, decidable in zip(h[rows].cpu().numpy(), near.cpu().numpy(), bounded, strict=True)
            ]
            return torch.tensor(found, device=h.device)

        return _settle(logits, bound, k, exact)

    def _bound(self, length: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The largest error of the difference of two logits, (n,) float64, from rounding and underflow."""
        kind, d = torch.finfo(dtype), self.weight.shape[1]
        terms = d + 6 + (d if self.normalize else 0)  # d products and sums, the bias, rounded operands; s is a sum too
        size = self.longest * length + self.farthest * scale
        error = 1.01 * terms * (kind.eps / 2) * size + 2 * (d + 2) * kind.tiny
        return (2 * error).where(size < _HUGE[dtype], math.inf)

    @functools.cached_property
    def _first_like(self) -> NDArray[np.int64]:
        """For each class the first class with the same weight and bias."""
        whole = self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], dim=1)
        _, first, group = np.unique((whole + 0.0).cpu().numpy(), axis=0, return_index=True, return_inverse=True)  # −0 is 0
        return first[group.reshape(-1)]

    @functools.cached_property
    def _of_zero(self) -> list[int]:
        """The order of all classes for h = 0: that of the biases."""
        bias = torch.zeros(len(self.weight)) if self.bias is None else self.bias.cpu()
        return bias.argsort(descending=True, stable=True).tolist()

    def _exact(self, x: NDArray[np.float64], candidates: NDArray[np.int64], k: int) -> list[int]:
        """The ``k`` largest of the candidates. Sums are rounded once (math.fsum), so the sign of a difference is its true sign."""
        if not x.any():
            return self._of_zero[:k]
        first = self._first_like[candidates]
        if (first == first[0]).all():
            return [int(c) for c in candidates[:k]]
        scale = max(math.sqrt(math.fsum(x * x)), _EPS) if self.normalize else 1.0
        terms = {c: self._terms(c, x, scale) for c in set(first.tolist())}
        like = dict(zip(candidates.tolist(), first.tolist(), strict=True))
        sums = {c: math.fsum(term) for c, term in terms.items()}

        def compare(a: int, b: int) -> float:
            first_a, first_b = like[a], like[b]
            if first_a == first_b:
                return a - b
            if sums[first_a] != sums[first_b]:
                return sums[first_b] - sums[first_a]
            return math.fsum(np.concatenate([terms[first_b], -terms[first_a]])) or a - b

        return sorted(like, key=functools.cmp_to_key(compare))[:k]  # type: ignore[arg-type]

    def _terms(self, c: int, x: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
        """Numbers whose exact sum is the logit of class ``c``."""
        weight: NDArray[np.float64] = self.weight[c].cpu().numpy()
        parts = [*_product(weight, x)]
        if self.bias is not None:
            parts += _product(self.bias[c : c + 1].cpu().numpy(), np.array([scale]))
        return np.concatenate(parts)


def _product(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """a · b as the rounded product and its rounding error (Dekker 1971, with Veltkamp's splitting)."""
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    product = a * b
    return product, a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def _halves(a: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    large = a * 134217729.0  # 2²⁷ + 1
    upper = large - (large - a)
    return upper, a - upper
