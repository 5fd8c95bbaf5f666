"""The linear layer that turns a representation into classes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchprobe.common.files import replacing


class Head(nn.Linear):
    """A linear layer over representations: h (N, features) → logits (N, classes).

    Wherever the library takes a head, any ``nn.Linear`` will do; this one also knows what its rows mean, and whether the
    representation is brought to unit length first, as CLIP and what is fine-tuned from it do. Without a bias that changes
    no decision; with one it does.

    Args:
        weight: floating (classes, features).
        bias: floating (classes,), or None.
        normalize: divide each representation by its length first.
        names: what the rows are called, in order; None where nobody knows.

    Raises:
        ValueError: shapes that do not fit together, or numbers that are not floating.

    >>> head = Head(torch.eye(2, 3), names=["left", "right"])
    >>> head(torch.tensor([[0.0, 2.0, 0.0]])).tolist()
    [[0.0, 2.0]]
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, normalize: bool = False, names: Sequence[str] | None = None) -> None:
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"the weight of a head has the shape (classes, features), got {tuple(weight.shape)}")
        if not weight.is_floating_point():
            raise ValueError(f"the weight of a head is floating, got {weight.dtype}")
        classes, features = weight.shape
        if bias is not None and bias.shape != (classes,):
            raise ValueError(f"the bias of a head with {classes} classes has the shape ({classes},), got {tuple(bias.shape)}")
        if isinstance(names, str) or (names is not None and len(names) != classes):
            raise ValueError(f"a head with {classes} classes needs as many names, got {1 if isinstance(names, str) else len(names)}")
        super().__init__(features, classes, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            self.weight.copy_(weight)
            if bias is not None:
                self.bias.copy_(bias)
        self.normalize = normalize
        self.names = None if names is None else tuple(names)

    def forward(self, h: Tensor) -> Tensor:
        """Representations (N, features) → logits (N, classes)."""
        return super().forward(functional.normalize(h, dim=-1) if self.normalize else h)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a ``.safetensors`` file with ``weight``, ``bias``, and in its metadata ``normalize`` and ``names``.

        :func:`torchprobe.encoders.load_head` reads it back. An older file is replaced at once.

        Raises:
            ValueError: another ending.
            OSError: the file cannot be written.
        """
        from safetensors.torch import save_file

        if os.path.splitext(path)[1] != ".safetensors":
            raise ValueError(f"a head is saved as .safetensors, got {os.fspath(path)!r}")
        metadata = {"format": "1", "kind": "head", "normalize": json.dumps(self.normalize), "names": json.dumps(self.names)}
        with replacing(path) as temporary:
            save_file({key: value.cpu().contiguous() for key, value in self.state_dict().items()}, temporary, metadata)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", normalize=True" if self.normalize else "")
