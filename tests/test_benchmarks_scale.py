"""The scale page says what the constants and the assumptions give, and every constant can be measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

pytest.importorskip("torchvision")

from benchmarks.scale import constants, page, scenarios  # noqa: E402


def values() -> dict[str, float]:
    return {name: one.value for name, one in page.read()[0].items()}


def test_the_page_is_what_the_constants_give():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text, page.read()[0]) == text, "python -m benchmarks.scale --keep --write"
    for title in scenarios.SCENARIOS:
        assert text.index(f"<!-- {title} -->") < text.index("## The constants")


def test_a_page_without_a_place_for_a_table_is_an_error():
    with pytest.raises(ValueError, match="no place for the table 'measured'"):
        page.written("# Scale\n", page.read()[0])


def test_every_constant_is_measured(tmp_path):
    found = constants.measure(quick=True)
    assert found.keys() == page.read()[0].keys()
    assert all(one.value > 0 and one.unit and one.how for name, one in found.items() if name != "hook")  # a small difference
    kept = values()
    for name in ("state", "row", "window", "index_memory"):  # sizes do not depend on the machine
        assert found[name].value == pytest.approx(kept[name], rel=0.25), name


def amounts(title: str) -> dict[str, str]:
    return {line.what: line.amount for line in scenarios.SCENARIOS[title](ROUND)}


ROUND = {
    "observe": 1e9, "hook": 1e-5, "state": 100.0, "window": 250.0, "index": 1e-4, "index_memory": 250.0, "digest": 1e9, "decode": 3e-3,
    "row": 3000.0, "write": 2e-5, "dissect": 1e-6, "dissect_file": 50.0,
}  # fmt: skip


def test_the_arithmetic_of_a_recorded_training():
    found = amounts("A language model of 70B parameters, recorded")
    # 4e6 / 1024 = 3906 tokens; 6 × 70e9 × 3906 = 1.64e15 operations; ÷ 3.96e14 = 4.1 s
    assert found["a step"] == "4.1 s"
    # 80 × 3906 × 8192 × 2 = 5.12e9 bytes; ÷ 1.34e12 = 3.8 ms, and 80 × 10 µs = 0.8 ms
    assert found["read by the recorder, each step and GPU"] == "5.1 GB" and found["added to a step"] == "4.6 ms, 0.11%"
    assert found["memory of the recorder, each GPU"] == "66 MB"  # 100 × 8192 × 80
    assert found["windows of the whole run"] == "5,000"  # 2e12 / 4e6 / 100
    assert found["the history on disk"] == "100 MB"  # 5000 × 80 × 250


def test_the_arithmetic_of_laion():
    found = amounts("LAION-2B, embedded")
    assert found["the network (forward)"] == "264 h of a GPU"  # 2.32e9 × 162e9 / 3.956e14 / 3600
    assert found["decoding"] == "1,933 h of a core"  # 2.32e9 × 3e-3 / 3600
    assert found["the index in memory, each process"] == "580 GB" and found["representations on disk"] == "7 TB"
    assert found["images of a job whose indexes take 64 GB of a machine"] == "28 million" and found["jobs"] == "82"
    assert found["one machine, everything side by side"] == "33 h"  # 264 / 8


def test_the_arithmetic_of_a_dissection():
    found = amounts("Every layer of ViT-L/14, dissected")
    assert found["units"] == "24,576" and found["the network (forward)"] == "52 s of a GPU"
    assert found["thresholds and overlap"] == "26 min of a core"  # 24576 × 63305 × 1e-6 = 1556 s
    assert found["counts in memory, each rank"] == "235 MB"  # 24576 × 1197 × 8
    assert found["results on disk"] == "1.5 GB"
