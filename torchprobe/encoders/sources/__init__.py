"""Where encoders come from: one file for each library. A new source takes a file here and a line in :data:`SOURCES`."""

from collections.abc import Callable

from torchprobe.encoders.encoder import Built
from torchprobe.encoders.sources.hugging_face import from_hugging_face
from torchprobe.encoders.sources.open_clip import from_open_clip
from torchprobe.encoders.sources.timm import from_timm
from torchprobe.encoders.sources.torchvision import from_torchvision

SOURCES: dict[str, Callable[[str, str, bool], Built]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
    "open_clip": from_open_clip,
    "hf": from_hugging_face,
}
"""What stands before the colon of a name → the function that builds such an encoder.

Its arguments are the full name, the name within the source, and whether to load trained weights.
"""
