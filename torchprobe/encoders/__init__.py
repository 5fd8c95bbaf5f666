"""One way to get an image encoder, and the head on top of it.

======================  ==========================================================================
:func:`load_encoder`    by name, from open_clip, torchvision or timm, or a local checkpoint
:class:`Encoder`        images in, representations out; with its preprocessing
:class:`Head`           representations in, classes out
:func:`load_weights`    a local checkpoint into a module; :func:`read_checkpoint` just reads one
======================  ==========================================================================
"""

from torchprobe.encoders.head import Head
from torchprobe.encoders.load import Encoder, EncoderError, load_encoder, load_weights, read_checkpoint

__all__ = ["load_encoder", "Encoder", "EncoderError", "Head", "load_weights", "read_checkpoint"]
