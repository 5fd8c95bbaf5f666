"""Arrays from NumPy and from files: ``.npy``, ``.npz``, ``.safetensors`` and ``.parquet``, without pickle and within bounds.

Files are not trusted. The header of an array is read first. It says the type and the shape, and what does not fit the size of the file is
refused before memory is used. Arrays that are not compressed stay on the disk and are read when they are used.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchprobe.common.messages import DISTRIBUTION, did_you_mean, listing, reason

SUFFIXES = (".npy", ".npz", ".safetensors", ".parquet")
"""The endings of files that :func:`open_arrays` reads."""

MOST_IN_MEMORY = 1 << 32
"""Bytes of the largest array that is unpacked into memory. A larger one must be in a file that is mapped: ``.npy``, ``.safetensors``."""

_MEMBERS = 10_000  # arrays in one file
_RATIO, _ALWAYS = 100, 1 << 26  # an array above 64 MiB that compression made more than 100 times smaller is refused

Kind = Literal["float", "whole", "text", "other"]


@dataclass(frozen=True)
class Array:
    """One array of a file. Only its header has been read.

    Attributes:
        where: the file and the name in it, for messages.
        shape: its sizes.
        dtype: the name of its type, as the file says it.
        kind: "float", "whole" numbers, "text", or "other".
    """

    where: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    _read: Callable[[], Any]

    def tensor(self) -> Tensor:
        """The numbers, mapped to the file where its format allows it.

        Raises:
            ValueError: it does not hold real numbers, or the file is damaged.
        """
        if self.kind not in ("float", "whole"):
            hint = "; Python objects are code (pickle) and are never read: save numbers, as with .astype(np.float32)"
            raise ValueError(f"{self.where} holds {self.dtype}, not real numbers{hint if self.dtype == 'object' else ''}")
        found = self._read()
        return found if isinstance(found, Tensor) else to_tensor(found, self.where)

    def texts(self) -> list[str]:
        """The text of each element.

        Raises:
            ValueError: it does not hold text in one dimension.
        """
        if self.kind != "text" or len(self.shape) != 1:
            raise ValueError(f"{self.where} holds {self.dtype} {self.shape}, not one text for each row")
        return [str(one) for one in self._read()]


def to_tensor(array: NDArray[Any], where: str = "the array") -> Tensor:
    """A NumPy array as a tensor that shares its memory where PyTorch has the type; otherwise the values are converted.

    Raises:
        ValueError: not real numbers: objects, text, complex numbers, records or times.

    >>> to_tensor(np.arange(3, dtype=">i4")), to_tensor(np.ones(2, np.uint16)).dtype
    (tensor([0, 1, 2], dtype=torch.int32), torch.int32)
    """
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{where} holds {array.dtype}, not real numbers")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.dtype.itemsize == 8 and array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"{where} has the number {int(array.max())}, which does not fit 64 bits with a sign")
        array = array.astype(np.int32 if array.dtype.itemsize == 2 else np.int64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 or stride % array.dtype.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(array)


def open_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """The arrays of a file by name. The one array of a ``.npy`` file has the name "".

    Args:
        path: ``.npy``, ``.npz``, ``.safetensors`` or ``.parquet``. A column of a Parquet file is an array: of numbers or text (n,), or of
            lists of one length (n, d).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, or the file is damaged, or it cannot be read for another reason; the message has it.

    >>> import tempfile
    >>> file = tempfile.mkdtemp() + "/a.npz"
    >>> np.savez(file, h=np.ones((3, 2)), y=np.arange(3))
    >>> {name: (array.shape, array.kind) for name, array in open_arrays(file).items()}
    {'h': ((3, 2), 'float'), 'y': ((3,), 'whole')}
    """
    path = Path(path)
    readers = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        pickled = path.suffix.lower() in (".pt", ".pth", ".pkl", ".pickle", ".bin")
        hint = ". Files with pickle may hold code: save the numbers with np.save or safetensors" if pickled else ""
        raise ValueError(f"{path}: arrays are read from {', '.join(SUFFIXES)}{hint}")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return readers[path.suffix.lower()](path)
    except (OSError, zipfile.BadZipFile, SafetensorError, EOFError, struct.error, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix}: {reason(error)}") from error


def located(text: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """A file and the name of an array in it, from ``FILE`` or ``FILE:NAME``. A file that exists is taken as it is written.

    >>> located("clip.npz:images")
    (PosixPath('clip.npz'), 'images')
    """
    path = Path(text)
    file, colon, name = os.fspath(text).rpartition(":")
    if path.exists() or not colon or not file or Path(file).suffix.lower() not in SUFFIXES:
        return path, None
    return Path(file), name


def choose(arrays: Mapping[str, Array], path: Path, name: str | None, what: str, fits: Callable[[Array], bool]) -> Array:
    """One array of a file: that of the name, or the only one that fits.

    Raises:
        ValueError: there is none of that name; without a name, none fits, or several do.
    """
    held = listing([f"{key or 'one array'}: {array.dtype} {array.shape}" for key, array in arrays.items()]) or "no array"
    if name is not None:
        if name not in arrays:
            raise ValueError(f"{path} has no array {name!r}; it has {held}{did_you_mean(name, arrays)}")
        return arrays[name]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    fitting = [key for key, array in arrays.items() if fits(array)]
    if len(fitting) != 1:
        problem = f"several arrays that may be {what}" if fitting else f"no {what}"
        example = (fitting or list(arrays) or ["h"])[0]
        raise ValueError(f"{path} has {problem}: {held}. Say which with FILE:NAME, such as {path.name}:{example}")
    return arrays[fitting[0]]


# -- NumPy ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype[Any]
    size: int  # bytes of the header

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def kind(self) -> Kind:
        kinds: dict[str, Kind] = {"f": "float", "i": "whole", "u": "whole", "U": "text"}
        return "other" if self.dtype.hasobject else kinds.get(self.dtype.kind, "other")


def _header(stream: IO[bytes], where: str) -> _Header:
    """The header of an array in NumPy's format."""
    try:
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        version = npy.read_magic(stream)
        if version not in readers:
            raise ValueError(f"version {version} of the format; save plain numbers with np.save")
        shape, fortran, dtype = readers[version](stream)
        if any(size < 0 for size in shape):
            raise ValueError(f"the shape {shape}")
    except (ValueError, TypeError, SyntaxError, RecursionError, OverflowError) as error:
        raise ValueError(f"{where} is not an array in NumPy's format: {reason(error)}") from error
    return _Header(shape, "F" if fortran else "C", dtype, stream.tell())


