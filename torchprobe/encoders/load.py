"""One way to get an image encoder: by name, with weights from a library or from a local file."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from torchprobe.common.messages import did_you_mean
from torchprobe.encoders.checkpoint import load_tensors, read_checkpoint
from torchprobe.encoders.clip import from_open_clip
from torchprobe.encoders.encoder import Built, Encoder
from torchprobe.encoders.errors import EncoderError, library_errors, package
from torchprobe.encoders.head import Head, head_at, linear_layers, named_heads


def load_encoder(name: str, checkpoint: str | os.PathLike[str] | None = None, *, pretrained: bool = True) -> Encoder:
    """An image encoder by name, in eval mode on the CPU, with the preprocessing that its weights require.

    The classification layer of trained weights becomes :attr:`Encoder.head`.

    Args:
        name: ``"timm:NAME"``; ``"torchvision:NAME"`` with the default weights of the library, or
            ``"torchvision:NAME/WEIGHTS"``; or ``"open_clip:NAME/PRETRAINED"``, which returns a
            :class:`~torchprobe.encoders.ClipEncoder`, with QuickGELU if those weights were trained with it.

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
    built = SOURCES[source](name, model, pretrained and checkpoint is None)
    if checkpoint is not None:
        _load_checkpoint(built, checkpoint)
        built.encoder.name = f"{name} ({Path(checkpoint).name})"
    elif not pretrained:
        built.encoder.name = f"{name} (random weights)"
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


def _load_checkpoint(built: Built, checkpoint: str | os.PathLike[str]) -> None:
    """Loads an encoder, its text tower and its head from a local file."""
    encoder, weights = built.encoder, read_checkpoint(checkpoint)
    prefix = load_tensors(encoder.visual, weights, checkpoint, built.head_keys)
    loaded = {prefix + key for key in encoder.visual.state_dict()} | encoder.load_companions(weights, prefix, checkpoint)
    rest = {layer: shape for layer, shape in linear_layers(weights).items() if f"{layer}.weight" not in loaded}
    own = _single_layer(built.head_keys)
    if own is not None and prefix + own in rest:
        candidates = [prefix + own]
    else:
        candidates = [stack[0] for stack in named_heads(rest).values() if len(stack) == 1]
    fitting = [layer for layer in candidates if rest[layer][1] == encoder.features]
    if len(fitting) == 1:
        encoder.head = head_at(weights, fitting[0], normalize=encoder.head_normalizes, path=checkpoint)


# -- sources: (full name, name within the source, pretrained) → Built ----------------------------------------------------


def from_timm(name: str, model: str, pretrained: bool) -> Built:
    """The source ``timm:``."""
    timm = package("timm")
    data = importlib.import_module("timm.data")
    if "/" not in model and not timm.is_model(model):
        raise EncoderError(f"timm has no model {model!r}" + did_you_mean(model, timm.list_models()))
    with library_errors(name, fetching=pretrained or "/" in model):  # a name with a slash is a repository on the hub
        visual = timm.create_model(model, pretrained=pretrained)
    all_keys = set(visual.state_dict())
    preprocess = data.create_transform(**data.resolve_model_data_config(visual), is_training=False)
    classifier, subset = visual.get_classifier(), data.infer_imagenet_subset(visual)
    visual.reset_classifier(0)
    features = int(getattr(visual, "head_hidden_size", visual.num_features))
    head_keys = _removed(all_keys, visual)
    head = None
    if pretrained and _single_layer(head_keys) is not None:
        names = visual.pretrained_cfg.get("label_names") or (data.ImageNetInfo(subset).label_descriptions() if subset else None)
        head = _trained_head(classifier, features, names)
    return Built(Encoder(visual, features=features, preprocess=preprocess, name=name, head=head), head_keys)


def from_torchvision(name: str, model: str, pretrained: bool) -> Built:
    """The source ``torchvision:``."""
    package("torchvision")
    models = importlib.import_module("torchvision.models")
    model_name, _, tag = model.partition("/")
    known = models.list_models(module=models)
    if model_name not in known:
        raise EncoderError(f"torchvision has no classification model {model_name!r}" + did_you_mean(model_name, known))
    choices = models.get_model_weights(model_name)
    if tag and tag not in choices.__members__:
        raise EncoderError(f"torchvision has no weights {tag!r} for {model_name}; it has {', '.join(choices.__members__)}")
    weights = choices[tag] if tag else choices.DEFAULT
    # Two models normalize their input a second time, but only when they fetch their weights themselves.
    options = {"transform_input": True, "init_weights": True} if model_name in ("googlenet", "inception_v3") and not pretrained else {}
    with library_errors(name, fetching=pretrained):
        visual = models.get_model(model_name, weights=weights if pretrained else None, **options)
    all_keys = set(visual.state_dict())
    linear = [(path, module) for path, module in visual.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise EncoderError(f"torchvision's {model_name} has no linear head, so it has no vector that a head sees")
    path, last = linear[-1]
    visual.set_submodule(path, nn.Identity())
    head = _trained_head(last, last.in_features, weights.meta.get("categories")) if pretrained else None
    encoder = Encoder(visual, features=last.in_features, preprocess=weights.transforms(), name=name, head=head)
    return Built(encoder, _removed(all_keys, visual))


SOURCES: Mapping[str, Callable[[str, str, bool], Built]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
    "open_clip": from_open_clip,
}
"""What stands before the colon of a name → the function that builds such an encoder. A new source takes one file and one line here."""


# -- the head ------------------------------------------------------------------------------------------------------------


def _removed(all_keys: Iterable[str], visual: nn.Module) -> tuple[str, ...]:
    """The keys that a network lost with its classification layer."""
    return tuple(sorted(set(all_keys) - set(visual.state_dict())))


def _single_layer(keys: Sequence[str]) -> str | None:
    """The path of the layer if ``keys`` are the keys of one linear layer."""
    layers = {key.rpartition(".")[0] for key in keys}
    return layers.pop() if len(layers) == 1 and {key.rpartition(".")[2] for key in keys} in ({"weight"}, {"weight", "bias"}) else None


def _trained_head(layer: nn.Module, features: int, names: list[str] | None) -> Head | None:
    """The head of a removed layer, if it is a linear layer over the representation."""
    if not isinstance(layer, nn.Linear) or layer.in_features != features:
        return None
    bias: Tensor | None = layer.bias
    fitting = names if names is not None and len(names) == layer.out_features else None
    return Head(layer.weight.detach(), None if bias is None else bias.detach(), names=fitting)
