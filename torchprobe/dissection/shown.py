"""Which labels the images of a run show, collected batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchprobe.datasets.broden import Presence


class ShownLabels:
    """For each image its labels and the share of it that each covers, where the network looked; and the pixels of labels elsewhere.

    Args:
        images: the number of images.
        labels: the number of labels, with 0.

    >>> shown = ShownLabels(images=2, labels=4)
    >>> shown.update([1], [(torch.tensor([3], dtype=torch.int32), torch.tensor([0.5]))], torch.tensor([[2, 10]]))
    >>> shown.presence().images(3), shown.outside.tolist()
    ([1], [0, 0, 10, 0])
    """

    def __init__(self, images: int, labels: int) -> None:
        self.images = images
        self.outside = torch.zeros(labels, dtype=torch.int64)
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, places: Sequence[int], areas: Sequence[tuple[Tensor, Tensor]], outside: Tensor) -> None:
        """Adds images.

        Args:
            places: which images, counted from 0.
            areas: of each, see :func:`torchprobe.datasets.broden.presence.image_areas`.
            outside: of all of them, see :class:`torchprobe.dissection.framing.Framed`.
        """
        self._found.update(zip(places, areas, strict=True))
        self.outside.index_add_(0, outside[:, 0], outside[:, 1])

    def presence(self) -> Presence:
        """All images, in order; those that were not added show nothing."""
        none = torch.empty(0, dtype=torch.int32), torch.empty(0)
        return Presence.of([self._found.get(place, none) for place in range(self.images)])

    def merge(self, other: ShownLabels) -> ShownLabels:
        """Adds the images of another one."""
        self._found |= other._found
        self.outside += other.outside
        return self

    def state_dict(self) -> dict[str, Any]:
        """The images in ascending order: ``places``, ``lengths``, ``numbers`` and ``areas``; and ``outside``."""
        places = sorted(self._found)
        rows = Presence.of([self._found[place] for place in places])
        found = {"places": torch.tensor(places, dtype=torch.int64), "lengths": rows.crow.diff(), "numbers": rows.number, "areas": rows.area}
        return {**found, "outside": self.outside.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a :meth:`state_dict`.

        Raises:
            ValueError: its parts do not fit together.
        """
        places, lengths = state["places"].tolist(), state["lengths"].tolist()
        total, unique = sum(lengths), len(set(places)) == len(places) == len(lengths)
        if (
            not unique
            or any(not 0 <= place < self.images for place in places)
            or len(state["numbers"]) != total
            or min(lengths, default=0) < 0
        ):
            raise ValueError("the saved labels of images do not fit together")
        if state["outside"].shape != self.outside.shape or len(state["areas"]) != total:
            raise ValueError(f"the saved labels are those of {len(state['outside']) - 1} labels, expected {len(self.outside) - 1}")
        parts = zip(state["numbers"].split(lengths), state["areas"].split(lengths), strict=True)
        self._found = dict(zip(places, parts, strict=True)) if places else {}
        self.outside.copy_(state["outside"])