def _mapped(path: Path, header: _Header, start: int) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        if not header.bytes:
            return np.empty(header.shape, header.dtype)
        return np.memmap(path, header.dtype, "c", start, header.shape, header.order)

    return read


def _npy(path: Path) -> dict[str, Array]:
    with path.open("rb") as stream:
        header = _header(stream, str(path))
    if not header.dtype.hasobject and header.size + header.bytes > path.stat().st_size:
        raise ValueError(f"{path} is cut off: {header.dtype} {header.shape} needs {header.bytes:,} bytes")
    return {"": Array(str(path), header.shape, str(header.dtype), header.kind, _mapped(path, header, header.size))}


def _npz(path: Path) -> dict[str, Array]:
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
        members = archive.infolist()
        if len(members) > _MEMBERS:
            raise ValueError(f"{path} has {len(members):,} members, more than {_MEMBERS:,}")
        for member in members:
            name, where = member.filename.removesuffix(".npy"), f"{path}:{member.filename.removesuffix('.npy')}"
            if member.flag_bits & 1:
                raise ValueError(f"{where} is encrypted")
            with archive.open(member) as stream:
                header = _header(stream, where)
            if not header.dtype.hasobject and header.size + header.bytes != member.file_size:
                raise ValueError(
                    f"{where} is damaged: {header.dtype} {header.shape} needs {header.size + header.bytes:,} bytes, "
                    f"the archive says {member.file_size:,}"
                )
            if member.compress_type == zipfile.ZIP_STORED:
                read = _mapped(path, header, _start(raw, member, where) + header.size)
                if not header.dtype.hasobject and _start(raw, member, where) + member.file_size > path.stat().st_size:
                    raise ValueError(f"{where} is cut off")
            else:
                read = _unpacked(path, member, where)
            found[name] = Array(where, header.shape, str(header.dtype), header.kind, read)
    return found


