"""The source ``torchvision:``."""

from __future__ import annotations

import importlib

from torch import nn

from torchprobe.common.messages import did_you_mean
from torchprobe.encoders.encoder import Built, Encoder
from torchprobe.encoders.errors import EncoderError, library_errors, package
from torchprobe.encoders.head import removed_keys, trained_head


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
    names = weights.meta.get("categories")
    head = trained_head(last, last.in_features, names) if pretrained else None
    encoder = Encoder(visual, features=last.in_features, preprocess=weights.transforms(), name=name, head=head)
    return Built(encoder, removed_keys(all_keys, visual), names)
