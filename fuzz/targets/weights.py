"""Checkpoints of weights, heads, and sparse autoencoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fuzz.target import Target, has_checksums, resealed
from torchprobe.dissection.sparse_file import read_basis
from torchprobe.encoders import EncoderError, Head, load_head
from torchprobe.encoders.checkpoint import load_weights, read_checkpoint


def _layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def _checkpoints(folder: Path) -> None:
    from safetensors.torch import save_file

    state = _layer().state_dict()
    torch.save({"epoch": 3, "state_dict": state}, folder / "a.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "a.safetensors")


def _read_checkpoints(folder: Path) -> Any:
    found = []
    for path in sorted(folder.iterdir()):
        layer = _layer()
        found.append(read_checkpoint(path))
        load_weights(layer, path)
        found.append(dict(layer.state_dict()))
    return found


def _heads(folder: Path) -> None:
    layer = _layer()
    Head(layer.weight, layer.bias, normalize=True, names=["a", "b", "c"]).save(folder / "head.safetensors")
    torch.save(layer.state_dict(), folder / "head.pt")


def _read_heads(folder: Path) -> Any:
    heads = [load_head(path, 4) for path in sorted(folder.iterdir())]
    if not has_checksums(folder / "head.safetensors"):
        raise EncoderError("as others write it")
    return [(head.weight, head.bias, head.normalize, head.names, head(torch.ones(1, 4))) for head in heads]


def _sparse(folder: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {
        "W_enc": torch.randn(4, 8),
        "b_enc": torch.randn(8),
        "W_dec": torch.randn(8, 4),
        "b_dec": torch.randn(4),
        "threshold": torch.rand(8),
    }
    save_file(weights, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(
        json.dumps({"architecture": "jumprelu", "k": 2, "activation_fn_kwargs": {"k": 2}, "trainer": {"k": 3}})
    )
    np.save(folder / "directions.npy", np.random.default_rng(0).normal(size=(5, 4)))


def _read_sparse(folder: Path) -> Any:
    basis, directions = read_basis(folder / "sae.safetensors"), read_basis(folder / "directions.npy")
    return basis.facts, directions, basis.encoder(torch.ones(1, 4))


_CHECKPOINTS = {"a.pt": "zip", "old.pt": "raw", "a.safetensors": "safetensors"}
_SPARSE = {"sae.safetensors": "safetensors", "cfg.json": "json", "directions.npy": "npy"}

HEADS = Target(
    "heads",
    {"head.safetensors": "safetensors", "head.pt": "zip"},
    _heads,
    _read_heads,
    (EncoderError,),
    guarded=("head.safetensors",),
)

TARGETS = [
    Target("checkpoints", _CHECKPOINTS, _checkpoints, _read_checkpoints, (EncoderError,)),
    HEADS,
    resealed(HEADS),
    Target("sparse", _SPARSE, _sparse, _read_sparse, (EncoderError, ValueError)),
]
