"""What every set of images does, wherever it is kept: the protocol :class:`ImageSet`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Self

    from torchprobe.datasets.images import Batch


@runtime_checkable
class ImageSet(Protocol):
    """Images in a fixed order, in batches. Every function and command of torchprobe that takes images takes any object of this form.

    The order is part of the set: batch ``i`` of size ``n`` holds the images ``i × n`` to ``i × n + n − 1``, whoever asks. So the ranks of a
    run share the batches without a sampler, each image is read once, and a run is resumed after any batch.

    :func:`torchprobe.datasets.open_images` makes one of a folder, of shards, of addresses such as ``s3://…``, of PyTorch data sets and
    loaders, and of Hugging Face data sets. A class of your own needs the attributes below, and no base class. It may have a sequence
    ``labels``: the row of the head for each image, −1 if unknown. It may have a text ``identity`` that changes whenever the images change;
    see :func:`torchprobe.common.facts.told`.

    Attributes:
        paths: what stands for each image, in order; any hashable values.
        root: the folder of the images, into which no results are written; None if there is none.

    >>> from torchprobe.datasets import Images
    >>> isinstance(Images([]), ImageSet), isinstance([1, 2], ImageSet)
    (True, False)
    """

    @property
    def paths(self) -> Sequence[Any]: ...

    @property
    def root(self) -> Path | None: ...

    def __len__(self) -> int: ...

    def name(self, path: Any) -> str:
        """The name of one image in messages and tables. No two images have the same."""
        ...

    def size(self, path: Any) -> int | None:
        """The bytes of one image as it is kept; None if unknown."""
        ...

    def digest(self) -> str:
        """A digest of the names and contents of all images, or :data:`torchprobe.common.facts.UNIDENTIFIED`, which is never resumed."""
        ...

    def take(self, numbers: Sequence[int]) -> Self:
        """The images with these numbers, in this order."""
        ...

    def batches(
        self, preprocess: Callable[[Image], Tensor], size: int, workers: int = 2, only: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """Batches of up to ``size`` images, or those with the numbers ``only``. What cannot be read is named in the batch."""
        ...

    def picture(self, path: Any) -> Image:
        """One image in RGB, as pages show it. Raises an error if it cannot be read."""
        ...
