"""CLIP models: an encoder with a text tower, and the head made of captions."""

from __future__ import annotations

import copy
import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional

from torchprobe.common.messages import listing
from torchprobe.common.runs import CountCallback
from torchprobe.encoders.encoder import TEXT_BATCH_SIZE, Encoder, Template
from torchprobe.encoders.errors import EncoderError, package
from torchprobe.encoders.head import Head
from torchprobe.encoders.outputs import AUTO
from torchprobe.encoders.text import TextEncoder, check_vocabulary, on_device

_LOGIT_SCALING = ("logit_scale", "logit_bias")
"""Parameters of a CLIP model that do not affect its representations."""

_OPENAI = {"input_resolution", "context_length", "vocab_size"}
"""Numbers that the files of OpenAI store among the weights."""


def _open_clip() -> ModuleType:
    return package("open_clip", pip="open_clip_torch")


class ClipEncoder(Encoder):
    """The image tower of a CLIP model as an :class:`Encoder`, with its text tower.

    The text tower moves with the encoder, but it is not a layer of the encoder: it is not hooked, and it is not in parameter lists or in
    ``state_dict``.

    Args:
        clip: a model of open_clip, or one with the same ``visual`` and ``encode_text(tokens, normalize=False)``. Its
            weights are shared, not copied.
        tokenizer: list of texts → int64 tokens (texts, context), or a dict of such tensors: ``input_ids`` and ``attention_mask``.
        features: the width of the representations of images and texts.
        preprocess, name, representation, choices, special_tokens: as for :class:`Encoder`.
        head: as for :class:`Encoder`, if one was fine-tuned; not the zero-shot head.
    """

    text: nn.Module | None

    companions: ClassVar[tuple[str, ...]] = ("head", "text")
    head_normalizes: ClassVar[bool] = True  # a fine-tuned CLIP model starts from its zero-shot head, which sees unit vectors: our choice

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable[[list[str]], Tensor | Mapping[str, Tensor]],
        *,
        features: int,
        preprocess: Callable[[Any], Tensor],
        name: str = "encoder",
        head: Head | None = None,
        representation: str = AUTO,
        choices: Mapping[str, int] | None = None,
        special_tokens: int = 0,
    ) -> None:
        super().__init__(
            clip.get_submodule("visual"),
            features=features,
            preprocess=preprocess,
            name=name,
            head=head,
            representation=representation,
            choices=choices,
            special_tokens=special_tokens,
        )
        self.text = _without_visual(clip)
        self.text_features = features
        self.tokenizer = tokenizer
        self._why_no_text = ""

    def encode_text(self, texts: Sequence[str], batch_size: int = TEXT_BATCH_SIZE) -> Tensor:
        """Texts → float32 (texts, features), before normalization, on the encoder's device, without gradient.

        Args:
            texts: captions; the tokenizer cuts texts that are longer than the context.
            batch_size: texts in one forward pass.

        Raises:
            EncoderError: the text tower was not in the checkpoint, or it has fewer tokens than the tokenizer.
            ValueError: ``texts`` is one string instead of a list, or ``batch_size`` is below 1.
        """
        if isinstance(texts, str):
            raise ValueError(f"expected a list of texts, got one string: [{texts!r}]?")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        tower: Any = self._tower()
        device = next(tower.parameters()).device
        parts = [torch.empty(0, self.text_features, device=device)]
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(list(texts[start : start + batch_size]))
            check_vocabulary(self.name, tower, tokens)
            with torch.no_grad():
                parts.append(tower.encode_text(on_device(tokens, device), normalize=False).float())
        return torch.cat(parts)

    def for_texts(self) -> TextEncoder:
        """The text tower as an encoder of texts, with the weights of this one. Its layers are named ``text.…``.

        Raises:
            EncoderError: the text tower was not in the checkpoint.
        """
        tower = self._tower()
        return TextEncoder(
            tower, self.tokenizer, features=self.text_features, name=f"{self.name}, text tower", representation="projection"
        ).train(self.training)

    def _tower(self) -> nn.Module:
        if self.text is None:
            raise EncoderError(f"{self.name} has no text tower, {self._why_no_text}")
        return self.text

    def zero_shot_head(
        self,
        classnames: Sequence[str] | None = None,
        templates: Sequence[Template] | None = None,
        *,
        batch_size: int = TEXT_BATCH_SIZE,
        progress: CountCallback | None = None,
    ) -> Head:
        """The head whose rows are the embeddings of the classes.

        Every caption of a class is embedded and normalized; the mean over the captions is normalized again. This is the classifier of
        Radford et al. 2021, section 3.1.4.

        Args:
            classnames: one per class, in order; None: the names of ImageNet's 1000 classes in OpenAI's and open_clip's version.
            templates: strings with ``{}`` for the class name, or functions of the class name; None: OpenAI's 80 for ImageNet.
            batch_size: captions in one forward pass.
            progress: called with (classes done, classes in all) after every batch.

        Returns:
            A float32 head on the encoder's device, without bias, with ``normalize=True``, rows of length 1, and the names of the classes.

        Raises:
            EncoderError: as for :meth:`encode_text`, or the embeddings are not finite, or another representation than the projection was
                chosen.
            ValueError: there are no classes or templates, one string instead of a list, or a template without ``{}``.
        """
        if self.features != self.text_features or self.representation not in (AUTO, "projection"):
            raise EncoderError(f"the {self.representation} of {self.name} has no zero-shot head: captions are compared with the projection")
        if classnames is None:
            classnames = _open_clip().IMAGENET_CLASSNAMES
        if templates is None:
            templates = _open_clip().OPENAI_IMAGENET_TEMPLATES
        names = _nonempty("classnames", classnames)
        captions = [_caption(template) for template in _nonempty("templates", templates)]
        rows: list[Tensor] = []
        step = max(1, batch_size // len(captions))
        for start in range(0, len(names), step):
            part = names[start : start + step]
            embedded = self.encode_text([caption(name) for name in part for caption in captions], batch_size)
            unit = functional.normalize(embedded, dim=-1)
            means = reduce(unit, "(name caption) feature -> name feature", "mean", caption=len(captions))
            rows.append(functional.normalize(means, dim=-1))
            if progress:
                progress(start + len(part), len(names))
        weight = torch.cat(rows)
        if not weight.isfinite().all():
            bad = [names[i] for i in (~weight.isfinite().all(1)).nonzero().flatten().tolist()]
            raise EncoderError(f"the text tower of {self.name} returns values that are not finite for {len(bad)} classes: {listing(bad)}")
        return Head(weight, normalize=True, names=names)

    def load_companions(self, weights: Mapping[str, Tensor], prefix: str, checkpoint: str | os.PathLike[str]) -> set[str]:
        """Loads the text tower from the checkpoint of a whole CLIP model.

        If some of its weights are missing, there is no text tower afterwards, and methods that need it say why. That is so for a file of
        the image tower, and for a model that was fine-tuned without its text tower.

        Raises:
            EncoderError: the file is in OpenAI's format, whose models have QuickGELU, but this model has GELU.
        """
        whole = prefix.removesuffix("visual.")
        clip = {key.removeprefix(whole): value for key, value in weights.items() if key.startswith(whole)} if whole != prefix else {}
        self._check_activation(clip, checkpoint)
        self._load_text(clip, checkpoint)
        return set() if self.text is None else {whole + key for key in self.text.state_dict()}

    def _check_activation(self, clip: Mapping[str, Tensor], checkpoint: str | os.PathLike[str]) -> None:
        """Refuses weights of OpenAI, which were trained with QuickGELU, for a model with GELU: they would load and give wrong results."""
        if not clip.keys() >= _OPENAI:
            return
        quick = importlib.import_module("open_clip.transformer").QuickGELU
        towers = [tower for tower in (self.network, self.text) if tower is not None]
        if not any(isinstance(module, quick) for tower in towers for module in tower.modules()):
            raise EncoderError(
                f"{checkpoint} is in OpenAI's format, whose models have QuickGELU, and {self.name} has GELU: "
                "name the tag (open_clip:…/openai) or the configuration (open_clip:…-quickgelu)"
            )

    def _load_text(self, clip: Mapping[str, Tensor], checkpoint: str | os.PathLike[str]) -> None:
        assert self.text is not None
        expected = {key: value for key, value in self.text.state_dict().items() if key not in _LOGIT_SCALING}
        if "text_projection" in clip and "text_projection" not in expected:  # a custom text tower in the older format
            clip = importlib.import_module("open_clip.model").convert_to_custom_text_state_dict(dict(clip))
        wrong = [key for key, value in expected.items() if key not in clip or clip[key].shape != value.shape]
        if wrong:
            what = "it" if len(wrong) == len(expected) else f"{len(wrong)} of its {len(expected)} keys ({listing(wrong, 3)})"
            self.text = None
            self._why_no_text = (
                f"because {checkpoint} lacks {what}: use a checkpoint of the whole CLIP model, or a head that was saved (load_head)"
            )
            return
        fitting = {key: value for key, value in clip.items() if key in expected}
        scaling = {
            key: clip[key].reshape(value.shape) for key, value in self.text.named_parameters() if key in _LOGIT_SCALING and key in clip
        }
        self.text.load_state_dict(fitting | scaling, strict=False)


def _without_visual(clip: nn.Module) -> nn.Module:
    """The same module without its image tower; all weights are shared."""
    text = copy.copy(clip)
    text._modules = {name: module for name, module in clip._modules.items() if name != "visual"}
    return text


def _nonempty(what: str, items: Sequence[Any] | None) -> list[Any]:
    if isinstance(items, str) or not items:
        raise ValueError(f"{what}: expected a list with at least one entry, got {items!r}")
    return list(items)


def _caption(template: Template) -> Callable[[str], str]:
    if callable(template):
        return template
    if "{}" not in template:
        raise ValueError(f"a template must have {{}} in the place of the class name, got {template!r}")
    return functools.partial(template.replace, "{}")
