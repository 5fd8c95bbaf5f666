"""Changes files with knowledge of their structure, so that a change reaches the code behind the first check."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from torchprobe.common.checked import CHECKSUM, sealed
from torchprobe.common.storage import checksum, header

Mutator = Callable[[bytes, random.Random], bytes]

_INTEGERS = (0, 1, -1, 2, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400)
_FLOATS = (0.0, -0.0, 0.5, -1e-300, 5e-324, 1e308, 1e16, float("nan"), float("inf"), -float("inf"))
_STRINGS = ("", " ", "0", "12", "nan", "a" * 3000, "\x00", "\x1b[31m", "../x", "=1+1", "\ud800", "é", "__metadata__")
_NESTED: tuple[Any, ...] = ([], {}, [[]], [0], [None], ["a"], {"": 0}, {"a": [1]})
ABSURD: tuple[Any, ...] = (None, True, False, *_INTEGERS, *_FLOATS, *_STRINGS, *_NESTED)
"""Values that take the place of others."""

_SMALL = [b"0", b"-1", b"1", b"2", b"255", b"65536", b"2147483648", b"-2147483649", b"9223372036854775807"]
_NUMBERS = [*_SMALL, b"9223372036854775808", b"18446744073709551616", b"1e309", b"1e-400", b"nan", b"inf", b"-0", b"0x10", b"1_0", b"0.5"]
_NUMBERS += [b"1" + b"0" * 60, b"9" * 5000]
_DEEP = '"@deep@"'


def raw(data: bytes, rng: random.Random) -> bytes:
    """Changes of bytes: flips, cuts, repetitions, absurd numbers."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice((1, 1, 2, 4, 8, 64, 1024)))
        match rng.randrange(9):
            case 0 if changed:
                at = min(at, len(changed) - 1)
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if changed:
                at = min(at, len(changed) - 1)
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del changed[at:end]
            case 3:
                changed[at:at] = changed[at:end] * rng.choice((1, 1, 2, 100))
            case 4:
                del changed[at:]
            case 5:
                size, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
                value = rng.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)) % 256**size
                changed[at : at + size] = value.to_bytes(size, order)
            case 6:
                changed[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
            case 7 if numbers := [*re.finditer(rb"\d+", changed)]:
                spot = rng.choice(numbers)
                changed[spot.start() : spot.end()] = rng.choice(_NUMBERS)
            case _:
                other = rng.randrange(len(changed) + 1)
                piece = changed[other : other + (end - at)]
                changed[at : at + len(piece)] = piece
    return bytes(changed)


# -- JSON ----------------------------------------------------------------------------------------------------------------


def tree(value: Any, rng: random.Random) -> Any:
    """A value of JSON with a change somewhere in it. Text that is JSON itself is changed inside."""
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.9:
        try:
            return dumps(tree(json.loads(value), rng), rng).decode("utf-8", "surrogatepass")
        except (ValueError, UnicodeError):
            pass
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(12):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return {**value, rng.choice((key + "x", "", "__metadata__", "a/b", "\x00")): value[key]}
            case 2:
                other = rng.choice(list(value))
                return {**value, key: value[other], other: value[key]}
            case _:
                return {**value, key: tree(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value[: at + 1] + value[at:]
            case 2:
                return value[:at]
            case 3:
                return value * rng.choice((0, 2, 50))
            case _:
                return [*value[:at], tree(value[at], rng), *value[at + 1 :]]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.4:
        return rng.choice((value + 1, value - 1, -value, value * 2, float(value) if abs(value) < 1e300 else 0, str(value)))
    return "@deep@" if rng.random() < 0.03 else rng.choice(ABSURD)


def dumps(value: Any, rng: random.Random) -> bytes:
    """As JSON; a deep nesting has a mark of its own, since it cannot be a value here."""
    text = json.dumps(value)
    if _DEEP in text:
        n, pair = rng.choice((70, 900, 3000, 100_000)), rng.choice(("[]", "{}"))
        text = text.replace(_DEEP, "[" * n + "]" * n if pair == "[]" else '{"a":' * n + "1" + "}" * n)
    return text.encode("utf-8", "surrogatepass")


def as_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return raw(data, rng)
    return dumps(tree(json.loads(data), rng), rng)


def as_lines(data: bytes, rng: random.Random) -> bytes:
    """Lines of JSON."""
    lines = data.splitlines(keepends=True)
    if rng.random() < 0.3 or not lines:
        return raw(data, rng)
    at = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, rng.choice(lines))
        case _:
            lines[at] = as_json(lines[at], rng).replace(b"\n", b" ") + b"\n"
    return b"".join(lines)


def as_sealed_json(data: bytes, rng: random.Random) -> bytes:
    """JSON with a checksum, of which the checksum fits."""
    return _sealed(tree(_unsealed(data), rng), rng)


def as_sealed_lines(data: bytes, rng: random.Random) -> bytes:
    """Lines of such JSON."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = _sealed(tree(_unsealed(lines[at]), rng), rng)
    return b"\n".join(lines) + b"\n"


def _unsealed(data: bytes) -> Any:
    return {key: item for key, item in json.loads(data).items() if key != CHECKSUM}


def _sealed(value: Any, rng: random.Random) -> bytes:
    try:
        return json.dumps(sealed(value)).encode() if isinstance(value, dict) else dumps(value, rng)
    except (ValueError, TypeError):  # an absurd number or text has no checksum
        return dumps(value, rng)


# -- text ----------------------------------------------------------------------------------------------------------------

_CELLS = ["", "-1", "0", "1e999", "nan", "inf", "65536", "1_0", "０", "true", "True", "é", "\ufeff", "'", ",", ";", "1;2;;x"]
_CELLS += ["=1+1", "../a.png", "/etc/passwd", "a\\b.png", " ", '"', '""', "\x00", "\x1b[2J", "a\nb", "9" * 400, "a" * 200_000]


def as_csv(data: bytes, rng: random.Random) -> bytes:
    """Cells, columns and lines."""
    if rng.random() < 0.25:
        return raw(data, rng)
    rows = [line.split(b",") for line in data.split(b"\n")]
    for _ in range(rng.choice((1, 1, 2, 5))):
        row = rng.choice(rows)
        at = rng.randrange(len(row))
        match rng.randrange(7):
            case 0:
                rows.remove(row)
                rows = rows or [[b""]]
            case 1:
                rows.insert(rng.randrange(len(rows) + 1), list(row))
            case 2:
                row[at:at] = [rng.choice(_CELLS).encode("utf-8", "surrogatepass")]
            case 3:
                del row[at]
                row[:] = row or [b""]
            case 4:
                row[at] = rng.choice(rng.choice(rows) or [b""])
            case _:
                row[at] = rng.choice(_CELLS).encode("utf-8", "surrogatepass")
    return b"\n".join(b",".join(row) for row in rows)


_TOML = [*b"[[encoder]] [encoder] nan inf 1979-05-27T07:32:00Z 0xff true [] {} -1 'a' name [[1]] \"a\" '' =".split()]
_TOML += [b"[" * 5000 + b"]" * 5000, b"{a=" * 3000, b".".join([b"a"] * 3000), b"9" * 5000]
_TOML += [b"\n[[encoder]]\n", b"'''", b'"""', b'"\\u0000"']


def as_toml(data: bytes, rng: random.Random) -> bytes:
    """Tokens: words, numbers, texts."""
    if rng.random() < 0.25:
        return raw(data, rng)
    tokens = re.findall(rb'"[^"\n]*"|[\w.-]+|\s+|.', data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(tokens))
        match rng.randrange(4):
            case 0:
                tokens[at] = rng.choice(tokens)
            case 1:
                del tokens[at]
            case _:
                tokens[at] = rng.choice(_TOML)
    return b"".join(tokens)


# -- arrays --------------------------------------------------------------------------------------------------------------


def as_safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header as JSON, its length, and the bytes of the tensors."""
    choice = rng.random()
    size = struct.unpack_from("<Q", data)[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    if choice < 0.15:
        return raw(data, rng)
    if choice < 0.4:
        return data[: 8 + size] + numbers(body, rng)
    if choice < 0.45:
        return struct.pack("<Q", rng.choice((0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1))) + header + body
    changed = dumps(tree(json.loads(header), rng), rng)
    if rng.random() < 0.2 and (entries := re.findall(rb'"shape": ?\[[^\]]*\]', changed)):
        changed = changed.replace(
            rng.choice(entries), b'"shape":[' + b",".join(rng.choice(_SMALL) for _ in range(rng.randrange(5))) + b"]", 1
        )
    return struct.pack("<Q", len(changed)) + changed + body


def as_sealed_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Such a file with the checksums that fit, as far as its header can be read."""
    changed = as_safetensors(data, rng)
    try:
        size = struct.unpack_from("<Q", changed)[0]
        head, body = json.loads(changed[8 : 8 + size]), changed[8 + size :]
        metadata = head.pop("__metadata__")
        metadata.pop("checksums", None)
        entries = {name: (one["dtype"], one["shape"], one["data_offsets"]) for name, one in head.items()}
        sums = {name: checksum(kind, shape, [body[start:end]]) for name, (kind, shape, (start, end)) in entries.items()}
        tensors = {name: (kind, shape, end - start) for name, (kind, shape, (start, end)) in entries.items()}
        return header(dict(sorted(tensors.items(), key=lambda pair: entries[pair[0]][2])), metadata, sums) + body
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError, OverflowError):
        return changed


_WORDS = [struct.pack("<d", number) for number in (float("nan"), float("inf"), -1.0, 1e300, 0.5, 2.0**53 + 2)]
_WORDS += [struct.pack("<f", number) for number in (float("nan"), float("inf"), -1.0, 1e38)]
_WORDS += [struct.pack("<q", number) for number in (0, -1, 2**62, 2**31, 10**9)]
_WORDS += [struct.pack("<i", number) for number in (-1, 2**31 - 1, 65536)] + [b"\x02", b"\xff"]


def numbers(data: bytes, rng: random.Random) -> bytes:
    """Words in place of others, at a multiple of their size."""
    if not data or rng.random() < 0.3:
        return raw(data, rng)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        word = rng.choice(_WORDS)
        at = rng.randrange(max(1, len(changed) // len(word))) * len(word)
        changed[at : at + len(word)] = word
    return bytes(changed[: len(data)])


_DTYPES = b"'<f4' '|O' '<U99999999' '>i8' '<c16' '<M8[s]' '|V0' [('a','<f4')] '<f16' '|b1' '<U0' None".split()


def as_npy(data: bytes, rng: random.Random) -> bytes:
    """The header of an array, with the length that it has, and the numbers."""
    if rng.random() < 0.2 or data[:6] != b"\x93NUMPY":
        return raw(data, rng)
    size = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + size], data[10 + size :]
    if rng.random() < 0.2:
        return data[: 10 + size] + numbers(body, rng)
    match rng.randrange(5):
        case 0:
            header = re.sub(rb"'descr': [^,]+", b"'descr': " + rng.choice(_DTYPES), header)
        case 1:
            shape = b",".join(rng.choice(_NUMBERS[:11]) for _ in range(rng.choice((0, 1, 2, 2, 3, 40)))) + b","
            header = re.sub(rb"\([^)]*\)", b"(" + shape + b")", header)
        case 2:
            header = re.sub(rb"True|False", rng.choice((b"True", b"1", b"None", b"'a'")), header)
        case 3:
            header = b"(" * rng.choice((100, 5000)) + header
        case _:
            header = raw(header, rng)
    return data[:8] + struct.pack("<H", len(header) & 0xFFFF) + header + body


def as_zip(data: bytes, rng: random.Random) -> bytes:
    """The members of an archive, changed one by one and packed again, with or without compression."""
    if rng.random() < 0.3:
        return raw(data, rng)
    members = [(info.filename, zipfile.ZipFile(io.BytesIO(data)).read(info)) for info in zipfile.ZipFile(io.BytesIO(data)).infolist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    match rng.randrange(10):
        case 0:
            del members[at]
        case 1:
            members[at] = (rng.choice(("", "../a.npy", "a" * 5000, "y.npy", "h.npy", "/etc/a", name + "x")), content)
        case 2:
            members[at] = (name, rng.choice(members)[1])
        case 3:
            members[at] = (name, content + bytes(1 << 22))
        case _:
            members[at] = (name, as_npy(content, rng))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=archive.compression)
    packed = bytearray(out.getvalue())
    if rng.random() < 0.2 and (
        spots := [spot.start() for spot in re.finditer(rb"PK\x01\x02", bytes(packed))]
    ):  # the sizes that the index states
        struct.pack_into("<I", packed, rng.choice(spots) + rng.choice((20, 24, 42)), rng.choice((0, 1, 2**31, 2**32 - 1)))
    return bytes(packed)


def as_png(data: bytes, rng: random.Random) -> bytes:
    """Chunks: changed, repeated, added, with the checksums that they need."""
    if rng.random() < 0.35:
        return raw(data, rng)
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    at = rng.randrange(len(chunks))
    kind, content = chunks[at]
    match rng.randrange(6):
        case 0:
            del chunks[at]
        case 1:
            chunks.insert(at, rng.choice(chunks))
        case 2:
            bomb = zlib.compress(bytes(1 << 22))
            extra = (
                (b"iCCP", b"a\0\0" + bomb),
                (b"zTXt", b"a\0\0" + bomb),
                (b"iTXt", b"a\0\1\0\0\0" + bomb),
                (b"tRNS", bytes(9)),
                (b"eXIf", content[:40]),
                (b"PLTE", bytes(rng.choice((0, 3, 768, 5000)))),
                (b"acTL", bytes(8)),
                (b"fdAT", content),
                (b"abcd", content),
            )
            chunks.insert(rng.randrange(1, len(chunks) + 1), rng.choice(extra))
        case 3 if kind == b"IDAT":
            chunks[at] = (kind, zlib.compress(raw(zlib.decompress(content), rng)))
        case 3 if kind == b"IHDR":
            edges = (0, 1, 2, 2**14, 2**14 + 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
            sizes = struct.pack(">II", rng.choice(edges), rng.choice(edges))
            chunks[at] = (kind, sizes + bytes([rng.choice((1, 2, 4, 8, 16)), rng.choice((0, 2, 3, 4, 6, 7)), 0, 0, rng.choice((0, 1))]))
        case _:
            chunks[at] = (kind, raw(content, rng))
    parts = (struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks)
    return data[:8] + b"".join(parts)


MUTATORS: dict[str, Mutator] = {
    "raw": raw,
    "json": as_json,
    "lines": as_lines,
    "csv": as_csv,
    "toml": as_toml,
    "safetensors": as_safetensors,
    "npy": as_npy,
    "zip": as_zip,
    "resealed": as_sealed_safetensors,
    "resealed-json": as_sealed_json,
    "resealed-lines": as_sealed_lines,
    "png": as_png,
}
"""By the structure of a file. Each changes a valid file; most cases keep the structure, some are plain changes of bytes."""


def mutate(data: bytes, structure: str, rng: random.Random) -> bytes:
    """A changed file. Equal seeds give equal files."""
    changed = MUTATORS[structure](data, rng)
    return raw(changed, rng) if rng.random() < 0.05 else changed
