"""One way to get an image encoder: open_clip, torchvision and timm models, from the hub or from a local file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchprobe.encoders.checkpoint import HEADS, fill, head_at, linear_layers, named_heads, read_checkpoint
from torchprobe.encoders.clip import ClipEncoder, OpenClipTokenizer
from torchprobe.encoders.encoder import Encoder
from torchprobe.encoders.errors import EncoderError, nearest
from torchprobe.encoders.head import Head
from torchprobe.encoders.libraries import SOURCES, making, package

_SCHEMES = ("local-dir:", "hf-hub:")
"""Models of open_clip that bring their own configuration and weights."""


_OPENAI = {"input_resolution", "context_length", "vocab_size"}
"""Numbers that OpenAI's files have among the weights."""


def load_encoder(name: str, checkpoint: str | os.PathLike[str] | None = None, *, pretrained: bool = True) -> Encoder:
    """An image encoder by name, in eval mode on the CPU, with the preprocessing its weights want.

    The classification layer that is taken off trained weights is kept as :attr:`Encoder.head`.

    Args:
        name: ``"timm:NAME"``; ``"torchvision:NAME"`` with the library's default weights, or
            ``"torchvision:NAME/WEIGHTS"``; ``"open_clip:NAME/PRETRAINED"``, which gives a
            :class:`~torchprobe.encoders.ClipEncoder`, with QuickGELU where those weights were trained with it.
            A CLIP model of your own is ``"open_clip:NAME"`` with a checkpoint, after
            ``open_clip.add_model_config(FOLDER)`` with ``NAME.json`` in the folder; or, without that call,
            ``"open_clip:local-dir:FOLDER"`` with ``open_clip_config.json`` (``model_cfg``, and ``preprocess_cfg`` if
            it differs from OpenAI's) in it and the weights beside it, as ``open_clip_model.safetensors``, or in a
            checkpoint.
        checkpoint: a local ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file with the weights of that
            architecture; nothing is fetched then, and WEIGHTS and PRETRAINED choose the preprocessing (and QuickGELU)
            only: without a tag, take the ``-quickgelu`` configuration where the file wants it (for files in OpenAI's
            format anything else is refused). Only tensors are read (``weights_only=True``). Prefixes such as
            ``module.`` or ``model.visual.`` are stripped. A classification layer in the file becomes the encoder's
            head, a text tower its text tower, if all of it is there.
        pretrained: False gives random weights, from PyTorch's generator, unless there is a checkpoint.

    Raises:
        EncoderError: unknown name, missing package, weights that cannot be fetched, a file that cannot be read, or
            weights that do not fit, with the missing and unexpected keys.

    >>> load_encoder("torchvision:resnet18", pretrained=False).features
    512
    """
    source, _, rest = name.partition(":")
    if source not in SOURCES or not rest:
        known = ", ".join(f"{s}:NAME" for s in SOURCES)
        raise EncoderError(f"{name!r} is not the name of an encoder: expected one of {known}" + nearest(source, SOURCES))
    make = {"timm": _from_timm, "torchvision": _from_torchvision, "open_clip": _from_open_clip}[source]
    encoder, aside = make(name, rest, pretrained and checkpoint is None)
    if checkpoint is not None:
        _fill(encoder, checkpoint, aside)
        encoder.name = f"{name} ({Path(checkpoint).name})"
    elif not pretrained:
        encoder.name = f"{name} (random weights)"
    return encoder.eval()


def _fill(encoder: Encoder, checkpoint: str | os.PathLike[str], aside: list[str]) -> None:
    """Fills an encoder, its text tower and its head from a local file."""
    found = read_checkpoint(checkpoint)
    prefix = fill(encoder.visual, found, checkpoint, aside)
    taken = {prefix + key for key in encoder.visual.state_dict()}
    if isinstance(encoder, ClipEncoder):
        whole = prefix.removesuffix("visual.")
        weights = {key.removeprefix(whole): value for key, value in found.items() if key.startswith(whole)} if whole != prefix else {}
        _check_activation(encoder, weights, checkpoint)
        encoder.fill_text(weights, checkpoint)
        taken |= {whole + key for key in (() if encoder.text is None else encoder.text.state_dict())}
    own = _linear(aside)
    layers = {layer: shape for layer, shape in linear_layers(found).items() if f"{layer}.weight" not in taken}
    if own is not None and prefix + own in layers:
        candidates = [prefix + own]
    else:
        candidates = [stack[0] for stack in named_heads(layers).values() if len(stack) == 1]
    fitting = [layer for layer in candidates if layers[layer][1] == encoder.features]
    if len(fitting) == 1:
        # What is fine-tuned from CLIP starts at its zero-shot head, which sees unit vectors (a choice of ours).
        encoder.head = head_at(found, fitting[0], normalize=isinstance(encoder, ClipEncoder), path=checkpoint)


def _check_activation(encoder: ClipEncoder, weights: Mapping[str, Tensor], checkpoint: str | os.PathLike[str]) -> None:
    """Refuses what OpenAI trained, and all of it with QuickGELU, for a model without: it would load, and be wrong."""
    quick = importlib.import_module("open_clip.transformer").QuickGELU
    towers = [tower for tower in (encoder.visual, encoder.text) if tower is not None]
    if weights.keys() >= _OPENAI and not any(isinstance(module, quick) for tower in towers for module in tower.modules()):
        raise EncoderError(
            f"{checkpoint} is in OpenAI's format, whose models have QuickGELU, and {encoder.name} has GELU: "
            "name the tag (open_clip:…/openai) or the configuration (open_clip:…-quickgelu)"
        )


# -- the three sources: each gives the encoder, and the keys of the head that a checkpoint may hold --------------------


