"""Tables in a narrow terminal: names stay readable and numbers whole, and what is left out is counted."""

import io
import re

import pytest
import torch
from rich.console import Console

import torchprobe
from torchprobe.rendering.tables import plain_table
from torchprobe.statistics import FEATURES, State, Statistic
from torchprobe.studies.diff_recordings import changed_most


class FiveFields(Statistic):
    states = {"zeros": State((FEATURES,))}
    fields = {"zero_share": "a", "zero_share_max": "b", "dead": "c", "mean_rest": "d", "most": "e"}

    def accumulate(self, x, kept):
        self.zeros += ((x == 0) & kept).sum(0)

    def summarize(self, states):
        share = (states["zeros"] / states["vectors"][:, None]).mean(-1)
        return dict.fromkeys(self.fields, share)


def printed(table, width):
    file = io.StringIO()
    Console(width=width, file=file).print(table)
    return file.getvalue()


def names(text):
    """The first words of the lines below the heads."""
    lines = text.partition("──\n")[2] or text.partition("── \n")[2]
    return [line.split()[0] for line in lines.splitlines() if line.startswith("  ") and line.strip()]


@pytest.fixture(scope="module")
def wide_recording():
    model = torch.nn.Sequential()
    model.add_module("layer2", torch.nn.Sequential())
    model.layer2.add_module("activation", torch.nn.Linear(8, 8))
    with torchprobe.record(model, "layer2.*", statistic=[torchprobe.Moments, FiveFields]) as rec:
        model(torch.randn(4, 8))
    return rec


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_of_many_fields_keeps_names_and_says_what_is_left_out(wide_recording, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # what counts is where the table is printed
    text = printed(wide_recording.table(), width)
    assert names(text) == ["layer2.activation"]
    assert f"{wide_recording['layer2.activation']['Moments'].vector_kurtosis:.3f}" in text
    left_out = int(re.search(r"(\d+)\s+columns\s+do\s+not\s+fit", text)[1])
    assert left_out and "rows()" in text
    assert max(map(len, text.splitlines())) <= width
    whole = printed(wide_recording.table(), 400)
    assert "not fit" not in whole and "mean rest" in whole


@pytest.mark.parametrize("width", [50, 60, 80])
def test_a_table_of_a_pair_keeps_names_and_numbers(width):
    torch.manual_seed(0)
    a, b = (torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(2))
    found = torchprobe.record_pair(a, b, torch.randn(4, 8), isolate=True)
    text = printed(found.table(), width)
    assert names(text) == ["0", "1", "(output)"]
    assert f"{found.rows[0].output.relative:.3f}" in text and "not fit" in text and "rows has all" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", range(24, 90, 3))
def test_numbers_are_whole_at_every_width(width):
    table = plain_table("layer", "why", "mean of the rest", "std", right={"mean of the rest", "std"})
    name = "model.encoder.layers.11.attention.output"
    table.add_row(name, "a long reason that may be folded", "123,456.5", "1.50e-07")
    text = printed(table, width)
    shown = [value for value in ("123,456.5", "1.50e-07") if value in text]
    lost = {2: 0, 1: 1, 0: 2}[len(shown)] + (0 if "why" in text else 1)
    assert (f"{lost} column" in text) == (lost > 0)
    assert max(map(len, text.splitlines())) <= width
    first = [line[2 : 2 + len(name)].split("  ")[0].strip() for line in text.partition("─\n")[2].splitlines()]
    assert all(len(part) >= min(len(name), width // 2 - 5) for part in first[:1])


def test_a_column_that_was_added_later_counts():
    table = plain_table("layer", "mean", right={"mean"})
    table.add_column("std", justify="right", no_wrap=True)
    table.add_row("blocks.0.attention", "1.234", "5.678")
    assert "5.678" in printed(table, 40) and "not fit" not in printed(table, 40)
    assert "5.678" not in printed(table, 32) and "1 column" in printed(table, 32)
    header_wraps = plain_table("layer", "a head of many words", "std", right={"a head of many words", "std"})
    header_wraps.add_row("blocks.0", "1.234", "5.678")
    assert "5.678" in printed(header_wraps, 34) and "not fit" not in printed(header_wraps, 34)


def test_what_is_nonfinite_in_one_only_is_always_printed():
    rows = [{"layer": "a", "nonfinite": 0.0, "other_nonfinite": 3.0, "wasserstein": float("nan")}]
    rows += [{"layer": str(i), "verdict": "changed", "wasserstein": 1.0 + i} for i in range(3)]
    assert [row["layer"] for row in changed_most(rows, 2)] == ["a", "2"]
