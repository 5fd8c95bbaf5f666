"""The source ``hf:``: models of transformers, from the hub or from a folder."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.common.messages import listing
from torchprobe.encoders.checkpoint import split_prefix
from torchprobe.encoders.clip import ClipEncoder
from torchprobe.encoders.encoder import Built, Encoder
from torchprobe.encoders.errors import EncoderError, library_errors, package, without_bars
from torchprobe.encoders.head import trained_head
from torchprobe.encoders.outputs import available, represent
from torchprobe.encoders.sources.hugging_face_modules import ImagePreprocess, ImageTower, LazyTokenizer, TwoTowers, unpacked_patches
from torchprobe.encoders.sources.hugging_face_probes import (
    is_causal,
    output_of,
    probing,
    require_masked_padding,
    see_all_patches,
    unpack_patches,
)
from torchprobe.encoders.text import TextEncoder

_MOST_SPECIAL = 64
"""The most class and register tokens that are looked for."""

_UNUSED = ("position_ids", ".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
"""Parts of keys of older files that networks compute themselves now."""

_OWN_CLASSES = ("ModelWithProjection", "EncoderModel")
"""Endings of the classes that hold another part of a model than ``AutoModel`` makes, such as the encoder of T5 alone."""

_AFTER_PADDING = ("roberta", "altclip", "camembert", "mpnet", "longformer", "xmod")
"""Kinds of models that count positions from the one after that of the padding token, so that fewer fit."""


def from_hugging_face(name: str, model: str, pretrained: bool) -> Built:
    """The source ``hf:``; see :data:`torchprobe.encoders.sources.SOURCES`.

    Code that comes with a model is never run, and weights are read as safetensors or with ``weights_only=True``.
    """
    package("transformers", extra="transformers")
    place = os.path.expanduser(model)
    local = os.path.isdir(place)
    if not local and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise EncoderError(f"{name}: no folder at {place}")
    return _Source(name, place if local else model, local, pretrained).build()


class _Source:
    """One model: its configuration, its network with the weights, its processor and its tokenizer."""

    def __init__(self, name: str, place: str, local: bool, pretrained: bool) -> None:
        self.name, self.place, self.pretrained = name, place, pretrained
        self.options = {"local_files_only": local, "trust_remote_code": False}
        self.fetching = not local
        self.transformers: Any = package("transformers", extra="transformers")
        with library_errors(name, fetching=self.fetching):
            self.config: Any = self.transformers.AutoConfig.from_pretrained(place, **self.options)
        self.architecture = str((getattr(self.config, "architectures", None) or [""])[0])
        self.missing: set[str] = set()

    def build(self) -> Built:
        """The encoder that the model is."""
        classifier = None
        if self.architecture.endswith("ForImageClassification"):
            classifier = self._network(self.transformers.AutoModelForImageClassification)
            base = _base(classifier)
            if not base:
                raise EncoderError(f"{self.name}: {self.architecture} has no part without its classification layer")
            network: nn.Module = classifier.get_submodule(base)
        elif self.architecture.endswith(_OWN_CLASSES) and hasattr(self.transformers, self.architecture):
            network = self._network(getattr(self.transformers, self.architecture))
        else:
            network = self._network(self.transformers.AutoModel)
        if hasattr(network, "get_image_features") and hasattr(network, "get_text_features"):
            return self._two_towers(network)
        main = getattr(network, "main_input_name", "")
        if main == "input_ids" and not hasattr(self.config, "vision_config"):
            return self._text(network)
        if main == "pixel_values":
            return self._images(network, classifier)
        raise EncoderError(f"{self.name} ({type(network).__name__}) is neither an encoder of images nor one of texts")

    def _network(self, kind: Any) -> nn.Module:
        """The network in float32 and eval mode. ``missing``: the keys that its files lack."""
        with library_errors(self.name, fetching=self.fetching and self.pretrained), without_bars():
            if not self.pretrained:
                auto = hasattr(kind, "from_config")
                network: nn.Module = kind.from_config(self.config) if auto else kind(self.config)
            else:
                network, info = kind.from_pretrained(self.place, output_loading_info=True, weights_only=True, **self.options)
                self.missing = set(info["missing_keys"])
        if self.missing and getattr(network, "pooler", None) is not None and all(key.startswith("pooler.") for key in self.missing):
            network.pooler = None  # type: ignore[assignment]  # of random weights: saved without it, as by a model for another task
            self.missing = set()
        return network.float().eval()

    # -- images ----------------------------------------------------------------------------------------------------------

    def _images(self, network: nn.Module, classifier: nn.Module | None) -> Built:
        self._complete(self.missing)
        if getattr(self.config, "num_detection_tokens", 0):
            raise EncoderError(
                f"{self.name} is a detector: its tokens of objects follow its patches, and a mean would take them for patches"
            )
        if self.config.model_type == "vit_mae":
            see_all_patches(network)
        preprocess = self._preprocess()
        pixels = _example(preprocess)
        if pixels.dim() == 3:
            unpack_patches(network)
        output = output_of(self.name, network, pixels)
        seen = None if classifier is None else _seen(self.name, classifier, pixels)
        special = _special_tokens(output, pixels, getattr(network, "config", self.config))
        choices = _choices(output, special, pixels)
        layer = None if classifier is None else _last_linear(classifier)
        sees = None if seen is None else next((way for way in choices if torch.equal(represent(output, way, special=special), seen)), None)
        way = sees or self._default(choices)
        names = _class_names(self.config)
        head = trained_head(layer, choices[way], names) if layer is not None and sees and self.pretrained else None
        encoder = Encoder(
            network,
            features=choices[way],
            preprocess=preprocess,
            name=self.name,
            head=head,
            representation=way,
            choices=choices,
            special_tokens=special,
        )
        whole = network if classifier is None else classifier
        prefix = "" if classifier is None else f"{_base(classifier)}."
        outside = tuple(key for key in whole.state_dict() if not key.startswith(prefix)) if prefix else ()
        return Built(encoder, outside, names, _Names(whole, "visual", (prefix,), encoder=encoder), finds_heads=sees is not None)

    def _two_towers(self, model: nn.Module) -> Built:
        vision = {key for key in self.missing if key.startswith(("vision_model.", "image_model."))}
        self._complete(vision)
        preprocess = self._preprocess()
        pixels = _example(preprocess)
        siglip = str(self.config.model_type).startswith("siglip")
        clip = None if self.missing else self._joint(model, siglip)
        # Without: a model for another task, such as the captions of BLIP. Its image tower is whole, its other parts are not.
        tower: nn.Module = ImageTower(model, projects=False) if clip is None else clip.visual
        output = output_of(self.name, tower, pixels)
        parts = (getattr(self.config, part, None) for part in ("vision_config", "image_config"))
        special = _special_tokens(output, pixels, next((part for part in parts if part is not None), self.config))
        choices = _choices(output, special, pixels)
        way = self._default(choices)
        about: dict[str, Any] = {"features": choices[way], "preprocess": preprocess, "name": self.name, "representation": way}
        about |= {"choices": choices, "special_tokens": special}
        rename = _Names(model, "visual", tuple(f"{part}." for part, _ in tower.named_children()), strip=False)
        if clip is None:
            return Built(Encoder(tower, **about), tuple(key for key in model.state_dict()), None, rename, finds_heads=False)
        encoder = ClipEncoder(clip, self._tokenizer(self.config.get_text_config(), fixed=siglip), **about)
        return Built(encoder, (), None, rename)

    def _joint(self, model: nn.Module, siglip: bool) -> TwoTowers | None:
        """Both towers; None if texts have no vector in the space of images, as in BLIP-2, where they go on to a language model."""
        clip, config = TwoTowers(model, takes_masks=not siglip), self.config.get_text_config()
        ids = torch.tensor([[0, 1, 2]])
        with probing(self.name), torch.no_grad():
            h: Tensor | None = clip.encode_text({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        if h is None:
            return None
        if not siglip:
            require_masked_padding(self.name, model, config, lambda tokens: clip.encode_text(tokens)[:, None])
        return clip

    def _preprocess(self) -> ImagePreprocess:
        with library_errors(f"{self.name} (its image processor)", fetching=self.fetching):
            return ImagePreprocess(self.transformers.AutoImageProcessor.from_pretrained(self.place, **self.options))

    # -- texts -----------------------------------------------------------------------------------------------------------

    def _text(self, network: nn.Module) -> Built:
        self._complete(self.missing)
        if getattr(self.config, "is_encoder_decoder", False):
            network = network.get_encoder()  # type: ignore[operator]
        tokenizer = self._tokenizer(self.config, fixed=False)
        ids = torch.tensor([[1, 1]])
        with probing(self.name), torch.no_grad():
            causal = is_causal(network)
            output = network(input_ids=ids, attention_mask=torch.ones_like(ids))
        choices = {way: int(represent(output, way).shape[-1]) for way in available(output)}
        ways = ("projection", "last" if causal else "mean", "pooler")
        way = next((way for way in ways if way in choices), "")
        if not way:
            raise EncoderError(f"{self.name} ({type(network).__name__}) gives no vector of a text, but {', '.join(output)}")
        if "mean" in choices:
            require_masked_padding(self.name, network, self.config, lambda tokens: network(**tokens).last_hidden_state)
        encoder = TextEncoder(network, tokenizer, features=choices[way], name=self.name, representation=way, choices=choices)
        return Built(encoder, (), None, _Names(network, "text", encoder=encoder), finds_heads=False)

    def _tokenizer(self, config: Any, fixed: bool) -> LazyTokenizer:
        def load() -> Any:
            with library_errors(f"{self.name} (its tokenizer)", fetching=self.fetching):
                return self.transformers.AutoTokenizer.from_pretrained(self.place, **self.options)

        length = getattr(config, "max_position_embeddings", None)
        if length is not None and length < 1:  # that of XLNet is -1: there is none
            length = None
        if length is not None and any(kind in str(config.model_type) for kind in _AFTER_PADDING):
            length -= int(config.pad_token_id or 0) + 1
        return LazyTokenizer(load, fixed, length)

    def _default(self, choices: Mapping[str, int]) -> str:
        return next(way for way in ("projection", "pooler", "class", "mean") if way in choices)

    def _complete(self, missing: set[str]) -> None:
        """Refuses weights that are not complete: the library would fill in random ones.

        Raises:
            EncoderError: names the missing keys.
        """
        if missing:
            raise EncoderError(
                f"the weights of {self.name} lack {len(missing)} keys of {self.architecture or 'the model'}: {listing(sorted(missing))}; "
                "transformers would fill them in at random"
            )


def _example(preprocess: ImagePreprocess) -> Tensor:
    from PIL import Image

    ramp = Image.linear_gradient("L")
    return preprocess(Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180))))[None]


def _base(classifier: nn.Module) -> str:
    """The name of the part of a classifier that is the network without its classification layer; empty if there is none."""
    names = (str(classifier.base_model_prefix), "vision_model")  # CLIP's and SigLIP's classifiers have the tower of images alone
    return next((name for name in names if isinstance(getattr(classifier, name, None), nn.Module)), "")


def _seen(name: str, classifier: nn.Module, pixels: Tensor) -> Tensor | None:
    """What the last linear layer of a classifier sees."""
    seen: list[Tensor] = []
    if (layer := _last_linear(classifier)) is not None:
        handle = layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        try:
            with probing(name), torch.no_grad():
                classifier(**unpacked_patches(pixels)) if pixels.dim() == 3 else classifier(pixels)
        finally:
            handle.remove()
    return seen[0] if seen else None


def _last_linear(classifier: nn.Module) -> nn.Linear | None:
    """The classification layer: the only linear layer outside the base model."""
    prefix = f"{_base(classifier)}."
    outside = [part for path, part in classifier.named_modules() if isinstance(part, nn.Linear) and not path.startswith(prefix)]
    return outside[0] if len(outside) == 1 else None


def _special_tokens(output: Any, pixels: Tensor, config: Any) -> int:
    """How many positions at the start are not patches; 0 if their number does not fit, as in networks of several stages."""
    tokens = output.get("last_hidden_state")
    stages = getattr(config, "strides", None)  # of the networks of several stages that have a class token at the last one
    patch = getattr(config, "patch_size", math.prod(stages) if isinstance(stages, (list, tuple)) else None)
    if tokens is None or tokens.dim() != 3 or patch is None or pixels.dim() != 4:
        return 0
    height, width = (patch, patch) if isinstance(patch, int) else patch
    extra = int(tokens.shape[1]) - (pixels.shape[-2] // height) * (pixels.shape[-1] // width)
    return extra if 0 <= extra <= _MOST_SPECIAL else 0


def _choices(output: Any, special: int, pixels: Tensor) -> dict[str, int]:
    """The representations of images → their widths. Without special tokens there is no class token; the last patch is not one of them.

    Patches of a free aspect ratio have no mean, since some of them are padding.
    """
    ways = [way for way in available(output, class_token=special > 0) if way != "last"]
    if pixels.dim() == 3:
        ways = [way for way in ways if way in ("projection", "pooler")]
    found = {way: represent(output, way, special=special) for way in ways}
    return {way: int(h.shape[-1]) for way, h in found.items() if h.dim() == 2}


def _class_names(config: Any) -> list[str] | None:
    """The names of the classes, unless they are the library's numbers."""
    labels = getattr(config, "id2label", None) or {}
    names = [str(labels[index]) for index in sorted(labels)]
    return None if not names or all(name.startswith("LABEL_") for name in names) else names


