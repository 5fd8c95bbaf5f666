"""Random changes of the bytes of a file."""

from __future__ import annotations

import json
import random
import re
import struct

NUMBERS = (b"0", b"-1", b"1e999", b"9223372036854775807", b"4611686018427387904", b"NaN", b"null", b"[]", b'"x"')


def mutated(data: bytes, moments: random.Random) -> bytes:
    """The bytes with one change, which may be of any kind: single bits, blocks, lengths, and numbers in a JSON header."""
    if not data:
        return b"\0"
    changed = moments.choice(_KINDS)(bytearray(data), moments)
    return bytes(changed) if changed != data else data[:-1]


def _bit(data: bytearray, moments: random.Random) -> bytearray:
    data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
    return data


def _bytes(data: bytearray, moments: random.Random) -> bytearray:
    for _ in range(moments.randrange(1, 6)):
        data[moments.randrange(len(data))] = moments.randrange(256)
    return data


def _block(data: bytearray, moments: random.Random) -> bytearray:
    """A block of zeros, of ones, or from elsewhere in the file."""
    length = moments.randrange(1, min(len(data), 512) + 1)
    at, source = moments.randrange(len(data) - length + 1), moments.randrange(len(data) - length + 1)
    data[at : at + length] = moments.choice((bytes(length), b"\xff" * length, bytes(data[source : source + length])))
    return data


def _shorter(data: bytearray, moments: random.Random) -> bytearray:
    return data[: moments.randrange(len(data))]


def _longer(data: bytearray, moments: random.Random) -> bytearray:
    return data + moments.randbytes(moments.randrange(1, 64))


def _swapped(data: bytearray, moments: random.Random) -> bytearray:
    at = moments.randrange(len(data))
    return data[at:] + data[:at]


def _number(data: bytearray, moments: random.Random) -> bytearray:
    """Another number in the JSON text, or in the JSON header of a safetensors file, whose length then fits."""
    header = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    tensors = 0 < header <= len(data) - 8
    text = bytes(data[8 : 8 + header] if tensors else data)
    places = [*re.finditer(rb"-?\d+(\.\d+)?", text)]
    if not places:
        return _bytes(data, moments)
    place = moments.choice(places)
    text = text[: place.start()] + moments.choice((*NUMBERS, str(moments.randrange(1 << 16)).encode())) + text[place.end() :]
    return bytearray(struct.pack("<Q", len(text)) + text + data[8 + header :] if tensors else text)


def _sealed_number(data: bytearray, moments: random.Random) -> bytearray:
    """Another value in JSON text whose form stays right."""
    try:
        value = json.loads(bytes(data))
    except ValueError:
        return _number(data, moments)
    at = value
    while isinstance(at, dict) and at:
        key = moments.choice([*at])
        if not isinstance(at[key], dict) or moments.random() < 0.2:
            at[key] = moments.choice((0, -1, "x", None, [], {}, 1e300))
            break
        at = at[key]
    return bytearray(json.dumps(value).encode())


_KINDS = (_bit, _bit, _bytes, _block, _shorter, _longer, _swapped, _number, _number, _sealed_number)
