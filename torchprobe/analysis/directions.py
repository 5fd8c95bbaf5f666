"""The directions along which a head reads a representation, and how important each of them is.

W = Σ_i σ_i u_i v_iᵀ is the head; its right singular vectors v_i are the directions. The importance of a direction for some images is
σ_i · mean_n |cos(v_i, h_n)|: how strongly the head reads it, times how far the representations point along it ("Interpreting CLIP",
TMLR 2024).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchprobe.analysis.inputs import HeadLike, Vectors, as_head, blocks, representations, weight_and_bias
from torchprobe.analysis.outliers import OutlierFeatures
from torchprobe.common.deprecation import renamed
from torchprobe.encoders import Head

if TYPE_CHECKING:
    from torchprobe.analysis.embeddings import Embeddings

__getattr__ = renamed(__name__, {"centred": "centered"})

ORDERS = ("importance", "sigma", "random")


@dataclass(frozen=True)
class Directions:
    """The singular value decomposition of a head (C, d), largest singular value first; r = min(C, d).

    Everything is float64 on the CPU. The sign of a direction has no meaning. It is chosen so that the largest entry in absolute value is
    positive (the first of equal ones); ``left`` has the matching sign.

    Attributes:
        singular_values: σ, (r,), in descending order.
        directions: v, orthonormal rows, (r, d).
        left: u, orthonormal columns, (C, r).
        importance: σ_i · mean_n |cos(v_i, h_n)|, (r,).
        rank: the numerical rank: the number of σ above max(C, d) · eps · σ_1, with the eps of the weight's type, at least float32
            (``numpy.linalg.matrix_rank``). The other σ are rounding errors of the weights.
        vectors: number of representations that the importance is measured on.
        zero_vectors: number left out because a vector of zeros has no direction.
        invalid_vectors: number left out because of nan or inf.
    """

    singular_values: Tensor
    directions: Tensor
    left: Tensor
    importance: Tensor
    rank: int
    vectors: int
    zero_vectors: int
    invalid_vectors: int

    def __len__(self) -> int:
        return len(self.singular_values)

    def order(self, by: str = "importance", seed: int = 0) -> Tensor:
        """The order in which to keep the directions, int64 (r,).

        Directions beyond the rank are always last. Of equal ones, the larger singular value comes first.

        Args:
            by: "importance", "sigma" (the singular value) or "random".
            seed: of "random".

        Raises:
            ValueError: another word.
        """
        beyond = torch.arange(self.rank, len(self))
        if by == "random":
            within = torch.randperm(self.rank, generator=torch.Generator().manual_seed(seed))
        elif by in ORDERS:
            key = self.importance if by == "importance" else self.singular_values
            within = key[: self.rank].argsort(descending=True, stable=True)
        else:
            raise ValueError(f"directions are ordered by one of {', '.join(ORDERS)}, got {by!r}")
        return torch.cat([within, beyond])

    def alignment(self, features: Tensor | Sequence[int] | OutlierFeatures) -> Tensor:
        """How far each direction lies in the span of some features, Σ_{j∈O} v_ij²: 0 … 1, float64 (r,); k/d for k features by chance.

        Raises:
            ValueError: features that the head does not have, or a feature given twice.
        """
        return self.directions[:, feature_indices(features, self.directions.shape[1])].square().sum(1)

    def gaps(self) -> Tensor:
        """The distance of each singular value to its nearest neighbor, in units of the largest singular value, float64 (r,).

        The gap tells how well a direction is determined: if the head changes by E, the direction turns by at most about ‖E‖ / gap (Wedin,
        BIT, 1972). If the gap is near the precision of the weights (1e-7 in float32), only the span of the neighbors has a meaning, not
        each direction. For d > r, the singular value 0 of the directions that the head does not read is a neighbor too.
        """
        sigma = self.singular_values
        outside = sigma.new_tensor([math.inf])
        last = sigma[-1:] if self.directions.shape[1] > len(self) else outside
        steps = torch.cat([outside, sigma[:-1] - sigma[1:], last])
        gap = torch.minimum(steps[:-1], steps[1:]) / sigma[0]
        return gap.where(gap.isfinite(), math.nan)


def privileged_directions(head: HeadLike, h: Vectors) -> Directions:
    """The singular directions of a head and their importance for some images.

    Do not measure importance on the images on which a pruned head is evaluated; :func:`split` makes two parts. Normalizing the
    representations changes nothing, because a cosine does not depend on their length. The bias has no direction.

    Args:
        head: a linear layer, or its weight (C, d).
        h: the representations (n, d), or embeddings. They are read block by block.

    Raises:
        ValueError: the head is zero or not finite, h is not (n, d), or no vector is left to measure importance on.

    >>> h = torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.1, -2.0]])
    >>> found = privileged_directions(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]), h)
    >>> found.singular_values, found.order("importance"), found.order("sigma")
    (tensor([2., 1.], dtype=torch.float64), tensor([1, 0]), tensor([0, 1]))
    """
    rows = representations(h)
    weight, _ = weight_and_bias(head, rows.shape[1])
    left, sigma, right = torch.linalg.svd(weight.cpu().double(), full_matrices=False)
    if not float(sigma[0]):
        raise ValueError(f"all {weight.numel()} weights of the head are 0, so it has no directions")
    signs = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    right, left = right * signs, left * signs.T
    total, zero, invalid = torch.zeros(len(sigma), dtype=torch.float64), 0, 0
    for block in blocks(rows):
        finite = block.isfinite().all(1)
        largest = block.abs().amax(1)
        kept = finite & (largest > 0)
        invalid += int((~finite).sum())
        zero += int((finite & ~kept).sum())
        unit = torch.nn.functional.normalize(block[kept] / largest[kept, None], dim=1).cpu()  # scaled first, so that no square overflows
        total += (unit @ right.T).abs().sum(0)
    vectors = len(rows) - zero - invalid
    if not vectors:
        raise ValueError(f"no representation to measure importance on: of {len(rows)}, {zero} are zero and {invalid} have nan or inf")
    return Directions(
        singular_values=sigma,
        directions=right,
        left=left,
        importance=sigma * total / vectors,
        rank=int((sigma > sigma[0] * max(weight.shape) * torch.finfo(weight.dtype).eps).sum()),
        vectors=vectors,
        zero_vectors=zero,
        invalid_vectors=invalid,
    )


def centered(head: HeadLike) -> Head:
    """The head minus its mean over classes, in weight and bias.

    Softmax and argmax stay the same. Singular values and directions change, because the first direction of a zero-shot head is mostly
    that mean. The rank is at most C − 1.

    >>> centered(torch.tensor([[3.0, 1.0], [1.0, 1.0]])).weight
    Parameter containing:
    tensor([[ 1.,  0.],
            [-1.,  0.]], requires_grad=True)
    """
    whole = as_head(head)
    weight, bias = weight_and_bias(whole)
    wide = weight.double()
    centered_bias = None if bias is None else (bias.double() - bias.double().mean()).to(bias)
    return Head((wide - wide.mean(0)).to(weight), centered_bias, normalize=whole.normalize, names=whole.names)


def split(embeddings: Embeddings, fraction: float = 0.5, seed: int = 0) -> tuple[Embeddings, Embeddings]:
    """Two parts without a common image: one to measure importance on, one to evaluate on.

    The part of an image depends only on its id and the seed. So it is the same for every encoder, for every order, and also if some images
    could not be read. The sizes and the classes of the parts are therefore only approximately in proportion.

    Args:
        embeddings: with ids.
        fraction: approximate share of the images in the first part.
        seed: another seed gives another division.

    Raises:
        ValueError: ``fraction`` is outside (0, 1), or a part is empty.

    >>> from torchprobe.analysis.embeddings import Embeddings
    >>> e = Embeddings(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64), list("abcdef"))
    >>> [part.ids for part in split(e)]
    [['b', 'c', 'e', 'f'], ['a', 'd']]
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is the share of the first part, between 0 and 1, got {fraction}")
    first = torch.tensor([_share(name, seed) < fraction for name in embeddings.ids], dtype=torch.bool)
    parts = first.nonzero().flatten(), (~first).nonzero().flatten()
    if not all(map(len, parts)):
        raise ValueError(
            f"{len(first)} images are too few to split: {len(parts[0])} are in the first part and {len(parts[1])} in the second"
        )
    return embeddings.select(parts[0]), embeddings.select(parts[1])


def feature_indices(features: Tensor | Sequence[int] | OutlierFeatures, width: int) -> Tensor:
    """Features of a representation as int64 (k,).

    Raises:
        ValueError: an index is outside the ``width`` features, given twice, or not a whole number.
    """
    given = features.indices if isinstance(features, OutlierFeatures) else features
    index = torch.as_tensor(given if isinstance(given, Tensor) else list(given), device="cpu")
    if index.numel() and (index.dim() != 1 or index.dtype == torch.bool or index.is_floating_point()):
        raise ValueError(f"features are given as indices, whole numbers (k,); got {index.dtype} of shape {tuple(index.shape)}")
    index = index.reshape(-1).long()
    if bool(((index < 0) | (index >= width)).any()):
        raise ValueError(f"features are indices from 0 to {width - 1}, got {int(index.min())} … {int(index.max())}")
    if len(index.unique()) < len(index):
        raise ValueError(f"{len(index)} features are given, but only {len(index.unique())} of them are different")
    return index


def _share(name: str, seed: int) -> float:
    """A number in [0, 1) that depends only on the name and the seed, uniform over names."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