def _without_pooler(encoder: Encoder) -> None:
    """Takes the pooler out of a network. If its output was the representation, this is the class token or the mean now."""
    encoder.network.pooler = None  # type: ignore[assignment]
    encoder.choices.pop("pooler", None)
    if encoder.representation == "pooler":
        encoder.choose(next(way for way in ("class", "mean") if way in encoder.choices))


@dataclass(frozen=True)
class _Names:
    """Where the keys of a checkpoint of ``model`` go in the encoder.

    Args:
        model: whose keys the checkpoint has, after any prefix, or that transformers itself can convert it for.
        tower: the name of the network in the encoder.
        base: what the keys of the network begin with in the model.
        strip: whether the network's own keys lack this beginning.
        encoder: loses the pooler if the checkpoint lacks it, as that of a model for another task does.
    """

    model: nn.Module
    tower: str
    base: tuple[str, ...] = ("",)
    strip: bool = True
    encoder: Encoder | None = None

    def __call__(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors under the names of the encoder. Those of the network that it does not have stay, so that they are named as such."""
        expected = self.model.state_dict()
        inside, outside = split_prefix(weights, expected)
        if not expected.keys() <= inside.keys():
            inside, outside = self._converted(weights, inside, outside)
        if self.encoder is not None and (lacking := expected.keys() - inside.keys()) and all(key.startswith("pooler.") for key in lacking):
            _without_pooler(self.encoder)
        unused = _UNUSED if any(key.startswith("pooler.") for key in expected) else (*_UNUSED, "pooler.")
        return outside | {
            self._place(key): value
            for key, value in inside.items()
            if key in expected or not any(part in f".{key}" or key.startswith(part) for part in unused)
        }

    def _place(self, key: str) -> str:
        start = next((start for start in self.base if key.startswith(start)), None)
        if start is None:
            return key
        return f"{self.tower}.{key[len(start) :] if self.strip else key}"

    def _converted(
        self, weights: dict[str, Tensor], inside: dict[str, Tensor], outside: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors with the renaming of ``from_pretrained``; as they were if it cannot use more of them."""
        kind: Any = type(self.model)
        try:
            with without_bars():
                loaded, info = kind.from_pretrained(
                    None, config=self.model.config, state_dict=dict(weights), output_loading_info=True, ignore_mismatched_sizes=True
                )
        except Exception:  # then the keys that do not fit are named as they are
            return inside, outside
        wrong = {entry[0] for entry in info["mismatched_keys"]} | set(info["missing_keys"])
        usable = {key: value for key, value in loaded.state_dict().items() if key not in wrong}
        if len(usable) <= len(inside.keys() & self.model.state_dict().keys()):
            return inside, outside
        parts = {key.partition(".")[0] for key in usable}
        rest = {key: weights.get(key, torch.empty(0)) for key in info["unexpected_keys"]}  # it may have renamed them too
        own = {key: value for key, value in rest.items() if key.partition(".")[0] in parts}
        return usable | own, {key: value for key, value in rest.items() if key not in own}
