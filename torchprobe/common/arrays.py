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
from safetensors import safe_open
from torch import Tensor

from torchprobe.common import limits
from torchprobe.common.messages import DISTRIBUTION, did_you_mean, listing, reason
from torchprobe.common.parquet_footer import values_of
from torchprobe.common.reading import open_regular
from torchprobe.common.storage import Checksums

SUFFIXES = (".npy", ".npz", ".safetensors", ".parquet")
"""The endings of files that :func:`open_arrays` reads."""

_ALWAYS = 1 << 26  # bytes: a smaller array is unpacked however well it was compressed

Kind = Literal["float", "whole", "text", "other"]


class _Damaged(ValueError):
    """A file that cannot be read, with a message that is complete."""


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
        found = self._values()
        return found if isinstance(found, Tensor) else to_tensor(found, self.where)

    def texts(self) -> list[str]:
        """The text of each element.

        Raises:
            ValueError: it does not hold text in one dimension.
        """
        if self.kind != "text" or len(self.shape) != 1:
            raise ValueError(f"{self.where} holds {self.dtype} {self.shape}, not one text for each row")
        try:
            return [str(one) for one in self._values()]
        except (SystemError, ValueError) as error:  # characters that do not exist
            raise ValueError(f"{self.where} is damaged: {reason(error)}") from error

    def _values(self) -> Any:
        try:
            return self._read()
        except (limits.LimitError, _Damaged):
            raise
        except Exception as error:  # hostile bytes may raise anything in a decoder
            raise ValueError(f"{self.where} cannot be read: {reason(error)}") from error


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
        FileNotFoundError: the file does not exist.
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
        what = "is not a regular file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"no such file: {path} {what}")
    try:
        found = readers[path.suffix.lower()](path)
        limits.check("arrays", len(found), str(path))
        return found
    except (limits.LimitError, _Damaged):
        raise
    except Exception as error:  # hostile bytes may raise anything in a decoder
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
    except Exception as error:  # hostile bytes may raise anything in a decoder
        raise _Damaged(f"{where} is not an array in NumPy's format: {reason(error)}") from error
    return _Header(shape, "F" if fortran else "C", dtype, stream.tell())


def _mapped(path: Path, header: _Header, start: int) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        if not header.bytes:
            return np.empty(header.shape, header.dtype)
        return np.memmap(path, header.dtype, "c", start, header.shape, header.order)

    return read


def _npy(path: Path) -> dict[str, Array]:
    with open_regular(path) as stream:
        header = _header(stream, str(path))
    if not header.dtype.hasobject and header.size + header.bytes > path.stat().st_size:
        raise _Damaged(f"{path} is cut off: {header.dtype} {header.shape} needs {header.bytes:,} bytes")
    return {"": Array(str(path), header.shape, str(header.dtype), header.kind, _mapped(path, header, header.size))}


def _npz(path: Path) -> dict[str, Array]:
    found = {}
    with zipfile.ZipFile(path) as archive, open_regular(path) as raw:
        members = archive.infolist()
        limits.check("arrays", len(members), str(path))
        for member in members:
            name, where = member.filename.removesuffix(".npy"), f"{path}:{member.filename.removesuffix('.npy')}"
            if member.flag_bits & 1:
                raise _Damaged(f"{where} is encrypted")
            with archive.open(member) as stream:
                header = _header(stream, where)
            if not header.dtype.hasobject and header.size + header.bytes != member.file_size:
                raise _Damaged(
                    f"{where} is damaged: {header.dtype} {header.shape} needs {header.size + header.bytes:,} bytes, "
                    f"the archive says {member.file_size:,}"
                )
            if member.compress_type == zipfile.ZIP_STORED:
                read = _mapped(path, header, _start(raw, member, where) + header.size)
                if not header.dtype.hasobject and _start(raw, member, where) + member.file_size > path.stat().st_size:
                    raise _Damaged(f"{where} is cut off")
            else:
                read = _unpacked(path, member, where)
            found[name] = Array(where, header.shape, str(header.dtype), header.kind, read)
    return found


def _start(raw: IO[bytes], member: zipfile.ZipInfo, where: str) -> int:
    """Where the content of a member begins; its local header is in front of it."""
    raw.seek(member.header_offset)
    local = raw.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise _Damaged(f"{where} is damaged: there is no header at {member.header_offset}")
    name, extra = struct.unpack("<HH", local[26:])
    return member.header_offset + 30 + int(name) + int(extra)


def _unpacked(path: Path, member: zipfile.ZipInfo, where: str) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        _require_memory(where, member.file_size, member.compress_size)
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            return np.asarray(npy.read_array(stream, allow_pickle=False))

    return read


