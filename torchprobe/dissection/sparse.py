"""Sparse autoencoders: their latents as units, and how often these are active."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.common import storage

MAPS = 1 << 28
"""Bytes of the maps of latents that are held at a time."""


class SparseEncoder(nn.Module):
    """The encoder of a sparse autoencoder: features (n, d) → latents (n, k), float32.

    z = W (x − c) + b. The latents are ReLU(z); with thresholds θ they are z where z > θ, else 0 (JumpReLU, Rajamanoharan et al. 2024); with
    ``top_k`` only the largest of ReLU(z) are kept (Gao et al. 2024).

    Args:
        weight: W, (k, d): one row for each latent.
        bias: b, (k,), or None for 0.
        center: c, (d,), the bias of the decoder if it is subtracted from the features; None for 0.
        threshold: θ ≥ 0, (k,) or one number, or None.
        top_k: latents that may be active in one vector, or None.

    Raises:
        ValueError: the shapes do not fit together, a number is not finite, a threshold is negative, or both ``threshold`` and ``top_k`` are
            given.

    >>> encoder = SparseEncoder(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), top_k=1)
    >>> encoder(torch.tensor([[1.0, 2.0], [-1.0, -1.0]]))
    tensor([[0., 0., 3.],
            [0., 0., 0.]])
    """

    weight: Tensor
    bias: Tensor | None
    center: Tensor | None
    threshold: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        center: Tensor | None = None,
        threshold: Tensor | float | None = None,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"the weight of an encoder must be (latents, features), got {tuple(weight.shape)}")
        latents, features = weight.shape
        if threshold is not None and top_k is not None:
            raise ValueError("an encoder has thresholds or top_k, not both")
        if top_k is not None and not 1 <= top_k <= latents:
            raise ValueError(f"top_k must be between 1 and the number of latents, {latents}; got {top_k}")
        level = None if threshold is None else torch.as_tensor(threshold).float()
        if level is not None and level.numel() == 1:
            level = level.reshape(()).expand(latents)
        given = {"weight": (weight, (latents, features)), "bias": (bias, (latents,)), "center": (center, (features,))}
        for name, (part, shape) in {**given, "threshold": (level, (latents,))}.items():
            if part is not None and tuple(part.shape) != shape:
                raise ValueError(f"the {name} of an encoder with {latents} latents must be {shape}, got {tuple(part.shape)}")
            if part is not None and not bool(part.isfinite().all()):
                raise ValueError(f"the {name} of the encoder is not finite")
            self.register_buffer(name, None if part is None else part.detach().float().clone())
        if level is not None and bool((level < 0).any()):
            raise ValueError("a threshold of the encoder is negative: its latents would be active below 0")
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() if self.center is None else x.float() - self.center
        z = nn.functional.linear(x, self.weight, self.bias)
        if self.threshold is not None:
            return torch.where(z > self.threshold, z, 0)
        z = z.relu()
        if self.top_k is None:
            return z
        largest, index = z.topk(self.top_k, dim=1)
        return torch.zeros_like(z).scatter(1, index, largest)


@dataclass(frozen=True, eq=False)
class SparseBasis:
    """Latents as units: an encoder that is applied to the feature vector of every position.

    Args:
        encoder: features (n, d) → latents (n, k): a :class:`SparseEncoder`, or any module. If it has a method ``encode``, that is called.
        name: for metadata and pages.
        facts: how it was read; plain values.

    >>> basis = SparseBasis(SparseEncoder(torch.eye(3, 2)))
    >>> basis.units(2, "layer"), basis.encode(torch.ones(4, 2, 7, 7)).shape
    (3, torch.Size([4, 3, 7, 7]))
    """

    encoder: nn.Module
    name: str = "encoder"
    facts: Mapping[str, Any] = field(default_factory=dict)
    _copies: dict[torch.device, nn.Module] = field(default_factory=dict, init=False, repr=False)
    _units: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def units(self, features: int, layer: str) -> int:
        """The number of latents for a layer of this width.

        Raises:
            ValueError: the encoder does not take vectors of this width, or does not give one vector for each.
        """
        if features in self._units:
            return self._units[features]
        try:
            with torch.no_grad():
                found = self._call(torch.zeros(2, features))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the basis {self.name!r} does not take the {features} features of layer {layer!r}: {error}") from error
        if found.dim() != 2 or len(found) != 2 or found.shape[1] < 1:
            raise ValueError(f"the basis {self.name!r} gives {tuple(found.shape)} for 2 vectors of layer {layer!r}; expected (2, latents)")
        self._units[features] = found.shape[1]
        return found.shape[1]

    def encode(self, maps: Tensor) -> Tensor:
        """Features (images, d, …) → latents (images, k, …), float32."""
        vectors = maps.movedim(1, -1)
        latents = self._call(vectors.reshape(-1, vectors.shape[-1]).float()).float()
        return latents.reshape(*vectors.shape[:-1], latents.shape[1]).movedim(-1, 1)

    def digest(self) -> str:
        """Of everything that the latents depend on, except the code of a module."""
        return storage.digest([*self.encoder.parameters(), *self.encoder.buffers()]) + f":{getattr(self.encoder, 'top_k', None)}"

    def _call(self, vectors: Tensor) -> Tensor:
        encoder: Any = self._on(vectors.device)
        found = encoder.encode(vectors) if callable(getattr(encoder, "encode", None)) else encoder(vectors)
        if not isinstance(found, Tensor):
            raise ValueError(f"its encoder gives {type(found).__name__}; expected a tensor")
        return found

    def _on(self, device: torch.device) -> nn.Module:
        """The encoder in eval mode on a device; that of the user stays where it is."""
        if device not in self._copies:
            self._copies[device] = copy.deepcopy(self.encoder).to(device).eval()
        return self._copies[device]


class Density:
    """How often latents are active, that is, above 0. A mergeable statistic.

    ``active`` int64 (k,): positions where each latent is active, of ``positions``. ``active_images`` int64 (k,): images in which it is
    active anywhere, of ``images``.

    >>> density = Density(2)
    >>> density.update(torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]]))
    >>> density.density, density.dead_share, density.dead
    (tensor([0.5000, 0.0000], dtype=torch.float64), tensor([0., 1.], dtype=torch.float64), tensor([False,  True]))
    """

    def __init__(self, units: int) -> None:
        self.active, self.active_images = torch.zeros(2, units, dtype=torch.int64).unbind()
        self.positions, self.images = 0, 0

    @property
    def density(self) -> Tensor:
        """Share of the positions of all images where each latent is active, float64 (k,)."""
        return self.active.double() / self.positions

    @property
    def dead_share(self) -> Tensor:
        """Share of the images in which each latent is active nowhere, float64 (k,)."""
        return 1 - self.active_images.double() / self.images

    @property
    def dead(self) -> Tensor:
        """Latents that are active in no image, bool (k,)."""
        return self.active == 0

    def update(self, maps: Tensor) -> None:
        """Adds images, (n, k, …)."""
        active = (maps > 0).flatten(2) if maps.dim() > 2 else (maps > 0)[..., None]
        self.active = self.active + active.sum((0, 2)).cpu()
        self.active_images = self.active_images + active.any(2).sum(0).cpu()
        self.positions += active.shape[0] * active.shape[2]
        self.images += active.shape[0]

    def merge(self, other: Density) -> Density:
        """Adds, in place, what ``other`` has seen; returns self."""
        self.active, self.active_images = self.active + other.active, self.active_images + other.active_images
        self.positions, self.images = self.positions + other.positions, self.images + other.images
        return self

    def state_dict(self) -> dict[str, Any]:
        return {"active": self.active, "active_images": self.active_images, "positions": self.positions, "images": self.images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises:
        ValueError: counts that no images can give.
        """
        active, active_images = state["active"], state["active_images"]
        positions, images = int(state["positions"]), int(state["images"])
        if active.shape != self.active.shape or active_images.shape != self.active.shape:
            raise ValueError(f"expected counts of {len(self.active)} latents, got {tuple(active.shape)} and {tuple(active_images.shape)}")
        for counts, limit in ((active, positions), (active_images, images)):
            if counts.dtype != torch.int64 or bool(((counts < 0) | (counts > limit)).any()):
                raise ValueError(f"expected counts between 0 and {limit}")
        self.active, self.active_images, self.positions, self.images = active, active_images, positions, images

    def rows(self) -> list[dict[str, float]]:
        """``density`` and ``dead_share`` of each latent."""
        pairs = zip(self.density.tolist(), self.dead_share.tolist(), strict=True)
        return [{"density": density, "dead_share": dead} for density, dead in pairs]

    def summary(self) -> dict[str, Any]:
        """``mean`` and ``median`` density over latents; the number of ``dead`` latents, and their share of all."""
        density, dead = self.density, self.dead
        return {
            "mean": float(density.mean()),
            "median": float(density.median()),
            "dead": int(dead.sum()),
            "dead_latents": float(dead.double().mean()),
        }

    def tensors(self) -> dict[str, Tensor]:
        """For a file; :func:`read_density` reads them."""
        size = torch.tensor([self.positions, self.images])
        return {"density/active": self.active, "density/active_images": self.active_images, "density/size": size}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Density):
            return NotImplemented
        mine, theirs = self.tensors(), other.tensors()
        return all(torch.equal(mine[key], theirs[key]) for key in mine)

    __hash__ = None  # type: ignore[assignment]


def read_density(file: storage.File, units: int) -> Density | None:
    """What :meth:`Density.tensors` wrote; None if there is nothing.

    Raises:
        ValueError: it does not fit.
    """
    if "density/size" not in file.keys:
        return None
    density, size = Density(units), file.tensor("density/size", torch.int64, (2,)).tolist()
    parts = {name: file.tensor(f"density/{name}", torch.int64, (units,)) for name in ("active", "active_images")}
    try:
        density.load_state_dict({**parts, "positions": size[0], "images": size[1]})
    except ValueError as error:
        raise file.error("density", str(error)) from error
    return density
