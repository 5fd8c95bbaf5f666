"""Files of interpretations that the version before wrote: they load, compare, resume, and give the same tables."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import shutil
from pathlib import Path

import interpretation_of_before as before
import pytest
import torch

from torchprobe.common.records import decode, encode
from torchprobe.studies.compare import compare, load_results, write
from torchprobe.studies.interpret.report import tables
from torchprobe.studies.interpret.results import Results

ADDED = {"robust_share", "rule", "classical", "llm_int8", "random_level", "line_low", "line_high", "images", "imagenet_images"}
ADDED |= {"hidden", "outlier_indices", "massive", "provenance", "provenance_images", "long_tokens"}
ADDED |= {"residual_std", "x_mean", "x_squares", "robustness_low", "robustness_high", "remark", "standard_models"}
ADDED |= {"mean_interval", "mean_line_interval", "correlation", "encodes", "long_tokens"}
"""Keys that earlier versions did not write."""

CHANGED = {"outlier_share", "frequency", "low", "high", "interval", "accuracy_low", "accuracy_high", "kurtosis_low", "kurtosis_high"}
CHANGED |= {"random_mean", "random_low", "random_high"} | {"note", "torch", "reason", "layers", "concepts"}
"""Keys whose values are computed otherwise now."""


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
    assert without(encode(results), ADDED) == without(written, ADDED) and list(encode(results)) == list(written)
    assert results.outliers.rule == "classical" and math.isnan(results.outliers.rows[0].robust_share)
    assert results.robustness is not None and results.robustness.rows[0].images == 0
    assert results.accuracy is not None and results.accuracy["imagenet"].accuracy == 16 / 18
    assert results.concepts is not None and results.concepts.names["units"] == ["dark", "light"]
    assert results.pruning is not None and results.pruning.imagenet_classes == "full"
    assert math.isnan(results.robustness.mean_effective_robustness) and results.outliers.indices == [before.OUTLIER]  # type: ignore[union-attr]


def test_comparison_is_the_same(files: Path, tmp_path: Path) -> None:
    found = compare([files / "first", files / "second"])
    written = plain(files / "both" / "comparison.json")
    assert_close(without(found.summary(), ADDED | CHANGED), without(written, ADDED | CHANGED))
    write(found, tmp_path)
    for name in ("models", "pairs", "overlaps"):
        assert csv_header(tmp_path / f"{name}.csv").startswith(csv_header(files / "both" / f"{name}.csv"))
    saved = load_results(files / "first")
    assert len(saved.kurtosis) == len(saved.correct) == 18 and sum(saved.correct.values()) == 16


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_the_version_before_is_not_resumed_and_tables_are_the_same(files: Path, tmp_path: Path) -> None:
    """It does not know what its images held."""
    out = tmp_path / "out"
    shutil.copytree(files / "first", out)
    before_files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    case = before.cases(tmp_path)["first"]
    with pytest.raises(ValueError, match=r"imagenet\.safetensors was made (with another|in another way)"):
        before.run(case, out, resume=True)
    assert before_files == {path: path.read_bytes() for path in before_files}
    with pytest.raises(ValueError, match="of a run without a list of its files"):
        before.run(case, out)
    out = tmp_path / "anew"
    found = before.run(case, out)
    written = plain(files / "first" / "results.json")
    assert_close(without(encode(found.results), ADDED | CHANGED), without(written, ADDED | CHANGED), 1e-6)
    assert found.results["torch"] == torch.__version__
    for name in tables(found):
        if name not in ("correct", "layers", "concepts"):
            new, old = (csv_rows(folder / f"{name}.csv") for folder in (out, files / "first"))
            assert_close(*([without(row, ADDED | CHANGED) for row in rows] for rows in (new, old)), 1e-6)
            assert list(new[0])[: len(old[0])] == list(old[0]), name


def assert_close(found: object, written: object, rel: float = 1e-12) -> None:
    """What is computed again depends on the machine in its last digits."""
    if isinstance(written, dict):
        assert isinstance(found, dict) and found.keys() == written.keys()
        for key in written:
            assert_close(found[key], written[key], rel)
    elif isinstance(written, list):
        assert isinstance(found, list) and len(found) == len(written)
        for one, other in zip(found, written, strict=True):
            assert_close(one, other, rel)
    else:
        assert found == pytest.approx(written, rel=rel, nan_ok=True) if isinstance(written, float) else found == written


def without(found: object, keys: set[str]) -> object:
    """Nested values without some keys."""
    if isinstance(found, dict):
        return {key: without(value, keys) for key, value in found.items() if key not in keys}
    return [without(one, keys) for one in found] if isinstance(found, list) else found


def csv_rows(path: Path) -> list[dict[str, object]]:
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: as_number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def as_number(cell: str) -> object:
    with contextlib.suppress(ValueError):
        return float(cell)
    return cell


def csv_header(path: Path) -> str:
    return path.read_text().splitlines()[0]
