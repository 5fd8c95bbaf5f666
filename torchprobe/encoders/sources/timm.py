"""The source ``timm:``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torchprobe.common.messages import did_you_mean
from torchprobe.encoders.checkpoint import split_prefix
from torchprobe.encoders.encoder import Built, Encoder
from torchprobe.encoders.errors import EncoderError, library_errors, package
from torchprobe.encoders.head import removed_keys, single_layer, trained_head


def from_timm(name: str, model: str, pretrained: bool) -> Built:
    """The source ``timm:``."""
    timm = package("timm")
    data = importlib.import_module("timm.data")
    if "/" not in model and not timm.is_model(model):
        raise EncoderError(f"timm has no model {model!r}" + did_you_mean(model, timm.list_models()))
    with library_errors(name, fetching=pretrained or ("/" in model and not model.startswith("local-dir:"))):  # a slash: from the hub
        visual = timm.create_model(model, pretrained=pretrained)
    all_keys = set(visual.state_dict())
    preprocess = data.create_transform(**data.resolve_model_data_config(visual), is_training=False)
    subset = data.infer_imagenet_subset(visual)
    names = visual.pretrained_cfg.get("label_names") or (data.ImageNetInfo(subset).label_descriptions() if subset else None)
    rename = functools.partial(_renamed, visual)
    if names is None and _is_clip_tower(model, visual):
        encoder = Encoder(visual, features=int(visual.num_classes or visual.num_features), preprocess=preprocess, name=name)
        return Built(encoder, rename=rename, finds_heads=False)
    classifier = visual.get_classifier()
    visual.reset_classifier(0)
    features = int(getattr(visual, "head_hidden_size", visual.num_features))
    head_keys = removed_keys(all_keys, visual)
    head = trained_head(classifier, features, names) if pretrained and single_layer(head_keys) is not None else None
    encoder = Encoder(visual, features=features, preprocess=preprocess, name=name, head=head)
    return Built(encoder, head_keys, names, rename)


def _is_clip_tower(model: str, visual: Any) -> bool:
    """Whether the last layer of a network is the projection of a CLIP or SigLIP model, and not a classification layer.

    timm does not say it. Such weights come without names of classes, in no number of classes of ImageNet, and their name says CLIP. Those
    of SigLIP pool by attention and have no projection.
    """
    tag = f"{visual.pretrained_cfg.get('architecture', '')}.{visual.pretrained_cfg.get('tag', '')} {model}".lower()
    return "clip" in tag or "siglip" in tag


# -- checkpoints ---------------------------------------------------------------------------------------------------------


def _renamed(visual: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under timm's names: as they are if these are there, otherwise as timm converts such files itself."""
    expected = visual.state_dict().keys()
    found = split_prefix(weights, visual.state_dict())[0]
    if expected <= found.keys() and not any(key not in expected for key in found):
        return weights
    if any(key.startswith("_blocks.") for key in weights):
        try:
            return efficientnet_names(weights, visual)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # another architecture: the keys that do not fit are named
            return weights
    convert = getattr(importlib.import_module(type(visual).__module__), "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    try:
        converted = dict(convert(dict(found), visual))
    except Exception:  # not one of the formats that timm knows: the keys that do not fit are named as they are
        return weights
    sizes = {value.numel() for value in weights.values()}
    stretched = "pos_embed" in converted and converted["pos_embed"].numel() not in sizes  # resampled for images of another size
    better = _misfits(converted, expected) < _misfits(found, expected)
    return converted if better and not stretched else weights


def _misfits(found: Mapping[str, Tensor], expected: Iterable[str]) -> tuple[int, int]:
    """How many expected keys are missing, and how many there are besides."""
    names = set(expected)
    return len(names - found.keys()), len(found.keys() - names)


def efficientnet_names(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of lukemelas' EfficientNet and its descendants under the names of timm's.

    Such a file numbers the blocks through. It numbers the norms of a block from 0, or from 1 if the block has no expansion. timm
    numbers the blocks within their stages, and the norms from 1.
    """
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(len(stage))]  # type: ignore[arg-type]
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanding = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    renamed = {}
    for key, value in weights.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            names = expanding if f"_blocks.{parts[1]}._expand_conv.weight" in weights else plain
            renamed[".".join([blocks[int(parts[1])], names[parts[2]], *parts[3:]])] = value
        else:
            renamed[".".join([outside[parts[0]], *parts[1:]])] = value
    return renamed
