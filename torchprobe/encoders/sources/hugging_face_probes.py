"""A model of transformers is run on one small input, to see what it gives: an error becomes a message, and chance or padding is noticed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.common.messages import reason
from torchprobe.encoders.errors import EncoderError
from torchprobe.encoders.sources.hugging_face_modules import unpacked_patches

_TOLERANCE = 1e-3  # of the largest value: far above rounding, far below what a mask of patches or a wrong position changes


@contextlib.contextmanager
def probing(name: str) -> Iterator[None]:
    """Turns an error of the model on a small input into a message.

    Raises:
        EncoderError: the model cannot be run.
    """
    try:
        yield
    except EncoderError:
        raise
    except Exception as error:  # a model of transformers may raise anything
        raise EncoderError(f"{name} cannot be run on one input alone: {reason(error)}") from error


def output_of(name: str, network: nn.Module, pixels: Tensor) -> Any:
    """The output of an image encoder for one picture.

    Raises:
        EncoderError: the model cannot be run, takes videos, or gives another output the second time.
    """
    if pixels.dim() > 4:
        raise EncoderError(
            f"{name} takes several pictures as one input, as of a video {tuple(pixels.shape[1:])}: it is no encoder of images"
        )
    with probing(name), torch.no_grad():
        output, again = network(pixels), network(pixels)
    if not all(_equal(value, again[key]) for key, value in output.items() if isinstance(value, Tensor)):
        raise EncoderError(f"{name} gives another output each time for the same picture: it draws something at random, also in eval mode")
    return output


def see_all_patches(network: nn.Module) -> None:
    """Lets a masked autoencoder see every patch, in order. It hides three quarters of them at random, in eval mode too."""
    embeddings: Any = network.embeddings
    embeddings.random_masking = _all_patches


def unpack_patches(network: nn.Module) -> None:
    """Lets the vision model of SigLIP 2 alone take the batches of ``ImagePreprocess``."""
    network.register_forward_pre_hook(_unpack, with_kwargs=True)


def is_causal(network: nn.Module) -> bool:
    """Whether a language model's positions see only those before them: changing the last token leaves the first output as it is."""
    first = []
    with torch.no_grad():
        for last in (2, 3):
            ids = torch.tensor([[1, last]])
            first.append(network(input_ids=ids, attention_mask=torch.ones_like(ids)).get("last_hidden_state"))
    return first[0] is not None and torch.equal(first[0][:, 0], first[1][:, 0])


def require_masked_padding(name: str, model: nn.Module, config: Any, encode: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
    """Makes sure that the padding of a text is not in its representation.

    Some models compute another attention when nothing is padded; then the attention of PyTorch that takes every mask is tried.

    Args:
        name: of the encoder.
        model: of transformers.
        config: of its text tower.
        encode: ``input_ids`` and ``attention_mask`` → what must not depend on padding, (N, …).

    Raises:
        EncoderError: padding is in it anyway.
    """
    vocabulary = int(getattr(config, "vocab_size", 0) or 8)
    given = (getattr(config, key, None) for key in ("pad_token_id", "eos_token_id"))
    pad, end = (token if isinstance(token, int) and 0 <= token < vocabulary else 0 for token in given)
    words = [i for i in range(min(vocabulary, 8)) if i not in (pad, end)][:3]
    alone = torch.tensor([[*words, end]])
    padded = torch.tensor([[*words, end, pad, pad]])
    mask = torch.tensor([[1] * alone.shape[1] + [0, 0]])

    def leaks() -> bool:
        with probing(name), torch.no_grad():
            one, other = (encode({"input_ids": ids, "attention_mask": mask[:, : ids.shape[1]]}) for ids in (alone, padded))
        return not _equal(one, other[:, : one.shape[1]])

    if leaks():
        with contextlib.suppress(Exception):  # not every model has another attention
            model.set_attn_implementation("eager")  # type: ignore[operator]
        if leaks():
            raise EncoderError(
                f"{name}: the representation of a text depends on its padding, so on the other texts of its batch. "
                "Give a TextEncoder with a tokenizer that pads as the model was trained"
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return one.shape == other.shape
    scale = float(one.abs().nan_to_num().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=_TOLERANCE * scale, equal_nan=True)


def _all_patches(sequence: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The patches, which of them are hidden (none), and how to restore their order."""
    order = torch.arange(sequence.shape[1], device=sequence.device).expand(len(sequence), -1)
    return sequence, torch.zeros_like(order), order


def _unpack(network: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    if "spatial_shapes" in options:  # its classifier has unpacked them already
        return arguments, options
    return (), {**unpacked_patches(arguments[0]), **options}
