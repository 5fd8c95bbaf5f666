"""One way to get an image encoder: by name, with weights from a library or from a local file."""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path

from torch import Tensor

from torchprobe.common.messages import did_you_mean
from torchprobe.encoders.checkpoint import load_tensors, read_checkpoint
from torchprobe.encoders.encoder import Built, Encoder
from torchprobe.encoders.errors import EncoderError
from torchprobe.encoders.head import head_at, linear_layers, named_heads, single_layer
from torchprobe.encoders.sources import SOURCES


def load_encoder(
    name: str,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    pretrained: bool = True,
    representation: str | None = None,
) -> Encoder:
    """An encoder by name, in eval mode on the CPU, with the preprocessing that its weights require.

    The classification layer of trained weights becomes :attr:`Encoder.head`.

    Args:
        name: ``"timm:NAME"``; ``"torchvision:NAME"`` with the default weights of the library, or
            ``"torchvision:NAME/WEIGHTS"``; or ``"open_clip:NAME/PRETRAINED"``, which returns a
            :class:`~torchprobe.encoders.ClipEncoder`, with QuickGELU if those weights were trained with it; or ``"hf:NAME"`` and
            ``"hf:FOLDER"`` for a model of transformers, from the hub or from a folder as ``save_pretrained`` writes it. A folder never
            needs the network. Two-tower models return a :class:`~torchprobe.encoders.ClipEncoder`, language models and text encoders a
            :class:`~torchprobe.encoders.TextEncoder`.

            There are two names for your own CLIP model. One is ``"open_clip:NAME"`` with a checkpoint, after
            ``open_clip.add_model_config(FOLDER)`` with ``NAME.json`` in the folder. The other is
            ``"open_clip:local-dir:FOLDER"``, without that call. This folder holds ``open_clip_config.json``, with
            ``model_cfg``, and ``preprocess_cfg`` if it differs from OpenAI's. The weights lie next to it as
            ``open_clip_model.safetensors``, or in a checkpoint.
        checkpoint: a local ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file with the weights of that architecture.
            Nothing is fetched then: WEIGHTS or PRETRAINED only choose the preprocessing, and QuickGELU. Without PRETRAINED, use
            the ``-quickgelu`` configuration if the file needs it; a file in OpenAI's format is refused otherwise. Only tensors are read
            (``weights_only=True``). Prefixes such as ``module.`` or ``model.visual.`` are removed. A classification layer in the file
            becomes the head of the encoder. A complete text tower in the file becomes its text tower.
        pretrained: False: random weights, from PyTorch's generator, unless there is a checkpoint.
        representation: which output of the network is the representation: ``"pooler"``, ``"class"``, ``"mean"``, ``"last"`` or
            ``"projection"``, as far as the model has it (``encoder.choices``); see :mod:`torchprobe.encoders.outputs`. None: what the
            trained head sees; without a head, of two towers the projection, of an image encoder the pooler's output if its weights are
            there, otherwise the class token or the mean, of a text encoder the mean over its tokens, of a language model the last one.

    Raises:
        EncoderError: the name is unknown; a package is missing; the weights cannot be fetched; the file cannot be read; or the
            weights do not fit, with the missing and unexpected keys.

    >>> load_encoder("torchvision:resnet18", pretrained=False).features
    512
    """
    source, _, model = name.partition(":")
    if source not in SOURCES or not model:
        known = ", ".join(f"{source}:NAME" for source in SOURCES)
        similar = [] if ":" in name else _full_names(name)
        hint = f"; did you mean {' or '.join(similar)}?" if similar else did_you_mean(source, SOURCES)
        raise EncoderError(f"{name!r} is not the name of an encoder: expected one of {known}{hint}")
    weights = None if checkpoint is None else read_checkpoint(checkpoint)  # first: a wrong path is found before a large network is built
    built = SOURCES[source](name, model, pretrained and checkpoint is None)
    if checkpoint is not None and weights is not None:
        _load_checkpoint(built, checkpoint, weights)
        built.encoder.name = f"{name} ({Path(checkpoint).name})"
    elif not pretrained:
        built.encoder.name = f"{name} (random weights)"
    if representation is not None:
        built.encoder.choose(representation)
    return built.encoder.eval()


def _full_names(name: str) -> list[str]:
    """The names of encoders that a name without a source may stand for, in the libraries that are installed."""
    model, found = name.partition("/")[0], []
    with contextlib.suppress(ImportError):
        if importlib.import_module("timm").is_model(name):
            found.append(f"timm:{name}")
    with contextlib.suppress(ImportError):
        models = importlib.import_module("torchvision.models")
        if model in models.list_models(module=models):
            found.append(f"torchvision:{name}")
    if not found:
        with contextlib.suppress(ImportError):
            open_clip = importlib.import_module("open_clip")
            if model != name and model in open_clip.list_models():
                found.append(f"open_clip:{name}")
            else:
                found.extend(f"open_clip:{name}/{tag}" for tag in open_clip.list_pretrained_tags_by_model(name)[:1])
    return found


def _load_checkpoint(built: Built, checkpoint: str | os.PathLike[str], found: dict[str, Tensor]) -> None:
    """Loads an encoder, its text tower and its head from what a local file holds."""
    encoder, weights = built.encoder, built.rename(found)
    prefix = load_tensors(encoder.network, weights, checkpoint, built.head_keys)
    loaded = {prefix + key for key in encoder.network.state_dict()} | encoder.load_companions(weights, prefix, checkpoint)
    if not built.finds_heads:
        return
    rest = {layer: shape for layer, shape in linear_layers(weights).items() if f"{layer}.weight" not in loaded}
    own = single_layer(built.head_keys)
    if own is not None and prefix + own in rest:
        candidates = [prefix + own]
    else:
        candidates = [stack[0] for stack in named_heads(rest).values() if len(stack) == 1]
    fitting = [layer for layer in candidates if rest[layer][1] == encoder.features]
    if len(fitting) == 1:
        names = None if built.class_names is None else list(built.class_names)
        fits = names is not None and len(names) == rest[fitting[0]][0]
        encoder.head = head_at(weights, fitting[0], normalize=encoder.head_normalizes, names=names if fits else None, path=checkpoint)
