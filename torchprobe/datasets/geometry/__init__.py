"""Where the pixels of a network's input lie in the picture that they were made of.

=============================  =========================================================================
==============  ========================================================================
file            subject
==============  ========================================================================
``box``         boxes, and the lookup by size
``carried``     transforms whose steps are known
``measured``    any other transform, by what it makes of test pictures
``whole``       the whole picture, with the colors of another transform
``identity``    the fingerprint of a transform
==============  ========================================================================
"""

from torchprobe.datasets.geometry.box import Box, Geometry, GeometryError
from torchprobe.datasets.geometry.identity import UNKNOWN, RandomTransformError, fingerprint
from torchprobe.datasets.geometry.whole import WholePicture, whole_picture

__all__ = ["UNKNOWN", "Box", "Geometry", "GeometryError", "RandomTransformError", "WholePicture", "fingerprint", "whole_picture"]
