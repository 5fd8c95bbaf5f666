"""Readers of images behind one protocol, :class:`torchprobe.datasets.ImageSet`: shards, stores, data sets, loaders and streams."""

from torchprobe.datasets.readers.opening import is_elsewhere, open_images, shards_in
from torchprobe.datasets.readers.shards import open_shards

__all__ = ["is_elsewhere", "open_images", "open_shards", "shards_in"]
