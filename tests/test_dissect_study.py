"""A folder in, a folder out."""

from __future__ import annotations

import json

import pytest
from broden_sets import write_trap_set
from dissection_models import Net, preprocess

from torchprobe.dissection import Dissection
from torchprobe.studies.dissect import dissect_folder, file_names


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_trap_set(tmp_path_factory.mktemp("broden"), images=16, seed=0).root


def test_a_folder_for_a_folder(root, tmp_path):
    told = []
    found = dissect_folder(Net(), root, ["conv", "norm"], tmp_path / "out", preprocess=preprocess, progress=told.append)
    files = {f"{layer}{end}" for layer in ("conv", "norm") for end in (".safetensors", ".csv", "-ap.csv")} | {"summary.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1  # whoever may read one may read all
    for layer, dissection in found.items():
        assert Dissection.load(tmp_path / "out" / f"{layer}.safetensors") == dissection
    layers = json.loads((tmp_path / "out/summary.json").read_text())["layers"]
    assert [row["file"] for row in layers] == ["conv", "norm"]
    assert layers[0]["detectors"]["paper"]["detectors"] == found["conv"].unique_detectors("paper").detectors
    assert [row["threshold"] for row in layers[0]["concepts"]] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    assert {progress.stage for progress in told} == {"thresholds", "overlap", "labels"}
    with pytest.raises(ValueError, match="is finished"):
        dissect_folder(Net(), root, ["conv", "norm"], tmp_path / "out", preprocess=preprocess, resume=True)


def test_one_score_alone(root, tmp_path):
    dissect_folder(Net(), root, "", tmp_path, preprocess=preprocess, score="ap")
    assert {path.name for path in tmp_path.iterdir()} == {"output.safetensors", "output-ap.csv", "summary.json"}


def test_interrupted_and_resumed(root, tmp_path):
    def stop(progress):
        if progress.stage == "overlap":
            raise KeyboardInterrupt

    whole = dissect_folder(Net(), root, "norm", tmp_path / "whole", preprocess=preprocess, batch_size=3)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        dissect_folder(Net(), root, "norm", out, preprocess=preprocess, batch_size=3, progress=stop)
    assert [path.name for path in out.iterdir()] == ["checkpoint"]
    with pytest.raises(ValueError, match="resume=True"):
        dissect_folder(Net(), root, "norm", out, preprocess=preprocess, batch_size=3)
    with pytest.raises(ValueError, match="started with another batch_size: 3, now it is 4"):
        dissect_folder(Net(), root, "norm", out, preprocess=preprocess, batch_size=4, resume=True)
    told = []
    assert dissect_folder(Net(), root, "norm", out, preprocess=preprocess, batch_size=3, resume=True, progress=told.append) == whole
    assert all(progress.stage != "thresholds" for progress in told)
    assert not (out / "checkpoint").exists()


def test_file_names_never_meet():
    assert file_names(["a/b", "a:b", "A_B", "summary", "..", ""]) == {
        "a/b": "a_b",
        "a:b": "a_b-2",
        "A_B": "A_B-3",
        "summary": "summary-2",
        "..": "output",
        "": "output-2",
    }
