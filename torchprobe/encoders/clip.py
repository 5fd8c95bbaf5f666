"""CLIP: the text tower, and the head that captions make."""

from __future__ import annotations

import copy
import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchprobe.common.progress import CountCallback
from torchprobe.encoders.encoder import BATCH, Encoder, Template
from torchprobe.encoders.errors import EncoderError, some
from torchprobe.encoders.head import Head
from torchprobe.encoders.libraries import making, package

_LOGIT_SCALING = ("logit_scale", "logit_bias")
"""Parameters of a CLIP model that no representation depends on."""


class ClipEncoder(Encoder):
    """The image tower of a CLIP model as an :class:`Encoder`, with its text tower beside it.

    The text tower moves with the encoder, but is no layer of it: no hook, parameter list or ``state_dict`` sees it.

    Args:
        clip: a model of open_clip, or one with the same ``visual`` and ``encode_text(tokens, normalize=False)``. Its
            weights are shared, not copied.
        tokenizer: list of texts → int64 tokens (texts, context).
        features: the width that images and texts share.
        preprocess: as for :class:`Encoder`.
        name: as for :class:`Encoder`.
        head: as for :class:`Encoder`, where one was fine-tuned; not the zero-shot head.
    """

    text: nn.Module | None

    _companions: ClassVar[tuple[str, ...]] = ("head", "text")
    _aside: ClassVar[tuple[str, ...]] = ("preprocess", *_companions)

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        *,
        features: int,
        preprocess: Callable[[Any], Tensor],
        name: str = "encoder",
        head: Head | None = None,
    ) -> None:
        super().__init__(clip.get_submodule("visual"), features=features, preprocess=preprocess, name=name, head=head)
        self.text = _without_visual(clip)
        self.tokenizer = tokenizer
        self._why_no_text = ""

    def encode_text(self, texts: Sequence[str], batch_size: int = BATCH) -> Tensor:
        """Texts → float32 (texts, features), before normalisation, on the encoder's device, without gradient.

        Args:
            texts: captions; what is longer than the context is cut by the tokenizer.
            batch_size: texts at a time.

        Raises:
            EncoderError: the text tower was not in the checkpoint, or knows fewer tokens than the tokenizer.
            ValueError: one string instead of a list, or a batch size below 1.
        """
        if isinstance(texts, str):
            raise ValueError(f"expected a list of texts, got one string: [{texts!r}]?")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        tower: Any = self.text
        if tower is None:
            raise EncoderError(self._textless(self._why_no_text))
        device = next(tower.parameters()).device
        vocabulary = getattr(getattr(tower, "text", tower), "vocab_size", None)
        parts = [torch.empty(0, self.features, device=device)]
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(list(texts[start : start + batch_size]))
            if vocabulary is not None and int(tokens.max()) >= vocabulary:
                raise EncoderError(
                    f"the tokenizer of {self.name} gives tokens up to {int(tokens.max())}, its text tower knows {vocabulary}: "
                    "set vocab_size in the model's configuration to the tokenizer's"
                )
            with torch.no_grad():
                parts.append(tower.encode_text(tokens.to(device), normalize=False).float())
        return torch.cat(parts)

    def zero_shot_head(
        self,
        classnames: Sequence[str] | None = None,
        templates: Sequence[Template] | None = None,
        *,
        batch_size: int = BATCH,
        progress: CountCallback | None = None,
    ) -> Head:
        """The head whose rows are class embeddings: every caption of a class embedded, normalised, averaged, normalised again.

        This is the classifier of Radford et al. 2021, section 3.1.4.

        Args:
            classnames: one per class, in order; those of ImageNet's 1000 classes as OpenAI and open_clip have them when None.
            templates: strings with ``{}`` for the class name, or functions of it; OpenAI's 80 for ImageNet when None.
            batch_size: captions at a time.
            progress: told (classes done, classes in all) after every batch.

        Returns:
            A head without bias, ``normalize=True``, rows of length 1, float32, named as the classes, on the encoder's device.

        Raises:
            EncoderError: as for :meth:`encode_text`, or embeddings that are not finite.
            ValueError: no classes, no templates, one string instead of a list, or a template without ``{}``.
        """
        if classnames is None:
            classnames = package("open_clip").IMAGENET_CLASSNAMES
        if templates is None:
            templates = package("open_clip").OPENAI_IMAGENET_TEMPLATES
        names = _several("classnames", classnames)
        captions = [_caption(template) for template in _several("templates", templates)]
        rows: list[Tensor] = []
        step = max(1, batch_size // len(captions))
        for start in range(0, len(names), step):
            part = names[start : start + step]
            embedded = self.encode_text([caption(name) for name in part for caption in captions], batch_size)
            means = functional.normalize(embedded, dim=-1).unflatten(0, (len(part), len(captions))).mean(1)
            rows.append(functional.normalize(means, dim=-1))
            if progress:
                progress(start + len(part), len(names))
        weight = torch.cat(rows)
        if not weight.isfinite().all():
            bad = [names[i] for i in (~weight.isfinite().all(1)).nonzero().flatten().tolist()]
            raise EncoderError(f"the text tower of {self.name} gives values that are not finite for {len(bad)} classes: {some(bad)}")
        return Head(weight, normalize=True, names=names)

    def fill_text(self, weights: Mapping[str, Tensor], where: str | os.PathLike[str]) -> None:
        """Fills the text tower from the weights of a whole CLIP model.

        Where they are not all there, as in a file of the image tower or one that was fine-tuned without the text, there is
        no text tower afterwards, and what asks for it says why.

        Args:
            weights: named as within the CLIP model, without a prefix.
            where: the file, for messages.
        """
        assert self.text is not None
        expected = {key: value for key, value in self.text.state_dict().items() if key not in _LOGIT_SCALING}
        if "text_projection" in weights and "text_projection" not in expected:  # a custom text tower, saved before there were any
            weights = importlib.import_module("open_clip.model").convert_to_custom_text_state_dict(dict(weights))
        wrong = [key for key, value in expected.items() if key not in weights or weights[key].shape != value.shape]
        if wrong:
            what = "it" if len(wrong) == len(expected) else f"{len(wrong)} of its {len(expected)} keys ({some(wrong, 3)})"
            self.text = None
            self._why_no_text = (
                f"because {where} lacks {what}: give a checkpoint of the whole CLIP model, or take a head that was saved (load_head)"
            )
            return
        fitting = {key: value for key, value in weights.items() if key in expected}
        scaling = {
            key: weights[key].reshape(value.shape)
            for key, value in self.text.named_parameters()
            if key in _LOGIT_SCALING and key in weights
        }
        self.text.load_state_dict(fitting | scaling, strict=False)


class OpenClipTokenizer:
    """The tokenizer of an open_clip model, made when it is first needed: some are fetched.

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
        with making(f"open_clip:{self.model} (its tokenizer)", fetching=True):
            return package("open_clip").get_tokenizer(self.model)


def _without_visual(clip: nn.Module) -> nn.Module:
    """The same module, sharing all weights, but without its image tower."""
    text = copy.copy(clip)
    text._modules = {name: module for name, module in clip._modules.items() if name != "visual"}
    return text


def _several(what: str, items: Sequence[Any] | None) -> list[Any]:
    if isinstance(items, str) or not items:
        raise ValueError(f"{what}: expected a list with at least one entry, got {items!r}")
    return list(items)


def _caption(template: Template) -> Callable[[str], str]:
    if callable(template):
        return template
    if "{}" not in template:
        raise ValueError(f"a template has {{}} where the class name goes, got {template!r}")
    return functools.partial(template.replace, "{}")
