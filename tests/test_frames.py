"""Tables of pandas and Parquet files hold the numbers of ``rows()``, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchprobe


class Branch(nn.Module):
    """The second layer runs in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.blocks[0](x)
        return self.blocks[1](x) if self.calls % 2 else x


def recorded(steps: tuple[Any, ...] = (10, 20, 30)) -> torchprobe.Recorder:
    model = Branch()
    with torchprobe.record(model, "blocks.*") as rec:
        for step in steps:
            model(torch.randn(4, 6, generator=torch.Generator().manual_seed(int(step))))
            rec.snapshot(step)
        model(torch.randn(4, 6))
        model(torch.randn(4, 6))
    return rec


def plain(value: Any) -> Any:
    return None if value is None or (isinstance(value, float) and np.isnan(value)) else value


def test_a_history_as_a_table() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    rec = recorded()
    frame = rec.history.to_pandas()
    assert list(frame.columns) == ["step", "layer", *rec.history.fields]
    assert frame[["step", "layer"]].values.tolist() == [
        [10, "blocks.0"],
        [10, "blocks.1"],
        [20, "blocks.0"],
        [30, "blocks.0"],
        [30, "blocks.1"],
    ]
    pandas.testing.assert_frame_equal(frame, pandas.DataFrame(rec.history.rows()))
    wide = frame.pivot(index="step", columns="layer", values="std")
    np.testing.assert_array_equal(wide.to_numpy(), rec.history["std"])
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(20)).double()
    weight, bias = (p.detach().double() for p in Branch().blocks[0].parameters())
    std = (x @ weight.T + bias).var(0, correction=0).mean().sqrt()
    assert wide.loc[20, "blocks.0"] == pytest.approx(std.item(), rel=1e-5)


def test_a_recording_as_a_table() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    rec = recorded()
    frame = rec.total.to_pandas()
    assert frame["vectors"].tolist() == [20.0, 12.0]
    assert str(frame["features"].dtype) == "Int64"
    assert frame["features"].tolist() == [6, 6]
    for row, (_, found) in zip(rec.total.rows(), frame.iterrows(), strict=True):
        assert [plain(found[name]) for name in row] == [plain(value) for value in row.values()]
    empty = torchprobe.record(Branch(), "blocks.*").to_pandas()
    assert len(empty) == 0 and set(empty.columns) == set(frame.columns)
    assert len(pandas.concat([frame, rec.to_pandas()])) == 4


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    rec = recorded((1, 2.5, 3))
    for of in (rec.history, rec.total):
        path = of.to_parquet(tmp_path / "table.parquet")  # the second replaces the first
        read = parquet.read_table(path).to_pylist()
        assert [[plain(value) for value in row.values()] for row in read] == [[plain(value) for value in row.values()] for row in of.rows()]
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]
    empty = torchprobe.record(Branch(), "blocks.*")
    assert parquet.read_table(empty.history.to_parquet(tmp_path / "empty.parquet")).num_rows == 0
    assert parquet.read_table(empty.to_parquet(tmp_path / "empty.parquet")).num_rows == 0


def test_a_file_keeps_what_the_run_had(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    rec = recorded()
    rec.save(tmp_path / "run.safetensors")
    loaded = torchprobe.load(tmp_path / "run.safetensors")
    pandas.testing.assert_frame_equal(loaded.history.to_pandas(), rec.history.to_pandas())
    pandas.testing.assert_frame_equal(loaded.to_pandas(), rec.to_pandas())


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rec = recorded()
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"to_pandas\(\) needs pandas: pip install 'torchprobe-interp\[pandas\]'"):
        rec.to_pandas()
    with pytest.raises(ModuleNotFoundError, match=r"to_parquet\(\) needs pyarrow: pip install 'torchprobe-interp\[parquet\]'"):
        rec.history.to_parquet(tmp_path / "table.parquet")
    assert not list(tmp_path.iterdir())
