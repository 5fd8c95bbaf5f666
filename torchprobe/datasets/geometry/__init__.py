"""Where the pixels of a network's input lie in the picture that they were made of.

=======================  ==========================================================================================
:class:`Box`             the part of a picture that an input shows
:class:`Geometry`        the box of every size of picture, for one transform
:class:`WholePicture`    a transform that shows the whole picture
:func:`whole_picture`    the same colors as a given transform, but the whole picture
:func:`fingerprint`      what a transform does, as a short text: two transforms with one text do the same
:data:`UNKNOWN`          the fingerprint of a transform that does not take test pictures
:class:`GeometryError`   it cannot be told where the pixels come from
=======================  ==========================================================================================

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
from torchprobe.datasets.geometry.identity import UNKNOWN, fingerprint
from torchprobe.datasets.geometry.whole import WholePicture, whole_picture

__all__ = ["UNKNOWN", "Box", "Geometry", "GeometryError", "WholePicture", "fingerprint", "whole_picture"]
