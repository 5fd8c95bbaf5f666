"""Bases in files: directions, and sparse autoencoders under the names that libraries give to their parts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprobe.common.arrays import open_arrays
from torchprobe.common.messages import listing
from torchprobe.common.reading import read_json
from torchprobe.common.storage import digest
from torchprobe.dissection.sparse import SparseBasis, SparseEncoder
from torchprobe.encoders.checkpoint import read_checkpoint
from torchprobe.encoders.errors import EncoderError

_ROWS = ("encoder.weight",)  # (latents, features), as in nn.Linear
_COLUMNS = ("W_enc", "w_enc")  # (features, latents)
_BIAS = ("b_enc", "encoder.bias")
_CENTER = ("b_dec", "bias", "decoder.bias")
_DECODER = {"W_dec": 1, "w_dec": 1, "decoder.weight": 0}  # key → the dimension of the features
_GATED = ("W_gate", "b_gate", "r_mag", "b_mag", "gate_bias", "mag_bias")
_IGNORED = ("num_batches_not_active", "scaling_factor")  # do not change the latents
_KNOWN = {*_ROWS, *_COLUMNS, *_BIAS, *_CENTER, *_DECODER, *_IGNORED, "threshold", "k"}
_UNSUPPORTED = ("gated", "groupmax", "abstopk", "tanh", "matchingpursuit", "temporal")

ACTIVATIONS = ("relu", "jumprelu", "topk")


def read_basis(path: str | os.PathLike[str], **options: Any) -> Tensor | SparseBasis:
    """Directions or latents from a file: ``.safetensors``, a PyTorch checkpoint without code, ``.npz`` or ``.npy``.

    A ``.npy`` matrix, or a file with one matrix, holds directions (k, features). A file with the parts of a sparse autoencoder is read by
    :func:`sparse_basis`, with what a ``cfg.json`` or ``config.json`` next to it says about the activation.

    Args:
        path: the file.
        options: for :func:`sparse_basis`.

    Raises:
        EncoderError: the file cannot be read, or it is neither.
        ValueError: the parts do not fit together; the message names the file.
    """
    path = Path(path)
    found = _arrays(path) if path.suffix in (".npy", ".npz") else read_checkpoint(path)
    matrices = [key for key, value in found.items() if value.dim() == 2]
    if len(found) == 1 and matrices:
        if options:
            raise EncoderError(f"{path} holds directions, which have no {', '.join(options)}")
        return found[matrices[0]].float()
    try:
        return sparse_basis(found, name=path.name, config=_config(path), **options)
    except (EncoderError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def sparse_basis(
    weights: Mapping[str, Tensor],
    *,
    activation: str | None = None,
    top_k: int | None = None,
    subtract_center: bool | None = None,
    name: str = "sparse autoencoder",
    config: Mapping[str, Any] | None = None,
) -> SparseBasis:
    """The encoder of a sparse autoencoder from its weights, as SAELens, dictionary_learning, sparsify and Gemma Scope name them.

    Args:
        weights: name → tensor: ``W_enc`` (features, latents) or ``encoder.weight`` (latents, features); ``b_enc`` or ``encoder.bias``;
            ``b_dec``, ``bias`` or ``decoder.bias``; ``threshold``; ``k``; and the decoder.
        activation: "relu", "jumprelu" or "topk". Default: what ``config`` says; else top-k if ``k`` is known, JumpReLU if there are
            thresholds, and ReLU otherwise.
        top_k: latents that may be active in one vector. Default: that of the file or of ``config``.
        subtract_center: whether the bias of the decoder is subtracted from the features. Default: what ``config`` says; else no for
            thresholds of each latent (Gemma Scope, JumpReLU of dictionary_learning) and for ``decoder.bias``, and yes otherwise.
        name: for metadata and messages.
        config: the configuration of the autoencoder.

    Raises:
        EncoderError: no encoder among the weights, or weights of unknown use; a gated encoder; activations that the library scaled; or a
            choice that only you can make.
        ValueError: the parts do not fit together.

    >>> basis = sparse_basis({"W_enc": torch.eye(3), "b_enc": torch.zeros(3), "b_dec": torch.ones(3), "threshold": torch.ones(3)})
    >>> basis.facts["activation"], basis.facts["subtract_center"]
    ('jumprelu', False)
    """
    config = dict(config or {})
    if gated := [key for key in _GATED if key in weights]:
        raise EncoderError(f"a gated encoder ({gated[0]}) cannot be read from its weights: give the module itself as basis=")
    weight = _first(weights, _ROWS)
    if weight is None:
        columns = _first(weights, _COLUMNS)
        if columns is None or columns.dim() != 2:
            raise EncoderError(f"no encoder, which is called {_COLUMNS[0]} or {_ROWS[0]}; it has {listing(sorted(weights)) or 'nothing'}")
        bias = _first(weights, _BIAS)
        turned = bias is not None and len(bias) == columns.shape[0] != columns.shape[1]  # some keep it as rows
        weight = columns if turned else columns.T
    if unknown := sorted(weights.keys() - _KNOWN):
        raise EncoderError(f"it is unknown what {listing(unknown)} does to the latents: leave it out, or give the module itself as basis=")
    bias, center, threshold = _first(weights, _BIAS), _first(weights, _CENTER), weights.get("threshold")
    scaling = config.get("normalize_activations", "none")
    if scaling not in (None, "none"):
        raise EncoderError(f"its activations are scaled before it ({scaling}): fold the scale into the weights, or give a module as basis=")
    if config.get("rescale_acts_by_decoder_norm"):
        norms = _decoder_norms(weights, weight)
        weight, bias = weight * norms[:, None], None if bias is None else bias * norms
    k = top_k if top_k is not None else _count(weights.get("k"), config)
    kind = activation or _activation(threshold, k, config)
    if kind not in ACTIVATIONS:
        raise EncoderError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")
    if kind == "topk" and k is None:
        raise EncoderError('how many latents may be active is not in the file: give top_k=, or "k" in a cfg.json next to it')
    if kind == "jumprelu" and threshold is None:
        raise EncoderError("it has no threshold for JumpReLU")
    if subtract_center is None:
        # One threshold for all latents is that of batch top-k, whose encoders subtract.
        each = kind == "jumprelu" and threshold is not None and threshold.numel() > 1
        subtract_center = bool(config.get("apply_b_dec_to_input", not each and not weights.keys().isdisjoint(_CENTER[:2])))
    encoder = SparseEncoder(
        weight, bias, center if subtract_center else None, threshold if kind == "jumprelu" else None, k if kind == "topk" else None
    )
    facts = {"name": name, "activation": kind, "top_k": encoder.top_k, "subtract_center": subtract_center and center is not None}
    return SparseBasis(encoder, name, {**facts, "weights": digest(encoder.buffers())})


def _activation(threshold: Tensor | None, k: int | None, config: Mapping[str, Any]) -> str:
    keys = ("architecture", "activation_fn", "activation_fn_str", "activation", "dict_class")
    said = " ".join(str(config[key]) for key in keys if config.get(key)).lower()
    if config.get("signed") or any(part in said for part in _UNSUPPORTED):
        raise EncoderError(
            f"an encoder of this kind ({said or 'signed'}) cannot be read from its weights: give the module itself as basis="
        )
    for part, kind in (("batchtopk", "jumprelu"), ("jump", "jumprelu"), ("topk", "topk"), ("relu", "relu"), ("standard", "relu")):
        if part in said and not (kind == "jumprelu" and threshold is None):
            return kind
    useful = threshold is not None and bool((threshold > 0).any())  # −1: never set
    if useful and k is not None:
        raise EncoderError(
            f'it has both k = {k} and thresholds: say which is used, with activation="topk" or activation="jumprelu", or as "architecture" '
            "in a cfg.json next to it"
        )
    return "jumprelu" if useful else "relu" if k is None else "topk"


def _count(stored: Tensor | None, config: Mapping[str, Any]) -> int | None:
    """k, from the weights or from a configuration."""
    if stored is not None and stored.numel() == 1:
        return int(stored)
    nested = config.get("activation_fn_kwargs")
    for value in (config.get("k"), nested.get("k") if isinstance(nested, Mapping) else None):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _decoder_norms(weights: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    for key, dim in _DECODER.items():
        if key in weights and weights[key].dim() == 2 and weights[key].shape[1 - dim] == len(weight):
            norms: Tensor = torch.linalg.vector_norm(weights[key].float(), dim=dim)
            return norms
    raise EncoderError("its latents are scaled by the norms of the decoder, and it has no decoder")


def _first(weights: Mapping[str, Tensor], keys: tuple[str, ...]) -> Tensor | None:
    return next((weights[key] for key in keys if key in weights), None)


def _config(path: Path) -> dict[str, Any]:
    """What ``cfg.json`` or ``config.json`` next to the file says; its ``trainer`` or ``sae`` part too."""
    for name in ("cfg.json", "config.json"):
        if (file := path.with_name(name)).is_file() and file.stat().st_size < 1 << 20:
            try:
                found = read_json(file)
            except (OSError, ValueError) as error:
                raise EncoderError(f"{file} is not JSON: {error}") from error
            if not isinstance(found, dict):
                raise EncoderError(f"{file}: expected a JSON object")
            for part in ("trainer", "sae"):
                if isinstance(found.get(part), dict):
                    found = {**found, **found[part]}
            return found
    return {}


def _arrays(path: Path) -> dict[str, Tensor]:
    try:
        found = {name or "directions": array for name, array in open_arrays(path).items()}
        kept = {name: array for name, array in found.items() if array.kind in ("float", "whole") or array.dtype == "object"}
        return {name: array.tensor().clone() for name, array in kept.items()}  # objects are refused
    except (OSError, ValueError) as error:
        raise EncoderError(f"{path} cannot be read as a NumPy file: {error}") from error
