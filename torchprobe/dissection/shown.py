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
        self._clear()

    def _clear(self) -> None:
        # In a few long tensors. Many short ones, which lie among the buffers of decoders, keep these from being given back: 90 kB an image.
        self._numbers, self._areas, self._used = torch.empty(0, dtype=torch.int32), torch.empty(0), 0
        self._start, self._length = torch.zeros(2, self.images, dtype=torch.int64)
        self._known = torch.zeros(self.images, dtype=torch.bool)

    def _append(self, places: Tensor, lengths: Tensor, numbers: Tensor, areas: Tensor) -> None:
        end = self._used + len(numbers)
        if (room := end - len(self._numbers)) > 0:
            more = max(room, len(self._numbers))
            self._numbers, self._areas = (
                torch.cat([self._numbers, numbers.new_empty(more)]),
                torch.cat([self._areas, areas.new_empty(more)]),
            )
        self._numbers[self._used : end], self._areas[self._used : end] = numbers, areas
        self._start[places], self._length[places], self._known[places] = self._used + lengths.cumsum(0) - lengths, lengths, True
        self._used = end

    def update(self, places: Sequence[int], areas: Sequence[tuple[Tensor, Tensor]], outside: Tensor) -> None:
        """Adds images.

        Args:
            places: which images, counted from 0.
            areas: of each, see :func:`torchprobe.datasets.broden.presence.image_areas`.
            outside: of all of them, see :class:`torchprobe.dissection.framing.Framed`.
        """
        rows = Presence.of(areas)
        self._append(torch.tensor(places, dtype=torch.int64), rows.crow.diff(), rows.number, rows.area)
        self.outside.index_add_(0, outside[:, 0], outside[:, 1])

    def presence(self) -> Presence:
        """All images, in order; those that were not added show nothing."""
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), self._length.cumsum(0)])
        entry = torch.arange(int(crow[-1])) + (self._start - crow[:-1]).repeat_interleave(self._length)
        return Presence(crow, self._numbers[entry], self._areas[entry])

    def merge(self, other: ShownLabels) -> ShownLabels:
        """Adds the images of another one."""
        state = other.state_dict()
        self._append(*(state[name] for name in ("places", "lengths", "numbers", "areas")))
        self.outside += other.outside
        return self

    def state_dict(self) -> dict[str, Any]:
        """The images in ascending order: ``places``, ``lengths``, ``numbers`` and ``areas``; and ``outside``."""
        places = self._known.nonzero().flatten()
        rows = self.presence().take(places.tolist())
        found = {"places": places, "lengths": rows.crow.diff(), "numbers": rows.number, "areas": rows.area}
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
        numbers, areas, image = state["numbers"], state["areas"], torch.arange(len(places)).repeat_interleave(state["lengths"])
        known = (numbers > 0) & (numbers < len(self.outside))
        ascending = (numbers.diff() > 0) | (image.diff() > 0)
        shares = (areas >= 0) & (areas <= 1)  # False for nan
        if not bool(known.all() & ascending.all() & shares.all() & (state["outside"] >= 0).all()):
            raise ValueError("the saved labels of images are none: a number, a share or a count is impossible")
        self._clear()
        self._append(*(state[name] for name in ("places", "lengths", "numbers", "areas")))
        self.outside.copy_(state["outside"])
