"""One way to get an encoder, and the head on top of it.

=======================================  ==========================================================================
:func:`load_encoder`                     by name, from open_clip, torchvision, timm or transformers, or from a local file
:class:`Encoder`                         images in, representations out; with its preprocessing and its trained head
:class:`TextEncoder`                     texts in, representations out: a language model, a text tower
:class:`ClipEncoder`                     an encoder with a text tower: captions in; with the zero-shot head
:class:`Head`                            representations in, classes out; :func:`load_head` reads one from a file
:func:`load_weights`                     a local checkpoint into a module; :func:`read_checkpoint` reads one
:class:`EncoderError`                    the error of all of them
:mod:`torchprobe.encoders.suite`         many encoders to compare, with their roles, as a TOML file
=======================================  ==========================================================================
"""

from torchprobe.encoders.checkpoint import load_weights, read_checkpoint
from torchprobe.encoders.clip import ClipEncoder
from torchprobe.encoders.encoder import Encoder
from torchprobe.encoders.errors import EncoderError
from torchprobe.encoders.head import Head, load_head
from torchprobe.encoders.load import load_encoder
from torchprobe.encoders.text import TextEncoder

__all__ = ["load_encoder", "Encoder", "ClipEncoder", "TextEncoder", "EncoderError", "Head", "load_head", "load_weights", "read_checkpoint"]
