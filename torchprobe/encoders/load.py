"""One way to get an image encoder: open_clip, torchvision and timm models, from the hub or from a local file."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import logging
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_SOURCES = {"timm": "timm", "torchvision": "torchvision", "open_clip": "open_clip_torch"}
"""Where encoders come from, and the package that has it."""

_NESTED = ("state_dict", "model_state_dict", "model", "module", "net")
"""Where training scripts put the weights inside a checkpoint."""

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What compiling and sharding put into the middle of names."""


class EncoderError(RuntimeError):
    """An encoder that cannot be made; the message says what was wrong, where, and what to do."""


class Encoder(nn.Module):
    """An image encoder. Its output is the representation: the vector that the head sees, before normalisation.

    Args:
        visual: the network without its head: images (N, 3, H, W) → (N, features). Its layers are named ``visual.…``
            for every source, as within a CLIP model.
        features: the width of the representation.
        preprocess: PIL image → tensor (3, H, W), the way the weights want it.
        name: what to call it.

    >>> from torch import nn
    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), features=5, preprocess=lambda image: image)
    >>> encoder(torch.zeros(2, 3, 2, 2)).shape
    torch.Size([2, 5])
    """

    preprocess: Callable[[Any], Tensor]

    def __init__(self, visual: nn.Module, *, features: int, preprocess: Callable[[Any], Tensor], name: str = "encoder") -> None:
        super().__init__()
        self.visual = visual
        self.features = features
        self.__dict__["preprocess"] = preprocess  # past nn.Module: a transform that is a module is still no layer
        self.name = name

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) → representations (N, features)."""
        output: Tensor | tuple[Tensor, ...] = self.visual(images)
        h = output[0] if isinstance(output, tuple) else output  # some towers return their tokens as well
        if h.shape[1:] != (self.features,):
            raise EncoderError(
                f"{self.name} gave {tuple(h.shape)} where (images, {self.features}) was expected: it does not pool to one vector per image"
            )
        return h

    def extra_repr(self) -> str:
        return f"{self.name!r}, features={self.features}"


def load_encoder(name: str, checkpoint: str | os.PathLike[str] | None = None, *, pretrained: bool = True) -> Encoder:
    """An image encoder by name, in eval mode on the CPU, with the preprocessing its weights want.

    Args:
        name: ``"timm:NAME"``; ``"torchvision:NAME"`` with the library's default weights, or
            ``"torchvision:NAME/WEIGHTS"``; ``"open_clip:NAME/PRETRAINED"``, of which the image tower is taken, with
            QuickGELU where those weights were trained with it.
        checkpoint: a local ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file with the weights of that
            architecture; nothing is fetched then, and WEIGHTS and PRETRAINED choose the preprocessing (and QuickGELU)
            only. Only tensors are read (``weights_only=True``). Prefixes such as ``module.`` or ``model.visual.`` are
            stripped; a classification head or a text tower in the file is left aside.
        pretrained: False gives random weights, from PyTorch's generator, unless there is a checkpoint.

    Raises:
        EncoderError: unknown name, missing package, weights that cannot be fetched, a file that cannot be read, or
            weights that do not fit, with the missing and unexpected keys.

    >>> load_encoder("torchvision:resnet18", pretrained=False).features
    512
    """
    source, _, rest = name.partition(":")
    if source not in _SOURCES or not rest:
        known = ", ".join(f"{s}:NAME" for s in _SOURCES)
        raise EncoderError(f"{name!r} is not the name of an encoder: expected one of {known}" + _nearest(source, _SOURCES))
    make = {"timm": _from_timm, "torchvision": _from_torchvision, "open_clip": _from_open_clip}[source]
    encoder, aside = make(name, rest, pretrained and checkpoint is None)
    if checkpoint is not None:
        load_weights(encoder.visual, checkpoint, aside=aside)
        encoder.name = f"{name} ({Path(checkpoint).name})"
    elif not pretrained:
        encoder.name = f"{name} (random weights)"
    return encoder.eval()


def load_weights(module: nn.Module, checkpoint: str | os.PathLike[str], *, aside: Iterable[str] = ()) -> None:
    """Loads a local checkpoint into ``module``; every key must be met.

    Args:
        module: what receives the weights.
        checkpoint: as for :func:`load_encoder`. The prefix under which most of the module's keys lie is found and
            stripped; what lies elsewhere in the file, such as a text tower, is not touched.
        aside: keys that the file may have though the module does not, such as those of the head.

    Raises:
        EncoderError: the file cannot be read; keys are missing, unexpected or of another shape; two prefixes fit
            equally well. Nothing is loaded then.
    """
    found = read_checkpoint(checkpoint)
    expected = module.state_dict()
    prefix = _prefix(found, expected, checkpoint)
    weights = {key[len(prefix) :]: value for key, value in found.items() if key.startswith(prefix)}
    missing = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in expected and key not in set(aside)]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{len(keys)} {what}: {_some(keys)}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        where = f" under {prefix!r}" if prefix else ""
        raise EncoderError(
            f"{checkpoint} does not fit {type(module).__name__} ({len(expected)} keys expected, {len(weights)} found"
            f"{where}); {'; '.join(parts)}. Choose the architecture the file was made with, or take out of the file "
            "what is no part of the image encoder."
        )
    module.load_state_dict({key: value for key, value in weights.items() if key in expected}, strict=False)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a PyTorch checkpoint, on the CPU.

    The tensors may be nested, as in ``{"state_dict": …, "epoch": …}``. PyTorch files are read with
    ``weights_only=True``: no code in them is run.

    Raises:
        EncoderError: no such file, not a checkpoint, objects other than tensors in it, or no tensors at all.
    """
    path = Path(path)
    if not path.is_file():
        raise EncoderError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _tensors(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise EncoderError(f"{path} cannot be read as safetensors: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain options that many training scripts save along
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{path} holds more than tensors, and loading it could run code, so it was not loaded ({_reason(error)}). "
            "Where you trust it, keep its weights only: torch.save(model.state_dict(), …) or safetensors' save_file."
        ) from error
    except Exception as error:  # a torn zip, an empty file, a text file: each has its own exception
        if "TorchScript" in str(error):
            raise EncoderError(
                f"{path} is a TorchScript archive, which holds code, so it was not loaded. Where you trust it, keep "
                "its weights only: torch.save(torch.jit.load(path).state_dict(), …)."
            ) from error
        raise EncoderError(f"{path} cannot be read as a PyTorch checkpoint: {_reason(error)}") from error
    tensors = _tensors(content)
    for key in _NESTED:
        if not tensors and isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            tensors = _tensors(content[key])
    if not tensors:
        raise EncoderError(
            f"{path} holds no state_dict: expected a mapping from names to tensors, bare or under one of {', '.join(_NESTED)}"
        )
    return tensors


# -- the three sources: each gives the encoder, and the keys of the head that a checkpoint may hold --------------------


def _from_timm(name: str, model_name: str, pretrained: bool) -> tuple[Encoder, list[str]]:
    timm = _package("timm")
    data = importlib.import_module("timm.data")
    if "/" not in model_name and not timm.is_model(model_name):
        raise EncoderError(f"timm has no model {model_name!r}" + _nearest(model_name, timm.list_models()))
    with _making(name, pretrained or "/" in model_name):  # a name with a slash is a place on the hub
        model = timm.create_model(model_name, pretrained=pretrained)
    whole = set(model.state_dict())
    preprocess = data.create_transform(**data.resolve_model_data_config(model), is_training=False)
    model.reset_classifier(0)
    features = int(getattr(model, "head_hidden_size", model.num_features))
    return Encoder(model, features=features, preprocess=preprocess, name=name), sorted(whole - set(model.state_dict()))


def _from_torchvision(name: str, rest: str, pretrained: bool) -> tuple[Encoder, list[str]]:
    _package("torchvision")
    models = importlib.import_module("torchvision.models")
    model_name, _, tag = rest.partition("/")
    if model_name not in models.list_models(module=models):
        raise EncoderError(
            f"torchvision has no classification model {model_name!r}" + _nearest(model_name, models.list_models(module=models))
        )
    choices = models.get_model_weights(model_name)
    if tag and tag not in choices.__members__:
        raise EncoderError(f"torchvision has no weights {tag!r} for {model_name}; it has {', '.join(choices.__members__)}")
    weights = choices[tag] if tag else choices.DEFAULT
    # Two models normalise their input a second time, but only when they fetch their weights themselves.
    options = {"transform_input": True, "init_weights": True} if model_name in ("googlenet", "inception_v3") and not pretrained else {}
    with _making(name, pretrained):
        model = models.get_model(model_name, weights=weights if pretrained else None, **options)
    whole = set(model.state_dict())
    heads = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not heads:
        raise EncoderError(f"torchvision's {model_name} has no linear head, so there is no vector that a head sees")
    path, head = heads[-1]
    model.set_submodule(path, nn.Identity())
    return Encoder(model, features=head.in_features, preprocess=weights.transforms(), name=name), sorted(whole - set(model.state_dict()))


def _from_open_clip(name: str, rest: str, pretrained: bool) -> tuple[Encoder, list[str]]:
    open_clip = _package("open_clip")
    transform = importlib.import_module("open_clip.transform")
    model_name, _, tag = rest.partition("/")
    config = open_clip.get_model_config(model_name)
    if config is None:
        raise EncoderError(f"open_clip has no model {model_name!r}" + _nearest(model_name, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if (tag and tag not in tags) or (pretrained and not tag):
        problem = (
            f"no weights {tag!r} for {model_name}"
            if tag
            else f"several weights for {model_name}: say which, as in open_clip:{model_name}/TAG"
        )
        raise EncoderError(
            f"open_clip has {problem}; it has {', '.join(tags) or 'none'}; or give a local file with --checkpoint (checkpoint=)"
        )
    tagged = dict(open_clip.get_pretrained_cfg(model_name, tag) or {}) if tag else {}
    # With the wrong activation function the weights give plausible but wrong representations: the tag decides.
    quick = bool(tagged.get("quick_gelu", config.get("quick_gelu", False)))
    with _making(name, pretrained):
        clip = open_clip.create_model(model_name, pretrained=tag if pretrained else None, force_quick_gelu=quick, pretrained_text=False)
    settings = getattr(clip.visual, "preprocess_cfg", None) if pretrained else None
    settings = settings or transform.merge_preprocess_dict({}, tagged | {"size": clip.visual.image_size})
    preprocess = transform.image_transform_v2(transform.PreprocessCfg(**settings), is_train=False)
    return Encoder(clip.visual, features=int(config["embed_dim"]), preprocess=preprocess, name=name), []


# -- help --------------------------------------------------------------------------------------------------------------


def _package(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise EncoderError(f"{module} is not installed: pip install {_SOURCES[module]}, or pip install 'torchprobe[vision]'") from error


@contextlib.contextmanager
def _making(name: str, fetching: bool) -> Iterator[None]:
    """Turns whatever the libraries raise while they fetch and build into one clear error, and keeps them quiet."""
    # The root logger too: open_clip writes to it, and that would install a handler for the whole process.
    loggers = [logging.getLogger(), logging.getLogger("huggingface_hub")]
    levels, silence = [logger.level for logger in loggers], logging.NullHandler()
    loggers[0].addHandler(silence)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        if not fetching:
            raise EncoderError(f"{name} could not be built: {_reason(error)}") from error
        raise EncoderError(
            f"the weights of {name} could not be fetched ({_reason(error)}). They are looked for in {_caches(name)}. "
            "On a machine without access, bring the file and give it with --checkpoint FILE (checkpoint= in Python)."
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        loggers[0].removeHandler(silence)


def _caches(name: str) -> str:
    caches = [str(Path(torch.hub.get_dir(), "checkpoints"))]
    if not name.startswith("torchvision:"):
        with contextlib.suppress(ImportError):
            caches.insert(0, str(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE))
    return " and ".join(caches)


def _prefix(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]) -> str:
    """The prefix under which most expected keys are found."""
    votes: Counter[str] = Counter()
    for key in found:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in expected:
                votes["".join(f"{part}." for part in parts[:i])] += 1
    ranking = votes.most_common(2)
    if len(ranking) == 2 and ranking[0][1] == ranking[1][1] > len(expected) / 2:
        raise EncoderError(f"{path} holds the encoder twice, under {ranking[0][0]!r} and {ranking[1][0]!r}: keep one of them in the file")
    return ranking[0][0] if ranking else ""


def _tensors(content: object) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for wrapper in _WRAPPERS:
        tensors = {key.replace(wrapper, ""): value for key, value in tensors.items()}
    return tensors


def _some(items: list[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" … and {len(items) - most} more" if len(items) > most else "")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _reason(error: BaseException) -> str:
    """The first line of an error, short."""
    line = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return line if len(line) <= 200 else line[:199] + "…"
