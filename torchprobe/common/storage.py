"""Tensors and plain values in safetensors files, and digests of tensors.

Such files contain no code. When they are read, everything is checked, also against a checksum of each tensor and of the values.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchprobe.common.checked import DamagedError
from torchprobe.common.files import replacing
from torchprobe.common.reading import is_file, parse_json

FORMAT = "2"
"""The version of the format, in the metadata of every file. Files of format 1 have no checksums; they are read, and not resumed."""

EARLIER = "1"
"""The format before."""

_SUMS = "checksums"

_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


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
    save_tensors(path, tensors, {"format": FORMAT, "kind": kind, "values": json.dumps(values)})


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all. To ``metadata`` it adds checksums; see :class:`Checksums`.

    It is not written by the library safetensors, which leaves a file of its own if it is killed, and hides the reason if the disk is full.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
        TypeError: a tensor of a type that has no place in such files.
    """
    parts = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, part in parts.items():
        if part.dtype not in _TYPES:
            raise TypeError(f"{os.fspath(path)}: {name!r} is {part.dtype}, which cannot be saved")
    names = sorted(parts, key=lambda name: (-parts[name].element_size(), name))  # wide types first, so that all are aligned
    sums = {name: checksum(_TYPES[parts[name].dtype], parts[name].shape, [_bytes(parts[name])]) for name in sorted(parts)}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header({name: (_TYPES[parts[name].dtype], parts[name].shape, parts[name].nbytes) for name in names}, metadata, sums))
        for name in names:
            file.write(_bytes(parts[name]))


def header(
    tensors: Mapping[str, tuple[str, Iterable[int], int]], metadata: Mapping[str, str], sums: Mapping[str, int], length: int | None = None
) -> bytes:
    """The beginning of a safetensors file, with checksums.

    Args:
        tensors: name → type, shape and number of bytes, in the order of the file.
        metadata: of the file.
        sums: name → :func:`checksum`.
        length: bytes to fill with spaces; None: the next multiple of 8.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name, (kind, shape, size) in tensors.items():
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    seal = _values_sum(metadata)
    everything = {"__metadata__": {**metadata, _SUMS: json.dumps({"metadata": seal, "tensors": dict(sums)})}, **entries}
    text = json.dumps(everything, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8 if length is None else length - 8)
    return struct.pack("<Q", len(text)) + text


def checksum(kind: str, shape: Iterable[int], pieces: Iterable[Any]) -> int:
    """CRC-32 of the bytes, the type and the shape of a tensor. ``pieces``: its bytes, one after the other."""
    found = 0
    for piece in pieces:
        found = zlib.crc32(piece, found)
    return sealed_sum(found, kind, shape)


def sealed_sum(found: int, kind: str, shape: Iterable[int]) -> int:
    """:func:`checksum`, if the CRC-32 of the bytes is known."""
    return zlib.crc32(f"{kind} {tuple(shape)}".encode(), found)


def _values_sum(metadata: Mapping[str, str]) -> int:
    return zlib.crc32(json.dumps({key: metadata[key] for key in sorted(metadata) if key != _SUMS}).encode())


def _bytes(tensor: Tensor) -> Any:
    return tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b""


class Checksums:
    """The checksums of an open safetensors file.

    Args:
        path: for messages.
        metadata: of the file.
        required: refuse a file without checksums; earlier versions wrote some.
        earlier: the names that metadata of a file without checksums may have. Another one is damage, such as that of "checksums" itself.

    Raises:
        DamagedError: the metadata is not as it was written.
    """

    def __init__(self, path: str, metadata: Mapping[str, str], required: bool = False, earlier: Iterable[str] | None = None) -> None:
        self.path, self.tensors = path, dict[str, Any]()
        self.known = _SUMS in metadata
        if not self.known:
            if required:
                raise DamagedError(f"{path} is damaged: it has no checksums")
            if earlier is not None and (strange := metadata.keys() - {*earlier}):
                raise DamagedError(f"{path} is damaged: it has no checksums, but {min(strange)!r} in its metadata")
            return
        try:
            sums = parse_json(metadata[_SUMS])
            seal, self.tensors = sums["metadata"], dict(sums["tensors"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(f"{path} is damaged: its checksums cannot be read ({error})") from error
        if seal != _values_sum(metadata):
            raise DamagedError(f"{path} is damaged: the checksum of its metadata does not fit")

    def names(self, found: Iterable[str]) -> None:
        """Checks that the file has the tensors that it was written with."""
        if self.known and {*found} != self.tensors.keys():
            raise DamagedError(f"{self.path} is damaged: it has other tensors than it was written with")

    def check(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, which must have its checksum."""
        if self.known and self.tensors.get(name) != checksum(_TYPES.get(tensor.dtype, ""), tensor.shape, [_bytes(tensor.contiguous())]):
            raise DamagedError(f"{self.path} is damaged: the checksum of {name!r} does not fit its content")
        return tensor


class File:
    """An open file of a certain ``kind``. Every error message names the file.

    Attributes:
        path: of the file.
        keys: the names of the tensors.
        values: the plain values.

    Args:
        path: of the file.
        kind: the kind that it must have.
        checked: refuse a file without checksums, as earlier versions wrote them.

    Raises:
        FileNotFoundError: the file does not exist.
        DamagedError: its content is not what was written.
        ValueError: it is not a safetensors file, or it is of another kind.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, checked: bool = False) -> None:
        self.path = os.fspath(path)
        if not is_file(path):
            raise FileNotFoundError(f"no such file: {self.path}")
        try:
            opened: Any = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is not a safetensors file: {error}") from error
        self._file = opened
        metadata: dict[str, str] = self._file.metadata() or {}
        if metadata.get("kind") != kind or metadata.get("format") not in (EARLIER, FORMAT):
            found = f"kind {metadata.get('kind')!r}, format {metadata.get('format')!r}"
            raise ValueError(f"{self.path} has {found}; expected {kind!r}, format {FORMAT!r}")
        self.keys: tuple[str, ...] = tuple(self._file.keys())
        self._sums = Checksums(self.path, metadata, required=checked or metadata["format"] == FORMAT)
        self._sums.names(self.keys)
        try:
            self.values: dict[str, Any] = parse_json(metadata.get("values", ""))
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
        return self._sums.check(key, tensor)


def holds_only_tensors(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file holds tensors, and nothing that this package writes beside them: a checkpoint of weights does.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> path = Path(tempfile.mkdtemp(), "weights.safetensors")
    >>> save_file({"weight": torch.ones(2)}, path, {"format": "pt"})
    >>> holds_only_tensors(path)
    True
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return not {"kind", "settings"} & {*(file.metadata() or {})}
    except (SafetensorError, OSError):
        return False


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
