"""Weights from local files. Only tensors are read, and every key that does not fit is named."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from torchprobe.common import limits
from torchprobe.common.deprecation import renamed_arguments
from torchprobe.common.messages import listing, reason
from torchprobe.common.reading import is_file, open_regular
from torchprobe.encoders.errors import EncoderError

_NESTED = ("state_dict", "model_state_dict", "model", "module", "net")
"""The keys under which training scripts store the weights in a checkpoint."""

_ALWAYS = 1 << 26  # bytes: tensors that are together smaller are accepted

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""The parts that compiling and sharding insert into names."""


@renamed_arguments(aside="ignore")
def load_weights(module: nn.Module, checkpoint: str | os.PathLike[str], *, ignore: Iterable[str] = ()) -> None:
    """Loads a local checkpoint into ``module``. The checkpoint must have all keys of the module.

    Args:
        module: receives the weights.
        checkpoint: as for :func:`load_encoder`. The prefix of most of the module's keys is found and removed. Keys without this prefix,
            such as those of a text tower, are ignored.
        ignore: keys that the file may have although the module does not, such as those of the head.

    Raises:
        EncoderError: the file cannot be read; or keys are missing, unexpected or of another shape; or two prefixes fit equally well.
            Nothing is loaded then.

    >>> import tempfile
    >>> file = tempfile.mkdtemp() + "/weights.pt"
    >>> torch.save({"model.visual.weight": torch.ones(1, 2), "model.visual.bias": torch.zeros(1)}, file)
    >>> layer = nn.Linear(2, 1)
    >>> load_weights(layer, file)
    >>> layer.weight.tolist()
    [[1.0, 1.0]]
    """
    load_tensors(module, read_checkpoint(checkpoint), checkpoint, ignore)


def load_tensors(module: nn.Module, found: Mapping[str, Tensor], checkpoint: str | os.PathLike[str], ignore: Iterable[str] = ()) -> str:
    """:func:`load_weights` from the tensors of a checkpoint; returns the prefix of the module's keys."""
    expected = module.state_dict()
    prefix = _prefix(found, expected, checkpoint)
    weights = {key[len(prefix) :]: value for key, value in found.items() if key.startswith(prefix)}
    missing = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in expected and key not in set(ignore)]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{len(keys)} {what}: {listing(keys)}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        where = f" under {prefix!r}" if prefix else ""
        raise EncoderError(
            f"{checkpoint} does not fit {type(module).__name__} ({len(expected)} keys expected, {len(weights)} found"
            f"{where}); {'; '.join(parts)}. Choose the architecture of the file, or remove from the file the keys "
            "that do not belong to the image encoder."
        )
    module.load_state_dict({key: value for key, value in weights.items() if key in expected}, strict=False)
    return prefix


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a PyTorch checkpoint, on the CPU.

    The tensors may be nested, as in ``{"state_dict": …, "epoch": …}``. PyTorch files are read with
    ``weights_only=True``, so no code in them is run.

    Raises:
        EncoderError: the file does not exist, is not a checkpoint, has objects other than tensors, or has no tensors.

    >>> import tempfile
    >>> file = tempfile.mkdtemp() + "/weights.pt"
    >>> torch.save({"epoch": 3, "state_dict": nn.Linear(2, 1).state_dict()}, file)
    >>> list(read_checkpoint(file))
    ['weight', 'bias']
    """
    path = Path(path)
    if not is_file(path):
        raise EncoderError(f"no checkpoint at {path}")
    size = path.stat().st_size
    if why := limits.problem("checkpoint_bytes", size):
        raise EncoderError(f"{path} has {why}")
    if path.suffix == ".safetensors":
        try:
            return _tensors(load_file(path))
        except Exception as error:  # hostile bytes may raise anything in a decoder
            raise EncoderError(f"{path} cannot be read as safetensors: {reason(error)}") from error
    try:
        _require_stored(path, size)
        options = torch.serialization.safe_globals([argparse.Namespace])  # that many training scripts save
        with open_regular(path) as file, options:  # only an archive is read faster by its name
            content = torch.load(path if zipfile.is_zipfile(path) else file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EncoderError(
            f"{path} has objects other than tensors, and loading it could run code, so it was not loaded ({reason(error)}). "
            "If you trust it, save its weights alone: torch.save(model.state_dict(), …) or save_file of safetensors."
        ) from error
    except Exception as error:  # a damaged zip, an empty file, a text file: each raises another exception
        if "TorchScript" in str(error):
            raise EncoderError(
                f"{path} is a TorchScript archive, which contains code, so it was not loaded. If you trust it, save "
                "its weights alone: torch.save(torch.jit.load(path).state_dict(), …)."
            ) from error
        raise EncoderError(f"{path} cannot be read as a PyTorch checkpoint: {reason(error)}") from error
    tensors = _tensors(content)
    for key in _NESTED:
        if not tensors and isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            tensors = _tensors(content[key])
    if not tensors:
        raise EncoderError(
            f"{path} has no state_dict: expected a mapping from names to tensors, at the top or under one of {', '.join(_NESTED)}"
        )
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise EncoderError(f"{path}: {key!r} is not a plain tensor ({tensor.layout}, {tensor.device}): save it as a dense one")
    _require_honest(path, size, tensors)
    return tensors


def _require_stored(path: Path, size: int) -> None:
    """Refuses an archive that says that it unpacks to more than the file holds. PyTorch does not compress its archives.

    Raises:
        ValueError: it does.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if (unpacked := sum(member.file_size for member in archive.infolist())) > size:
            raise ValueError(f"{size:,} bytes unpack to {unpacked:,}: it is compressed, or damaged")


def _require_honest(path: Path, size: int, tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors that are far larger than their file: a tensor may repeat its memory."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > _ALWAYS and (why := limits.problem("checkpoint_ratio", -(-total // max(size, 1)))):
        raise EncoderError(f"{path} has {size:,} bytes, its tensors {total:,}: they repeat their memory, {why}; or save them contiguous")


def split_prefix(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a checkpoint under the prefix of most expected keys, without it; and the others as they are.

    Raises:
        EncoderError: two prefixes fit equally well.

    >>> inside, outside = split_prefix({"model.weight": torch.ones(1), "step": torch.ones(1)}, {"weight": torch.ones(1)})
    >>> list(inside), list(outside)
    (['weight'], ['step'])
    """
    prefix = _prefix(found, expected, "the checkpoint")
    inside = {key[len(prefix) :]: value for key, value in found.items() if key.startswith(prefix)}
    return inside, {key: value for key, value in found.items() if not key.startswith(prefix)}


def _prefix(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | os.PathLike[str]) -> str:
    """The prefix with which most expected keys are found."""
    votes: Counter[str] = Counter()
    for key in found:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in expected:
                votes["".join(f"{part}." for part in parts[:i])] += 1
    ranking = votes.most_common(2)
    if len(ranking) == 2 and ranking[0][1] == ranking[1][1] > len(expected) / 2:
        raise EncoderError(f"{path} has the encoder twice, under {ranking[0][0]!r} and {ranking[1][0]!r}: keep one of them in the file")
    return ranking[0][0] if ranking else ""


def _tensors(content: object) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for wrapper in _WRAPPERS:
        tensors = {key.replace(wrapper, ""): value for key, value in tensors.items()}
    return tensors