def _start(raw: IO[bytes], member: zipfile.ZipInfo, where: str) -> int:
    """Where the content of a member begins; its local header is in front of it."""
    raw.seek(member.header_offset)
    local = raw.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise ValueError(f"{where} is damaged: there is no header at {member.header_offset}")
    name, extra = struct.unpack("<HH", local[26:])
    return member.header_offset + 30 + int(name) + int(extra)


def _unpacked(path: Path, member: zipfile.ZipInfo, where: str) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        size = member.file_size
        if size > MOST_IN_MEMORY or size > max(_ALWAYS, _RATIO * member.compress_size):
            raise ValueError(
                f"{where} unpacks {member.compress_size:,} bytes to {size:,}, which is refused: save it with np.save or np.savez, "
                "which do not compress"
            )
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
                return np.asarray(npy.read_array(stream, allow_pickle=False))
        except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
            raise ValueError(f"{where} is damaged: {reason(error)}") from error

    return read


# -- safetensors and Parquet ---------------------------------------------------------------------------------------------


def _safetensors(path: Path) -> dict[str, Array]:
    opened: Any = safe_open(os.fspath(path), framework="pt")
    found = {}
    for name in opened.keys():  # noqa: SIM118 – the file is not a mapping
        one = opened.get_slice(name)
        dtype = str(one.get_dtype())
        kind: Kind = "float" if dtype.startswith(("F", "BF")) else "whole" if dtype.startswith(("I", "U")) else "other"
        read = lambda name=name: opened.get_tensor(name)  # noqa: E731
        found[name] = Array(f"{path}:{name}", tuple(one.get_shape()), dtype, kind, read)
    return found


def _parquet(path: Path) -> dict[str, Array]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet files are read with pyarrow, which is not installed: pip install pyarrow, or '{DISTRIBUTION}[parquet]'"
        ) from error
    try:
        file: Any = parquet.ParquetFile(path)
        rows, types = int(file.metadata.num_rows), pyarrow.types
        found = {}
        for column in file.schema_arrow:
            lists = types.is_fixed_size_list(column.type) or types.is_list(column.type) or types.is_large_list(column.type)
            inner = column.type.value_type if lists else column.type
            kind: Kind = (
                "float"
                if types.is_floating(inner)
                else "whole"
                if types.is_integer(inner)
                else "text"
                if types.is_string(inner) or types.is_large_string(inner)
                else "other"
            )
            width = _width(file, column.name) if lists and rows else 0
            shape = (rows, width) if lists else (rows,)
            where = f"{path}:{column.name}"
            found[column.name] = Array(where, shape, str(column.type), kind, _column(path, column.name, shape, where, kind))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as .parquet: {reason(error)}") from error
    return found


def _width(file: Any, column: str) -> int:
    """The length of the first list."""
    first = next(file.iter_batches(batch_size=1, columns=[column])).column(0)
    return len(first[0].values) if first[0].is_valid else 0


def _column(path: Path, name: str, shape: tuple[int, ...], where: str, kind: Kind) -> Callable[[], Any]:
    def read() -> Any:
        import pyarrow
        from pyarrow import parquet

        if 8 * math.prod(shape) > MOST_IN_MEMORY:
            raise ValueError(f"{where} is too large to be read into memory, {shape}: save it with np.save")
        parts: list[Any] = []
        start = 0
        try:
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024, columns=[name]):
                column = batch.column(0)
                if column.null_count:
                    raise ValueError(f"{where} has no value in a row from {start} to {start + len(column) - 1}")
                if kind == "text":
                    parts += column.to_pylist()
                    start += len(column)
                    continue
                values = column.flatten() if len(shape) == 2 else column
                lengths = set(column.value_lengths().to_pylist()) if len(shape) == 2 and hasattr(column, "value_lengths") else set()
                if lengths - {shape[-1]} or len(values) != len(column) * (shape[1] if len(shape) == 2 else 1):
                    raise ValueError(f"{where} has lists of different lengths, from row {start} on: expected {shape[-1]} numbers in each")
                if values.null_count:
                    raise ValueError(f"{where} lacks a number in a row from {start} to {start + len(column) - 1}")
                parts.append(values.to_numpy(zero_copy_only=False).reshape(len(column), *shape[1:]))
                start += len(column)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{where} cannot be read: {reason(error)}") from error
        return parts if kind == "text" else np.concatenate(parts) if parts else np.empty(shape)

    return read
