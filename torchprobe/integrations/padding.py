"""Which tokens of a batch are padding: what the ``attention_mask`` of the batch says."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchprobe.recording import Recorder, RecordingWarning, named_layers

_ONE = torch.ones(1, 1, dtype=torch.bool, device="cpu")
_NO_TARGET = -100  # the label of tokens that a loss leaves out


def token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """The mask of the tokens in the inputs of a forward: bool (batch, tokens), True for tokens that count; None if there is none.

    It is the ``attention_mask`` if there is one for each of the ``input_ids`` or ``inputs_embeds``. Others, such as a mask of samples of a
    sound, or one for each pair of tokens, do not say which tokens of a layer are padding.

    >>> token_mask({"input_ids": torch.tensor([[5, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])})
    tensor([[ True,  True, False]])
    >>> token_mask({"input_ids": torch.tensor([[5, 7, 0]])})
    """
    mask = inputs.get("attention_mask")
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if not isinstance(mask, Tensor) or not isinstance(tokens, Tensor) or mask.dim() != 2 or mask.shape != tokens.shape[:2]:
        return None
    return mask if mask.dtype == torch.bool else mask != 0


def target_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """The mask of the tokens of a decoder: its ``decoder_attention_mask``, or the tokens whose label is not -100."""
    mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask if mask.dtype == torch.bool else mask != 0
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        return labels != _NO_TARGET
    return None


class Padding:
    """Sets the mask of each batch, from its inputs.

    In a model with towers for images or sounds, which have tokens of their own, they count whole. An encoder and a decoder of transformers
    have a mask each.

    Args:
        model: whose layers are recorded; it may be wrapped or compiled.
        recorder: of these layers.
    """

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        root = named_layers(model)[""].module
        self.recorder = recorder
        self.parameters = tuple(inspect.signature(root.forward).parameters)
        self.off = False
        self.before = False  # whether a mask is set
        try:
            with recorder.mask(_ONE):
                pass
        except ValueError as error:
            self._give_up(error)
        if isinstance(model, nn.DataParallel):
            self._give_up("DataParallel divides a batch among threads, which share one mask; DistributedDataParallel has one for each rank")
        encoder, whole = _encoder(root)
        self.own = self._recorded([f"{encoder}.**"] if encoder else _without(root, _towers(root)))
        self.targets = self._recorded([f"{whole}.**" if whole else "**"]) if encoder else []

    def batch(self, inputs: Any) -> None:
        """Sets the mask for the forward of these inputs; a batch without one counts whole. It never raises."""
        if self.off or not isinstance(inputs, Mapping):
            return
        try:
            mask = token_mask(inputs)
            masks = {} if mask is None else dict.fromkeys(self.own, mask)
            if self.targets and (target := target_mask(inputs)) is not None:
                masks.update(dict.fromkeys(self.targets, target))
            if masks or self.before:
                self.recorder.mask(masks or None)
                self.before = bool(masks)
        except Exception as error:  # nested and sparse tensors, and mappings of any kind, may refuse anything
            self._give_up(error)

    def _give_up(self, error: Exception | str) -> None:
        self.off = True
        if self.before:  # otherwise that of an earlier batch would be used for all later ones
            self.recorder.mask(None)
            self.before = False
        warnings.warn(f"torchprobe: padding counts, because its mask cannot be used: {error}", RecordingWarning, stacklevel=4)

    def place(self, called: nn.Module) -> RemovableHandle:
        """Places :meth:`hook` on the module that is called: outside of a compiled graph, which would keep the mask of its first batch."""
        return called.register_forward_pre_hook(self.hook, with_kwargs=True)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same, as a hook before the forward."""
        self.batch(dict(zip(self.parameters, args, strict=False)) | kwargs if args else kwargs)

    def _recorded(self, patterns: list[str]) -> list[str]:
        """Those that match a layer that is recorded; others would be refused."""
        return [pattern for pattern in patterns if self._fits(pattern)]

    def _fits(self, pattern: str) -> bool:
        try:
            with self.recorder.mask({pattern: _ONE}):
                return True
        except ValueError:
            return False


def _encoder(model: nn.Module) -> tuple[str, str]:
    """The names of the encoder of tokens in a model of transformers that has a decoder too, and of that model; empty if there is none."""
    for name, module in model.named_modules():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False) and hasattr(module, "get_encoder"):
            if getattr(module, "main_input_name", "") != "input_ids":  # sounds or images, whose tokens the mask does not know
                return "", ""
            encoder = module.get_encoder()
            return next((inner for inner, one in model.named_modules() if one is encoder), ""), name
    return "", ""


def _towers(model: nn.Module) -> list[str]:
    """The outermost modules of transformers that take something other than tokens."""
    found: list[str] = []
    for name, module in model.named_modules():
        takes = getattr(module, "main_input_name", "input_ids")
        if name and takes != "input_ids" and not any(name.startswith(f"{tower}.") for tower in found):
            found.append(name)
    return found


def _without(model: nn.Module, towers: list[str]) -> list[str]:
    """Globs of all layers but those in the towers."""
    if not towers:
        return ["**"]
    around = {".".join(tower.split(".")[:end]) for tower in towers for end in range(len(tower.split(".")))}
    inside = [
        f"{name}.**"
        for parent in sorted(around)
        for child, _ in model.get_submodule(parent).named_children()
        if (name := f"{parent}.{child}" if parent else child) not in around and name not in towers
    ]
    return [*sorted(around), *inside]
