"""Typed results: dataclasses that also read as mappings, as the rows of a table do, and that JSON can hold."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Key:
    """The key of a field, if it is not the name of the field: ``per_image: Annotated[list[float], Key("values")]``."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Field:
    name: str
    kind: Any
    required: bool
    omitted: bool  # has no key while its value is None


class Record(Mapping[str, Any]):
    """Base class of a dataclass that is also a mapping from keys to plain values.

    Code reads the attributes. Tables, CSV files and JSON read the mapping, which holds nested records as dicts, tuples as lists, and nan as
    None. A field with the default None has no key while it is None. :func:`decode` turns plain values into a record again.

    Declare subclasses with ``@dataclass(frozen=True, eq=False)``, so that records are equal if their mappings are. The name of a field
    cannot be ``values``, ``items``, ``keys`` or ``get``, the methods of mappings. If the key must have that name, write
    ``Annotated[…, Key("values")]``.

    >>> @dataclasses.dataclass(frozen=True, eq=False)
    ... class Point(Record):
    ...     x: float
    ...     per_image: Annotated[list[float], Key("values")]
    ...     note: str | None = None
    >>> point = Point(math.nan, [1.0])
    >>> dict(point), point == {"x": None, "values": [1.0]}
    ({'x': None, 'values': [1.0]}, True)
    >>> decode(Point, {"x": None, "values": [1]})
    Point(x=nan, per_image=[1.0], note=None)
    """

    def __getitem__(self, key: str) -> Any:
        field = _fields(type(self))[key]
        value = getattr(self, field.name)
        if value is None and field.omitted:
            raise KeyError(key)
        return encode(value)

    def __iter__(self) -> Iterator[str]:
        for key, field in _fields(type(self)).items():
            if not (field.omitted and getattr(self, field.name) is None):
                yield key

    def __len__(self) -> int:
        return sum(1 for _ in self)


def encode(value: object) -> Any:
    """Plain values that JSON can hold: records and mappings as dicts, lists and tuples as lists, nan and inf as None."""
    if isinstance(value, Mapping):
        return {str(key): encode(value[key]) for key in value}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(kind: type[T], plain: object, where: str = "") -> T:
    """A value of the type ``kind`` from plain values: the inverse of :func:`encode`, with nan for a float that is None.

    Args:
        kind: a record, or any type that the fields of a record may have: numbers, text, bool, ``Any``, literals, optional values, lists,
            tuples and dicts of these.
        plain: from JSON. Keys that a record does not have are ignored.
        where: the name of the value, for messages.

    Raises:
        ValueError: a key is missing, or a value has another type; the message says which.

    >>> decode(dict[str, list[float]], {"a": [1, None]})
    {'a': [1.0, nan]}
    >>> decode(list[int], ["many"], "counts")
    Traceback (most recent call last):
    ValueError: counts[0]: expected int, got 'many'
    """
    return typing.cast(T, _decode(kind, plain, where))


def _decode(kind: Any, plain: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return plain
    if origin in (typing.Union, types.UnionType):  # optional values only
        return None if plain is None else _decode(next(one for one in arguments if one is not type(None)), plain, where)
    if origin is typing.Literal:
        if plain not in arguments:
            raise ValueError(f"{where}: expected one of {', '.join(map(repr, arguments))}, got {plain!r}")
        return plain
    if origin is list:
        return [_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(_checked(plain, list, where))]
    if origin is tuple:
        items = _checked(plain, list, where)
        if len(arguments) != len(items):
            raise ValueError(f"{where}: expected {len(arguments)} values, got {len(items)}")
        return tuple(_decode(one, item, f"{where}[{i}]") for i, (one, item) in enumerate(zip(arguments, items, strict=True)))
    if origin is dict:
        return {key: _decode(arguments[1], item, _inside(where, key)) for key, item in _checked(plain, dict, where).items()}
    if issubclass(kind, Record):
        return _record(kind, _checked(plain, dict, where), where)
    if kind is float and plain is None:
        return math.nan
    if kind is float and isinstance(plain, int) and not isinstance(plain, bool):
        try:
            return float(plain)
        except OverflowError:
            raise ValueError(f"{where}: a whole number that is too large for a float") from None
    return _checked(plain, kind, where)


def _record(kind: type[Record], plain: Mapping[str, Any], where: str) -> Record:
    found = {}
    for key, field in _fields(kind).items():
        if key in plain:
            found[field.name] = _decode(field.kind, plain[key], _inside(where, key))
        elif field.required:
            raise ValueError(f"{where or kind.__name__} lacks {key!r}")
    return kind(**found)


def _inside(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _checked(plain: Any, kind: type, where: str) -> Any:
    if not isinstance(plain, kind) or (isinstance(plain, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {kind.__name__}, got {plain!r:.80}")
    return plain


@functools.cache
def _fields(record: type) -> dict[str, _Field]:
    """Key → field, in order."""
    hints = typing.get_type_hints(record, include_extras=True)
    fields = {}
    for field in dataclasses.fields(record):
        kind, key = hints[field.name], field.name
        if typing.get_origin(kind) is Annotated:
            kind, *annotations = typing.get_args(kind)
            key = next((one.name for one in annotations if isinstance(one, Key)), key)
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        fields[key] = _Field(field.name, kind, required, field.default is None)
    return fields
