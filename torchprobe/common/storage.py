"""Tensors and plain values in safetensors files, and digests of tensors.

Such files contain no code. When they are read, everything is checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchprobe.common.files import replacing

FORMAT = "1"
"""The version of the format, in the metadata of every file."""


def write(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Writes a file. A file of that name is replaced only when everything is on the disk.

    Args:
        path: in an existing folder.
        kind: what the file holds, such as "recording".
        tensors: by name.
        values: plain values that JSON can hold.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be written, for instance because the disk is full.

    >>> import tempfile
    >>> path = tempfile.mkdtemp() + "/a.safetensors"
    >>> write(path, "example", {"x": torch.ones(2)}, {"name": "a"})
    >>> file = File(path, "example")
    >>> file.tensor("x", torch.float32, (None,)).tolist(), file.value("name", str)
    ([1.0, 1.0], 'a')
    """
    if not (folder := Path(path).resolve().parent).is_dir():
        raise FileNotFoundError(f"cannot save to {os.fspath(path)!r}: there is no folder {str(folder)!r}")
    metadata = {"format": FORMAT, "kind": kind, "values": json.dumps(values)}
    on_disk = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, on_disk, metadata)


def save_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all.

    Raises:
        OSError: it cannot be written, for instance because the disk is full. The error of safetensors is not one.
    """
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            if (code := re.search(r"os error (\d+)", str(error))) is None:
                raise
            number = int(code[1])
            raise OSError(number, os.strerror(number), os.fspath(path)) from error


class File:
    """An open file of a certain ``kind``. Every error message names the file.

    Attributes:
        path: of the file.
        keys: the names of the tensors.
        values: the plain values.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a safetensors file, or it is of another kind.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path = os.fspath(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {self.path}")
        try:
            opened: Any = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is not a safetensors file: {error}") from error
        self._file = opened
        metadata: dict[str, str] = self._file.metadata() or {}
        if metadata.get("kind") != kind or metadata.get("format") != FORMAT:
            found = f"kind {metadata.get('kind')!r}, format {metadata.get('format')!r}"
            raise ValueError(f"{self.path} has {found}; expected {kind!r}, format {FORMAT!r}")
        self.keys: tuple[str, ...] = tuple(self._file.keys())
        try:
            self.values: dict[str, Any] = json.loads(metadata.get("values", ""))
        except (ValueError, RecursionError) as error:
            raise self.error("values", f"the metadata is not JSON ({error})") from error
        if not isinstance(self.values, dict):
            raise self.error("values", "expected a JSON object")

    def error(self, key: str, what: str) -> ValueError:
        """The error to raise if the entry ``key`` is wrong."""
        return ValueError(f"{self.path}, {key!r}: {what}")

    def value(self, key: str, kind: type) -> Any:
        """The plain value of that name, which must have the type ``kind``."""
        if not isinstance(value := self.values.get(key), kind):
            raise self.error(key, f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    def tensor(self, key: str, dtype: torch.dtype | None = None, shape: tuple[int | None, ...] | None = None) -> Tensor:
        """The tensor of that name. In ``shape``, None stands for any size. The shape is checked before the tensor is read."""
        if key not in self.keys:
            raise self.error(key, "missing")
        found = tuple(self._file.get_slice(key).get_shape())
        if shape is not None and not _fits(found, shape):
            raise self.error(key, f"expected the shape {shape}, got {found}")
        tensor: Tensor = self._file.get_tensor(key)
        if dtype is not None and tensor.dtype != dtype:
            raise self.error(key, f"expected {dtype}, got {tensor.dtype}")
        return tensor


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(want in (None, have) for have, want in zip(found, wanted, strict=True))


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256, in hexadecimal, of the types, shapes and values of tensors in order. It is the same on every device.

    >>> digest([torch.zeros(2)]) == digest([torch.zeros(2)]), digest([torch.zeros(2)]) == digest([torch.zeros(1, 2)])
    (True, False)
    """
    state = hashlib.sha256()
    for tensor in tensors:
        part = tensor.detach().cpu().contiguous()
        state.update(repr((part.dtype, tuple(part.shape))).encode())
        state.update(part.flatten().view(torch.uint8).numpy().data if part.numel() else b"")
    return state.hexdigest()
