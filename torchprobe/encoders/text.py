"""An encoder of texts: tokens in, representations out, with padding masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchprobe.encoders.encoder import TEXT_BATCH_SIZE, Encoder
from torchprobe.encoders.errors import EncoderError
from torchprobe.encoders.head import Head
from torchprobe.encoders.outputs import AUTO, represent

Tokens = Tensor | Mapping[str, Tensor]
"""Tokens of texts, int64 (texts, context), or a dict with ``input_ids`` and ``attention_mask`` of that shape."""

Tokenizer = Callable[[list[str]], Tokens]
"""A list of texts → their tokens, padded at the end to the longest."""


class TextEncoder(Encoder):
    """An encoder whose inputs are texts. It goes through the same analysis as one of images; its layers are named ``text.…``.

    Args:
        text: the network: ``input_ids`` and ``attention_mask`` → an output with the representation, as in transformers; or a module with
            ``encode_text(tokens, normalize=False)``, as the text tower of a CLIP model.
        tokenizer: a list of texts → int64 tokens (texts, context), or a dict with ``input_ids`` and ``attention_mask``, padded at the end.
        features, name, head, representation, choices, special_tokens: as for :class:`Encoder`. A mean or last position leaves padding out.

    ``preprocess`` makes of one text int64 (2, length): its tokens, and 1 for each that counts. :class:`torchprobe.datasets.Texts` pads
    them to batches.

    >>> class Bag(nn.Module):
    ...     def forward(self, input_ids, attention_mask):
    ...         return {"last_hidden_state": torch.eye(4)[input_ids]}
    >>> def letters(texts):
    ...     width = max(map(len, texts))
    ...     ids = torch.tensor([[ord(c) - 97 for c in text] + [0] * (width - len(text)) for text in texts])
    ...     mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    ...     return {"input_ids": ids, "attention_mask": mask}
    >>> TextEncoder(Bag(), letters, features=4, representation="mean").encode_text(["bbcd", "b"]).tolist()
    [[0.0, 0.5, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]]
    """

    tower: ClassVar[str] = "text"
    inputs: ClassVar[str] = "text"

    def __init__(
        self,
        text: nn.Module,
        tokenizer: Tokenizer,
        *,
        features: int,
        name: str = "encoder",
        head: Head | None = None,
        representation: str = AUTO,
        choices: Mapping[str, int] | None = None,
        special_tokens: int = 0,
    ) -> None:
        super().__init__(
            text,
            features=features,
            preprocess=TextPreprocess(tokenizer, name),
            name=name,
            head=head,
            representation=representation,
            choices=choices,
            special_tokens=special_tokens,
        )
        self.tokenizer = tokenizer

    def forward(self, inputs: Tokens) -> Tensor:
        """Tokens → representations (N, features).

        Args:
            inputs: a dict with ``input_ids`` and ``attention_mask``, int64 (N, length); or both as one tensor (N, 2, length).
        """
        ids, mask = unpacked(inputs)
        network: Any = self.network
        if hasattr(network, "encode_text"):
            return self.checked(network.encode_text(self._as_tokenized(ids, mask), normalize=False))
        output = network(input_ids=ids, attention_mask=mask)
        return self.checked(represent(output, self.representation, special=self.special_tokens, mask=mask.bool()))

    def _as_tokenized(self, ids: Tensor, mask: Tensor) -> Tokens:
        """The tokens in the form that the tokenizer returns and the tower takes."""
        return {"input_ids": ids, "attention_mask": mask} if getattr(self.network, "takes_masks", False) else ids

    def example(self) -> Tensor:
        """A batch of one input: a short text."""
        return self.preprocess("a photo of a cat")[None]

    def mask(self, inputs: Tokens) -> Tensor | None:
        """Which positions of a batch are not padding, bool (N, length)."""
        return unpacked(inputs)[1].bool()

    def for_texts(self) -> TextEncoder:
        """This encoder."""
        return self

    def encode_text(self, texts: Sequence[str], batch_size: int = TEXT_BATCH_SIZE) -> Tensor:
        """Texts → float32 (texts, features) on the encoder's device, without gradient.

        Raises:
            EncoderError: the tokenizer does not belong to the network.
            ValueError: ``texts`` is one string instead of a list, or ``batch_size`` is below 1.
        """
        if isinstance(texts, str):
            raise ValueError(f"expected a list of texts, got one string: [{texts!r}]?")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        device = next((tensor.device for tensor in self.network.parameters()), torch.device("cpu"))
        parts = [torch.empty(0, self.features, device=device)]
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(list(texts[start : start + batch_size]))
            check_vocabulary(self.name, self.network, tokens)
            with torch.no_grad():
                parts.append(self(on_device(tokens, device)).float())
        return torch.cat(parts)


class TextPreprocess:
    """One text → int64 (2, length): its tokens, and which of them count."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name

    def __call__(self, text: Any) -> Tensor:
        if not isinstance(text, str):
            raise TypeError(f"{self.name} encodes texts, got {type(text).__name__}: give texts (--texts FILE)")
        ids, mask = unpacked(self.tokenizer([text]))
        return torch.stack([ids[0], mask[0]])

    def __repr__(self) -> str:
        return f"TextPreprocess({self.tokenizer!r})"


def unpacked(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The ids and the mask of tokens, int64 (N, length) each. Without a mask, all positions up to the last id that is not 0 count.

    >>> unpacked(torch.tensor([[5, 0, 7, 0]]))[1].tolist()
    [[1, 1, 1, 0]]
    """
    if isinstance(tokens, Tensor) and tokens.dim() == 3:
        return tokens[:, 0], tokens[:, 1]
    if isinstance(tokens, Tensor):
        used = tokens.ne(0).long()
        return tokens, used.flip(1).cummax(1).values.flip(1)  # padding is 0 in CLIP, but so is a token within a text
    ids = tokens["input_ids"]
    mask = tokens.get("attention_mask")
    return ids, torch.ones_like(ids) if mask is None else mask


def on_device(tokens: Tokens, device: torch.device) -> Tokens:
    """The same tokens on a device."""
    return tokens.to(device) if isinstance(tokens, Tensor) else {key: value.to(device) for key, value in tokens.items()}


def check_vocabulary(name: str, tower: Any, tokens: Tokens) -> None:
    """Refuses tokens that the text tower does not have.

    Raises:
        EncoderError: the tokenizer returns larger ones.
    """
    vocabulary = getattr(getattr(tower, "text", tower), "vocab_size", None)
    largest = int(unpacked(tokens)[0].max())
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise EncoderError(
            f"the tokenizer of {name} returns tokens up to {largest}, its text tower has {vocabulary}: "
            "set vocab_size in the configuration of the model to the size of the tokenizer"
        )
