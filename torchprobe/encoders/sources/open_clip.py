"""The source ``open_clip:``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchprobe.common.messages import did_you_mean
from torchprobe.encoders.clip import ClipEncoder
from torchprobe.encoders.encoder import Built
from torchprobe.encoders.errors import EncoderError, library_errors, package
from torchprobe.encoders.head import HEAD_NAMES

_SELF_CONTAINED = ("local-dir:", "hf-hub:")
"""Prefixes of open_clip models that come with their own configuration and weights."""


class OpenClipTokenizer:
    """The tokenizer of an open_clip model, created at the first call, because some tokenizers are fetched.

    >>> OpenClipTokenizer("ViT-B-32")(["a photo"]).shape
    torch.Size([1, 77])
    """

    def __init__(self, model: str) -> None:
        self.model = model

    def __call__(self, texts: list[str]) -> Tensor:
        tokens: Tensor = self._tokenizer(texts)
        return tokens

    @functools.cached_property
    def _tokenizer(self) -> Any:
        with library_errors(f"open_clip:{self.model} (its tokenizer)", fetching=True):
            return package("open_clip", pip="open_clip_torch").get_tokenizer(self.model)


def from_open_clip(name: str, model: str, pretrained: bool) -> Built:
    """The source ``open_clip:``; see :data:`torchprobe.encoders.sources.SOURCES`."""
    open_clip = package("open_clip", pip="open_clip_torch")
    self_contained = model.startswith(_SELF_CONTAINED)  # such a model has no tag
    model_name, _, tag = (model, "", "") if self_contained else model.partition("/")
    with library_errors(name, fetching=model.startswith("hf-hub:")):
        config: Mapping[str, Any] | None = open_clip.get_model_config(model_name)
    if config is None:
        raise EncoderError(f"open_clip has no model {model_name!r}" + did_you_mean(model_name, open_clip.list_models()))
    tags = [] if self_contained else open_clip.list_pretrained_tags_by_model(model_name)
    if (tag and tag not in tags) or (pretrained and not tag and not self_contained):
        problem = f"no weights {tag!r} for {model_name}"
        if not tag:
            problem = f"{'several' if tags else 'no'} weights for {model_name}: choose one, as in open_clip:{model_name}/TAG"
        raise EncoderError(
            f"open_clip has {problem}; it has {', '.join(tags) or 'none'}; or use a local file with --checkpoint (checkpoint=)"
        )
    tagged = dict(open_clip.get_pretrained_cfg(model_name, tag) or {}) if tag else {}
    # With the wrong activation function the weights give plausible but wrong representations: the tag decides.
    quick = bool(tagged.get("quick_gelu", config.get("quick_gelu", False)))
    options = {"load_weights": pretrained, "require_pretrained": pretrained, "pretrained_text": False, "force_quick_gelu": quick}
    with library_errors(name, fetching=pretrained and not model.startswith("local-dir:")):
        clip = open_clip.create_model(model_name, pretrained=tag if pretrained else None, **options).eval()
    transform = importlib.import_module("open_clip.transform")
    settings = (
        clip.visual.preprocess_cfg
        if pretrained or self_contained
        else transform.merge_preprocess_dict({}, tagged | {"size": clip.visual.image_size})
    )
    preprocess = transform.image_transform_v2(transform.PreprocessCfg(**settings), is_train=False)
    encoder = ClipEncoder(clip, OpenClipTokenizer(model_name), features=int(config["embed_dim"]), preprocess=preprocess, name=name)
    return Built(encoder, tuple(f"{head}.{part}" for head in HEAD_NAMES for part in ("weight", "bias")))
