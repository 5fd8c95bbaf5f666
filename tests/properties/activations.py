"""Activations of every kind. Hypothesis chooses what they are like; their values follow from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 97, 130)
"""Around the widths of vector registers and blocks."""
WIDE = (257, 1537, 3073)
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 200)

Values = Callable[[np.random.Generator, int, int], np.ndarray]
"""(generator, rows, columns) → float64 (rows, columns). The deviations are of the order of 1."""


def _gaussian(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return rng.standard_normal((n, m))


def _heavy(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return rng.standard_t(1.5, (n, m))


def _constant(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return np.broadcast_to(rng.standard_normal(m), (n, m)).copy()


def _nearly_constant(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return 1 + rng.integers(0, 2, (n, m)) * 2.0**-20


def _two_values(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """The smallest kurtosis there is."""
    return np.where(rng.random((n, m)) < rng.uniform(0.2, 0.8, m), -1.0, 1.0)


def _few_values(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return rng.integers(-2, 3, (n, m)).astype(float)


def _rectified(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return np.maximum(rng.standard_normal((n, m)) + rng.uniform(-2, 2, m), 0)


def _zeros(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return np.where(rng.random((n, m)) < 0.5, 0.0, -0.0)


def _spike(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """The largest kurtosis there is."""
    x = np.zeros((n, m))
    x[rng.integers(0, n, m), np.arange(m)] = 1
    return x


def _sampled(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Outliers where a kernel may take the samples that choose its shift and scale: at the parts of the whole and of a tile, along both
    axes. They cancel in an average, or they all point one way."""
    x = rng.standard_normal((n, m))
    amplitude = 10.0 ** rng.uniform(0, 5)
    for axis, size in enumerate((n, m)):
        if rng.random() < 0.4:
            continue
        period = min(size, int(rng.choice([size, 32, 64, 128, 256])))
        parts, reach = int(rng.choice([2, 4, 8, 16])), int(rng.integers(1, 4))
        places = [
            (begin + period * part // parts + k) % size for begin in range(0, size, period) for part in range(parts) for k in range(reach)
        ]
        places = np.unique(places)[rng.random(len(np.unique(places))) < rng.choice([0.5, 0.75, 1.0])]
        sign = rng.choice([-1.0, 1.0], len(places)) if rng.random() < 0.5 else np.ones(len(places))
        if axis == 0:
            x[places] += amplitude * sign[:, None]
        else:
            x[:, places] += amplitude * sign
    return x


def _ends(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Outliers in the first and last rows and columns, where loops have their remainders."""
    x = rng.standard_normal((n, m))
    amplitude = 10.0 ** rng.uniform(0, 6)
    for index in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        if rng.random() < 0.4:
            x[index] *= amplitude
    return x


def _scales(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Every feature, or every vector, of another scale."""
    scale = 10.0 ** rng.uniform(-6, 6, m if rng.random() < 0.5 else (n, 1))
    return rng.standard_normal((n, m)) * scale


def _drifting(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return np.linspace(-1, 1, n)[:, None] * 10.0 ** rng.uniform(-1, 2, m) + rng.standard_normal((n, m))


def _sorted(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    x = np.sort(rng.standard_normal((n, m)), 0)
    return x if rng.random() < 0.5 else x[::-1].copy()


VALUES: tuple[Values, ...] = (
    _gaussian, _heavy, _constant, _nearly_constant, _two_values, _few_values, _rectified, _zeros, _spike, _sampled, _sampled, _ends,
    _scales, _drifting, _sorted,
)  # fmt: skip
NONFINITE = ("none", "none", "none", "some", "a vector", "a feature", "the first", "all", "infinite")
MASKS = ("none", "none", "some", "most", "all left out", "nothing left out")
LAYOUTS = (
    "rows",
    "tokens",
    "maps",
    "channels last",
    "features first",
    "sliced",
    "every other",
    "transposed",
    "expanded",
    "offset",
    "one vector",
)


def _scaled(draw: st.DrawFn, dtype: torch.dtype) -> tuple[float, float]:
    """Offset, in units of the spread, and scale. For float64 the fourth powers must fit; the rest is the whole range of the type."""
    offset = draw(st.sampled_from((0.0, 0.0, 0.0, 1.0, -3.0, 30.0, -1e3, 1e4, 1e6)))
    if dtype in (torch.float32, torch.bfloat16):
        exponents: Sequence[int] = (0, 0, 0, -149, -140, -126, -100, -63, -20, 20, 63, 100, 120)
    elif dtype == torch.float64:
        exponents = (0, 0, 0, -200, -100, -30, 30, 100, 200)
    else:
        exponents = (0, 0, 0, -24, -20, -14, -8, 4, 10)
    return offset, 2.0 ** draw(st.sampled_from(exponents))


class Activation:
    """``x`` as a module would give it, and the mask for it."""

    def __init__(self, x: Tensor, feature_dim: int, mask: Tensor | None, said: str) -> None:
        self.x, self.feature_dim, self.mask, self.said = x, feature_dim, mask, said

    @property
    def features(self) -> int:
        return self.x.shape[self.feature_dim]

    def rows(self) -> Tensor:
        """The vectors that the mask keeps: (vectors, features)."""
        rows = self.x.movedim(self.feature_dim, -1).reshape(-1, self.features)
        return rows if self.mask is None else rows[self.mask.reshape(-1)]

    def __repr__(self) -> str:
        return f"<{self.said}: {self.x.dtype} {tuple(self.x.shape)}, strides {self.x.stride()}, feature_dim={self.feature_dim}>"


@st.composite
def activations(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    masks: Sequence[str] = MASKS,
    nonfinite: Sequence[str] = NONFINITE,
    most: int = 6000,
) -> Activation:
    """Activations of at most about ``most`` elements."""
    dtype = draw(st.sampled_from(dtypes))
    features = draw(st.sampled_from(WIDE if draw(st.integers(0, 19)) == 0 else WIDTHS))
    count = min(draw(st.sampled_from(COUNTS)), max(most // features, 1))
    values = draw(st.sampled_from(VALUES))
    offset, scale = _scaled(draw, dtype)
    bad, layout, masked = draw(st.sampled_from(nonfinite)), draw(st.sampled_from(layouts)), draw(st.sampled_from(masks))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    shape = (1,) if layout == "one vector" else _positions(layout, count, rng)
    rows = int(np.prod(shape))
    with np.errstate(over="ignore", under="ignore"):
        x = (values(rng, rows, features) + offset) * scale
    _spoil(x, bad, rng)
    tensor, feature_dim = _laid_out(torch.from_numpy(x).to(dtype), shape, layout, rng)
    positions = list(tensor.shape)
    del positions[feature_dim]
    said = f"{values.__name__[1:]}, offset {offset}, scale {scale:.3g}, {bad} nonfinite, {layout}, mask {masked}, seed {seed}"
    return Activation(tensor, feature_dim, _mask(masked, positions, rng), said)


def _positions(layout: str, count: int, rng: np.random.Generator) -> tuple[int, ...]:
    if layout == "tokens":
        images = int(rng.integers(1, min(count, 4) + 1))
        return images, max(count // images, 1)
    if layout in ("maps", "channels last", "sliced"):
        images, height = int(rng.integers(1, min(count, 3) + 1)), int(rng.integers(1, 8))
        return images, height, max(count // images // height, 1)
    return (count,)


def _spoil(x: np.ndarray, bad: str, rng: np.random.Generator) -> None:
    n, m = x.shape
    values = [np.nan, np.inf, -np.inf]
    if bad == "some":
        x[rng.random((n, m)) < rng.choice([0.01, 0.1, 0.5])] = rng.choice(values)
    elif bad == "a vector":
        x[rng.integers(n)] = rng.choice(values)
    elif bad == "a feature":
        x[:, rng.integers(m)] = rng.choice(values)
    elif bad == "the first":
        x[0, 0] = rng.choice(values)
    elif bad == "all":
        x[:] = rng.choice(values)
    elif bad == "infinite":
        x[rng.random((n, m)) < 0.2] = np.inf
        x[rng.random((n, m)) < 0.2] = -np.inf


def _laid_out(rows: Tensor, shape: tuple[int, ...], layout: str, rng: np.random.Generator) -> tuple[Tensor, int]:
    """The rows in a tensor of this layout, and the dimension of its features. Other memory beside it holds nan and large values."""
    x = rows.reshape(*shape, rows.shape[1])
    features, dims = x.shape[-1], x.dim()
    if layout in ("maps", "sliced"):
        x = x.movedim(-1, 1).contiguous()
        if layout == "sliced":
            whole = _foreign([x.shape[0], features + 2, x.shape[2] + 1, x.shape[3] + 3], rows.dtype)
            part = whole[:, 1:-1, 1:, 2:-1]
            x = part.copy_(x)
        return x, 1
    if layout == "channels last":
        return x.movedim(-1, 1), 1
    if layout == "features first":
        return x.movedim(-1, 0).contiguous(), -dims
    if layout == "every other":
        step, first = int(rng.integers(2, 4)), int(rng.integers(0, 2))
        return _foreign([*shape, step * features + first], rows.dtype)[..., first::step][..., :features].copy_(x), -1
    if layout == "transposed":
        return x.movedim(-1, 0).contiguous().movedim(0, -1), dims - 1
    if layout == "expanded":  # one vector, seen several times
        return x[:1].expand(int(rng.integers(1, 40)), *x.shape[1:]), -1
    if layout == "offset":  # not aligned to anything
        first = int(rng.integers(1, 9))
        memory = _foreign([x.numel() + first + 7], rows.dtype)
        return memory[first : first + x.numel()].view(x.shape).copy_(x), -1
    if layout == "one vector":
        return x.reshape(features), -1
    return x.contiguous(), -1


def _foreign(shape: list[int], dtype: torch.dtype) -> Tensor:
    memory = torch.full(shape, torch.nan, dtype=dtype)
    memory.view(-1)[::2] = torch.finfo(dtype).max
    return memory


def _mask(kind: str, positions: list[int], rng: np.random.Generator) -> Tensor | None:
    if kind == "none":
        return None
    share = {"some": 0.5, "most": 0.1, "all left out": 0.0, "nothing left out": 1.0}[kind]
    return torch.from_numpy(np.asarray(rng.random(positions) < share))