def _require_memory(where: str, size: int, stored: int) -> None:
    """Refuses to unpack what is too large, or far larger than the file says."""
    advice = "save it with np.save or np.savez, which do not compress"
    if why := limits.problem("array_bytes", size):
        raise limits.LimitError(f"{where} has {why}; or {advice}")
    if size > _ALWAYS and (why := limits.problem("array_ratio", -(-size // max(stored, 1)))):
        raise limits.LimitError(f"{where} unpacks {stored:,} bytes to {size:,}, which is refused: it is {why}; or {advice}")


# -- safetensors and Parquet ---------------------------------------------------------------------------------------------


def _safetensors(path: Path) -> dict[str, Array]:
    opened: Any = safe_open(os.fspath(path), framework="pt")
    sums = Checksums(os.fspath(path), opened.metadata() or {})  # of files of this library
    found = {}
    for name in opened.keys():  # noqa: SIM118 – the file is not a mapping
        one = opened.get_slice(name)
        dtype = str(one.get_dtype())
        kind: Kind = "float" if dtype.startswith(("F", "BF")) else "whole" if dtype.startswith(("I", "U")) else "other"
        read = lambda name=name: sums.check(name, opened.get_tensor(name))  # noqa: E731
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
    file: Any = parquet.ParquetFile(path)
    limits.check("arrays", len(file.schema_arrow), str(path))
    rows, types, values = int(file.metadata.num_rows), pyarrow.types, values_of(path)
    found = {}
    for column in file.schema_arrow:
        lists = types.is_fixed_size_list(column.type) or types.is_list(column.type) or types.is_large_list(column.type)
        inner = column.type.value_type if lists else column.type
        word = inner.value_type if types.is_dictionary(inner) else inner  # texts that repeat, as pandas' categories
        kind: Kind = (
            "float"
            if types.is_floating(inner)
            else "whole"
            if types.is_integer(inner)
            else "text"
            if types.is_string(word) or types.is_large_string(word)
            else "other"
        )
        where = f"{path}:{column.name}"
        if lists:
            _require_memory(where, 8 * values.get(column.name, 0), path.stat().st_size)
        width = _width(file, column.name) if lists and rows else 0
        shape = (rows, width) if lists else (rows,)
        found[column.name] = Array(where, shape, str(column.type), kind, _column(path, column.name, shape, where, kind))
    return found


def _width(file: Any, column: str) -> int:
    """The length of the first list."""
    first = next(file.iter_batches(batch_size=1, columns=[column])).column(0)
    return len(first[0].values) if first[0].is_valid else 0


def _column(path: Path, name: str, shape: tuple[int, ...], where: str, kind: Kind) -> Callable[[], Any]:
    def read() -> Any:
        from pyarrow import parquet

        _require_memory(where, 8 * math.prod(shape), path.stat().st_size)
        if kind == "text":
            return _texts(parquet.ParquetFile(path, read_dictionary=[name]), name, where)
        parts: list[Any] = []
        start = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024, columns=[name]):
            column = batch.column(0)
            if column.null_count:
                raise _Damaged(f"{where} has no value in a row from {start} to {start + len(column) - 1}")
            values = column.flatten() if len(shape) == 2 else column
            lengths = set(column.value_lengths().to_pylist()) if len(shape) == 2 and hasattr(column, "value_lengths") else set()
            if lengths - {shape[-1]} or len(values) != len(column) * (shape[1] if len(shape) == 2 else 1):
                raise _Damaged(f"{where} has lists of different lengths, from row {start} on: expected {shape[-1]} numbers in each")
            if values.null_count:
                raise _Damaged(f"{where} lacks a number in a row from {start} to {start + len(column) - 1}")
            parts.append(values.to_numpy(zero_copy_only=False).reshape(len(column), *shape[1:]))
            start += len(column)
        return np.concatenate(parts) if parts else np.empty(shape)

    return read


def _texts(file: Any, name: str, where: str) -> list[str]:
    """The texts of a column. Equal texts are one object, so that a small file does not become a large list."""
    found: list[str] = []
    for batch in file.iter_batches(batch_size=1024, columns=[name]):
        column = batch.column(0)
        if column.null_count:
            raise _Damaged(f"{where} has no value in a row from {len(found)} to {len(found) + len(column) - 1}")
        if not hasattr(column, "dictionary"):
            found += column.to_pylist()
            continue
        words = column.dictionary.to_pylist()
        found += [words[i] for i in column.indices.to_pylist()]
    return found
