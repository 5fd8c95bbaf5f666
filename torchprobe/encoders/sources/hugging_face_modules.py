"""Models of transformers in the form that encoders have: an image tower, two towers, an image processor, a tokenizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.encoders.errors import EncoderError
from torchprobe.encoders.text import Tokens

TEXT_PARTS = ("text", "bert")
IMAGE_PARTS = ("vision", "visual", "image")
"""The beginnings of the names of what belongs to one tower of a two-tower model."""

_UNLIMITED = 1 << 30
"""The longest text in tokens where neither network nor tokenizer has a limit. Transformers writes 1e30, which no tokenizer takes."""


class ImageTower(nn.Module):
    """The image tower of a two-tower model: pixels → a dict with ``image_embeds``, as ``get_image_features`` returns it, and the output of
    the vision model before the projection.

    The parts have the names that they have in the model, and share its weights.
    """

    def __init__(self, model: nn.Module, projects: bool = True) -> None:
        super().__init__()
        for name, part in model.named_children():
            if not name.startswith(TEXT_PARTS):
                self.add_module(name, part)
        self.projects = projects
        self.__dict__["shell"] = _shell(model, self)  # not as a module: its parts are those of this one

    @property
    def vision(self) -> nn.Module:
        """The vision model below the projection."""
        return next(part for name, part in self.named_children() if name in ("vision_model", "image_model"))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        output: dict[str, Tensor] = {}

        def keep(module: nn.Module, arguments: Any, found: Any) -> None:
            output.update({key: found[key] for key in ("last_hidden_state", "pooler_output") if found.get(key) is not None})

        inputs = unpacked_patches(pixels) if pixels.dim() == 3 else {"pixel_values": pixels}
        if not self.projects:
            keep(self, None, self.vision(**inputs))
            return output
        handle = self.vision.register_forward_hook(keep)  # the projection gives back one tensor, or overwrites the pooler's output
        try:
            found = self.__dict__["shell"].get_image_features(**inputs)
        finally:
            handle.remove()
        return {"image_embeds": _one_vector(found), **output}


class TwoTowers(nn.Module):
    """A model with ``get_image_features`` and ``get_text_features`` as :class:`torchprobe.encoders.ClipEncoder` takes it.

    Args:
        model: of transformers. Its weights are shared.
        takes_masks: whether the text tower was trained with padding masked. SigLIP was not.
    """

    def __init__(self, model: nn.Module, takes_masks: bool) -> None:
        super().__init__()
        self.visual = ImageTower(model)
        for name, part in model.named_children():
            if not name.startswith(IMAGE_PARTS):
                self.add_module(name, part)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.takes_masks = takes_masks
        self.vocab_size = getattr(model.config.get_text_config(), "vocab_size", None)  # type: ignore[operator, union-attr]
        self.__dict__["shell"] = _shell(model, self)

    def encode_text(self, tokens: Tokens, normalize: bool = False) -> Tensor:
        """Tokens → the projected representation, before normalization."""
        ids, mask = (tokens, None) if isinstance(tokens, Tensor) else (tokens["input_ids"], tokens.get("attention_mask"))
        options = {"attention_mask": mask} if self.takes_masks and mask is not None else {}
        found = self.__dict__["shell"].get_text_features(input_ids=ids, **options)
        h = _one_vector(found)
        return nn.functional.normalize(h, dim=-1) if normalize else h


def _one_vector(found: Any) -> Tensor:
    """The projection of each input. FLAVA projects every position, and its loss compares the first ones, the class tokens."""
    h: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return h[:, 0] if isinstance(h, Tensor) and h.dim() == 3 else h


def _shell(model: nn.Module, tower: nn.Module) -> nn.Module:
    """The model with the parts of a tower alone: for the methods of its class."""
    shell = copy.copy(model)
    shell._modules = {name: tower._modules[name] for name in model._modules if name in tower._modules}
    return shell


class ImagePreprocess:
    """PIL image → tensor, by the image processor of the model.

    The processor of SigLIP 2 for free aspect ratios returns patches with a mask and their grid. They become one tensor
    (patches, values + 3), whose last columns are the mask and the height and width of the grid.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        found = self.processor(images=image, return_tensors="pt")
        pixels: Tensor = found["pixel_values"][0]
        if "spatial_shapes" not in found:
            return pixels
        grid = found["spatial_shapes"][0].to(pixels.dtype).expand(len(pixels), 2)
        return torch.cat([pixels, found["pixel_attention_mask"][0].to(pixels.dtype)[:, None], grid], dim=1)

    def mask(self, inputs: Tensor) -> Tensor | None:
        """Which patches of a batch are not padding, bool (N, patches); None if the inputs are pictures."""
        return inputs[..., -3].bool() if inputs.dim() == 3 else None

    def __repr__(self) -> str:
        return f"ImagePreprocess({' '.join(str(self.processor).split())})"


def unpacked_patches(patches: Tensor) -> dict[str, Tensor]:
    """The arguments of SigLIP 2 in a batch of :class:`ImagePreprocess`, (N, patches, values + 3)."""
    return {
        "pixel_values": patches[..., :-3],
        "pixel_attention_mask": patches[..., -3].long(),
        "spatial_shapes": patches[:, 0, -2:].long(),
    }


class LazyTokenizer:
    """A tokenizer of transformers, loaded at the first call: images alone do not need it.

    Args:
        load: returns it.
        fixed: pad every text to ``length``, as SigLIP was trained.
        length: the longest text that the network takes, in tokens; longer ones are cut.
    """

    def __init__(self, load: Callable[[], Any], fixed: bool, length: int | None) -> None:
        self.load, self.fixed, self.length = load, fixed, length

    def __call__(self, texts: list[str]) -> Mapping[str, Tensor]:
        found = self._tokenizer(
            texts, padding="max_length" if self.fixed else True, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        if not found["input_ids"].shape[1]:
            raise EncoderError("the tokenizer makes no token of an empty text")
        return {key: found[key].long() for key in ("input_ids", "attention_mask") if key in found}

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = self.load()
        if not self.fixed:
            tokenizer.padding_side = "right"  # positions are counted from the left, also by models that generate with padding on the left
        if tokenizer.pad_token is None:  # GPT-2 has none; what it is does not matter, since it is masked
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    @property
    def _longest(self) -> int:
        given = [length for length in (self.length, self._tokenizer.model_max_length) if length is not None]
        return min(*given, _UNLIMITED)

    def __repr__(self) -> str:
        return f"LazyTokenizer(length={self.length})"
