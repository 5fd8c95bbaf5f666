"""Files of interpretations that the version before wrote: they load, compare, resume, and give the same tables."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import interpretation_of_before as before
import pytest
import torch

import torchprobe
from torchprobe.common.records import decode, encode
from torchprobe.studies.compare import compare, load_results, write
from torchprobe.studies.interpret.report import tables
from torchprobe.studies.interpret.results import Results

RECENT = {"torch"}
"""What a resumed run says of itself."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    shutil.unpack_archive(before.DATA, folder)
    return folder


def plain(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_results_are_read_whole(files: Path) -> None:
    written = plain(files / "first" / "results.json")
    results = decode(Results, written)
    assert encode(results) == written and list(encode(results)) == list(written)
    assert results.accuracy is not None and results.accuracy["imagenet"].accuracy == 16 / 18
    assert results.concepts is not None and results.concepts.names["units"] == ["dark", "light"]
    assert results.pruning is not None and results.pruning.imagenet_classes == "full"
    assert math.isnan(results.robustness.mean_effective_robustness) and results.outliers.indices == [before.OUTLIER]  # type: ignore[union-attr]


def test_comparison_is_the_same(files: Path, tmp_path: Path) -> None:
    found = compare([files / "first", files / "second"])
    written = plain(files / "both" / "comparison.json")
    assert_close(found.summary(), written)
    assert list(found.summary()["pairs"][0]) == list(written["pairs"][0])  # type: ignore[index]
    write(found, tmp_path)
    for name in ("models", "pairs", "overlaps"):
        assert csv_header(tmp_path / f"{name}.csv") == csv_header(files / "both" / f"{name}.csv")
    saved = load_results(files / "first")
    assert len(saved.kurtosis) == len(saved.correct) == 18 and sum(saved.correct.values()) == 16


@pytest.mark.usefixtures("undrawn")
def test_stages_are_resumed_and_tables_are_the_same(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchprobe, "__version__", "0.1.0")  # another version computes stages anew
    out = tmp_path / "out"
    shutil.copytree(files / "first", out)
    stages = {path: path.read_bytes() for path in (out / "stages").iterdir()}
    case = before.cases(tmp_path)["first"]
    case.encoder.visual.fail = True  # type: ignore[assignment]
    found = before.run(case, out, resume=True)
    assert {path: path.read_bytes() for path in (out / "stages").iterdir()} == stages
    written = plain(files / "first" / "results.json")
    assert {key: found.results[key] for key in found.results if key not in RECENT} == {k: v for k, v in written.items() if k not in RECENT}
    assert found.results["torch"] == torch.__version__
    for name in tables(found):
        assert (out / f"{name}.csv").read_text() == (files / "first" / f"{name}.csv").read_text(), name


def assert_close(found: object, written: object) -> None:
    """CKA alone is computed again; its last digits depend on the machine."""
    if isinstance(written, dict):
        assert isinstance(found, dict) and found.keys() == written.keys()
        for key in written:
            assert_close(found[key], written[key])
    elif isinstance(written, list):
        assert isinstance(found, list) and len(found) == len(written)
        for one, other in zip(found, written, strict=True):
            assert_close(one, other)
    else:
        assert found == pytest.approx(written, rel=1e-12, nan_ok=True) if isinstance(written, float) else found == written


def csv_header(path: Path) -> str:
    return path.read_text().splitlines()[0]