def _from_timm(name: str, model_name: str, pretrained: bool) -> tuple[Encoder, list[str]]:
    timm = package("timm")
    data = importlib.import_module("timm.data")
    if "/" not in model_name and not timm.is_model(model_name):
        raise EncoderError(f"timm has no model {model_name!r}" + nearest(model_name, timm.list_models()))
    with making(name, pretrained or "/" in model_name):  # a name with a slash is a place on the hub
        model = timm.create_model(model_name, pretrained=pretrained)
    whole = set(model.state_dict())
    preprocess = data.create_transform(**data.resolve_model_data_config(model), is_training=False)
    classifier, subset = model.get_classifier(), data.infer_imagenet_subset(model)
    model.reset_classifier(0)
    features = int(getattr(model, "head_hidden_size", model.num_features))
    aside = sorted(whole - set(model.state_dict()))
    head = None
    if pretrained and _linear(aside) is not None:
        names = model.pretrained_cfg.get("label_names") or (data.ImageNetInfo(subset).label_descriptions() if subset else None)
        head = _trained_head(classifier, features, names)
    return Encoder(model, features=features, preprocess=preprocess, name=name, head=head), aside


def _from_torchvision(name: str, rest: str, pretrained: bool) -> tuple[Encoder, list[str]]:
    package("torchvision")
    models = importlib.import_module("torchvision.models")
    model_name, _, tag = rest.partition("/")
    if model_name not in models.list_models(module=models):
        raise EncoderError(
            f"torchvision has no classification model {model_name!r}" + nearest(model_name, models.list_models(module=models))
        )
    choices = models.get_model_weights(model_name)
    if tag and tag not in choices.__members__:
        raise EncoderError(f"torchvision has no weights {tag!r} for {model_name}; it has {', '.join(choices.__members__)}")
    weights = choices[tag] if tag else choices.DEFAULT
    # Two models normalise their input a second time, but only when they fetch their weights themselves.
    options = {"transform_input": True, "init_weights": True} if model_name in ("googlenet", "inception_v3") and not pretrained else {}
    with making(name, pretrained):
        model = models.get_model(model_name, weights=weights if pretrained else None, **options)
    whole = set(model.state_dict())
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise EncoderError(f"torchvision's {model_name} has no linear head, so there is no vector that a head sees")
    path, last = linear[-1]
    model.set_submodule(path, nn.Identity())
    head = _trained_head(last, last.in_features, weights.meta.get("categories")) if pretrained else None
    encoder = Encoder(model, features=last.in_features, preprocess=weights.transforms(), name=name, head=head)
    return encoder, sorted(whole - set(model.state_dict()))


def _from_open_clip(name: str, rest: str, pretrained: bool) -> tuple[Encoder, list[str]]:
    open_clip = package("open_clip")
    transform = importlib.import_module("open_clip.transform")
    itself = rest.startswith(_SCHEMES)  # it brings its own configuration, so there is no tag
    model_name, _, tag = (rest, "", "") if itself else rest.partition("/")
    with making(name, rest.startswith("hf-hub:")):
        config: Mapping[str, Any] | None = open_clip.get_model_config(model_name)
    if config is None:
        raise EncoderError(f"open_clip has no model {model_name!r}" + nearest(model_name, open_clip.list_models()))
    tags = [] if itself else open_clip.list_pretrained_tags_by_model(model_name)
    if (tag and tag not in tags) or (pretrained and not tag and not itself):
        problem = f"no weights {tag!r} for {model_name}"
        if not tag:
            problem = f"{'several' if tags else 'no'} weights for {model_name}: say which, as in open_clip:{model_name}/TAG"
        raise EncoderError(
            f"open_clip has {problem}; it has {', '.join(tags) or 'none'}; or give a local file with --checkpoint (checkpoint=)"
        )
    tagged = dict(open_clip.get_pretrained_cfg(model_name, tag) or {}) if tag else {}
    # With the wrong activation function the weights give plausible but wrong representations: the tag decides.
    quick = bool(tagged.get("quick_gelu", config.get("quick_gelu", False)))
    options = {"load_weights": pretrained, "require_pretrained": pretrained, "pretrained_text": False, "force_quick_gelu": quick}
    with making(name, pretrained and not rest.startswith("local-dir:")):
        clip = open_clip.create_model(model_name, pretrained=tag if pretrained else None, **options).eval()
    settings = (
        clip.visual.preprocess_cfg
        if pretrained or itself
        else transform.merge_preprocess_dict({}, tagged | {"size": clip.visual.image_size})
    )
    preprocess = transform.image_transform_v2(transform.PreprocessCfg(**settings), is_train=False)
    encoder = ClipEncoder(clip, OpenClipTokenizer(model_name), features=int(config["embed_dim"]), preprocess=preprocess, name=name)
    return encoder, [f"{head}.{part}" for head in HEADS for part in ("weight", "bias")]


# -- the head ----------------------------------------------------------------------------------------------------------


def _linear(keys: list[str]) -> str | None:
    """The path of the layer when ``keys`` are those of one linear layer."""
    layers = {key.rpartition(".")[0] for key in keys}
    return layers.pop() if len(layers) == 1 and {key.rpartition(".")[2] for key in keys} in ({"weight"}, {"weight", "bias"}) else None


def _trained_head(layer: nn.Module, features: int, names: list[str] | None) -> Head | None:
    """A layer that was taken off, when it is a linear one over the representation."""
    if not isinstance(layer, nn.Linear) or layer.in_features != features:
        return None
    bias: Tensor | None = layer.bias
    fitting = names if names is not None and len(names) == layer.out_features else None
    return Head(layer.weight.detach(), None if bias is None else bias.detach(), names=fitting)
