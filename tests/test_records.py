"""Dataclasses that also read as mappings, and that JSON can hold."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pytest

from torchprobe.common.files import to_json
from torchprobe.common.records import Key, Record, decode, encode
from torchprobe.rendering.tables import write_csv


@dataclass(frozen=True, eq=False)
class Inner(Record):
    per_image: Annotated[list[float], Key("values")]
    band: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Outer(Record):
    name: str
    kind: Literal["full", "subset"]
    count: int
    found: bool | None
    parts: dict[str, Inner]
    rows: list[Inner]
    anything: Any
    later: Inner | None = None


INNER = Inner([1.0, math.nan], (0.0, math.inf))
WHOLE = Outer("a", "full", 3, None, {"one": INNER}, [INNER], {"x": [1]})
PLAIN = {
    "name": "a",
    "kind": "full",
    "count": 3,
    "found": None,
    "parts": {"one": {"values": [1.0, None], "band": [0.0, None]}},
    "rows": [{"values": [1.0, None], "band": [0.0, None]}],
    "anything": {"x": [1]},
}


def test_a_record_is_its_mapping() -> None:
    assert WHOLE == PLAIN and PLAIN == WHOLE and dict(WHOLE) == PLAIN and len(WHOLE) == 7
    assert WHOLE["parts"]["one"]["values"] == [1.0, None] and "later" not in WHOLE and WHOLE.get("later") is None
    with pytest.raises(KeyError, match="later"):
        WHOLE["later"]
    with pytest.raises(KeyError, match="per_image"):
        INNER["per_image"]
    assert list(replace(WHOLE, later=INNER))[-1] == "later" and replace(WHOLE, name="b") != WHOLE
    assert pickle.loads(pickle.dumps(WHOLE)) == WHOLE


def test_through_json_and_back() -> None:
    assert json.loads(to_json(WHOLE)) == encode(WHOLE) == PLAIN
    again = decode(Outer, json.loads(to_json(WHOLE)))
    assert again == WHOLE and isinstance(again.parts["one"], Inner) and math.isnan(again.rows[0].per_image[1])
    assert decode(Outer, PLAIN | {"later": PLAIN["rows"][0], "new": 1}).later == INNER  # type: ignore[index]


def test_rows_of_a_table(tmp_path: Any) -> None:
    rows = [Inner([1.0], (2.0, math.nan)), Inner([2.0], (2.0, 3.0))]
    assert write_csv(rows, tmp_path / "rows.csv").read_text().splitlines()[0] == "values,band"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": True}, "count: expected int, got True"),
        ({"count": 1.5}, "count: expected int, got 1.5"),
        ({"name": None}, "name: expected str, got None"),
        ({"found": 1}, "found: expected bool, got 1"),
        ({"kind": "half"}, "kind: expected one of 'full', 'subset', got 'half'"),
        ({"parts": {"one": {"values": []}}}, "parts.one lacks 'band'"),
        ({"parts": [1]}, r"parts: expected dict, got \[1\]"),
        ({"rows": [{"values": ["x"], "band": [1, 2]}]}, r"rows\[0\].values\[0\]: expected float, got 'x'"),
        ({"rows": [{"values": [], "band": [1]}]}, r"rows\[0\].band: expected 2 values, got 1"),
        ({"later": 3}, "later: expected dict, got 3"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(Outer, PLAIN | change)
    with pytest.raises(ValueError, match="Outer lacks 'name'"):
        decode(Outer, {})
