"""A folder in, a folder out."""

from __future__ import annotations

import json

import pytest
from broden_sets import write_trap_set
from dissection_models import Net, batches_in, preprocess

from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.dissection import Dissection, Progress, dissect
from torchprobe.studies import dissect as study
from torchprobe.studies.dissect import dissect_folder, file_names


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_trap_set(tmp_path_factory.mktemp("broden"), images=16, seed=0).root


def test_a_folder_for_a_folder(root, tmp_path):
    told = []
    found = dissect_folder(Net(), root, ["conv", "norm"], tmp_path / "out", preprocess=preprocess, progress=told.append)
    files = {f"{layer}{end}" for layer in ("conv", "norm") for end in (".safetensors", ".csv", "-ap.csv", "-concepts.csv")} | {
        "summary.json"
    }
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == files
    assert len({path.stat().st_mode for path in (tmp_path / "out").glob("[!.]*")}) == 1  # whoever may read one may read all
    for layer, dissection in found.items():
        assert Dissection.load(tmp_path / "out" / f"{layer}.safetensors") == dissection
    layers = json.loads((tmp_path / "out/summary.json").read_text())["layers"]
    assert [row["file"] for row in layers] == ["conv", "norm"]
    assert layers[0]["detectors"]["paper"]["detectors"] == found["conv"].unique_detectors("paper").detectors
    assert [row["threshold"] for row in layers[0]["concepts"]] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    assert {progress.stage for progress in told} == {"thresholds", "overlap"}
    with pytest.raises(ValueError, match="is finished"):
        dissect_folder(Net(), root, ["conv", "norm"], tmp_path / "out", preprocess=preprocess, resume=True)


def test_one_score_alone(root, tmp_path):
    dissect_folder(Net(), root, "", tmp_path, preprocess=preprocess, score="ap")
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"output.safetensors", "output-ap.csv", "output-concepts.csv", "summary.json"}


def test_interrupted_and_resumed(root, tmp_path):
    def stop(progress):
        if progress.stage == "overlap":
            raise KeyboardInterrupt

    whole = dissect_folder(Net(), root, "norm", tmp_path / "whole", preprocess=preprocess, batch_size=3)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        dissect_folder(Net(), root, "norm", out, preprocess=preprocess, batch_size=3, progress=stop)
    assert [path.name for path in out.glob("[!.]*")] == ["checkpoint"]
    with pytest.raises(ValueError, match="resume=True"):
        dissect_folder(Net(), root, "norm", out, preprocess=preprocess, batch_size=3)
    with pytest.raises(ValueError, match="made with another batch_size: 3, now it is 4"):
        dissect_folder(Net(), root, "norm", out, preprocess=preprocess, batch_size=4, resume=True)
    told = []
    assert dissect_folder(Net(), root, "norm", out, preprocess=preprocess, batch_size=3, resume=True, progress=told.append) == whole
    assert all(progress.done == progress.total for progress in told if progress.stage == "thresholds")  # nothing is shown again
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


@pytest.mark.parametrize("batches", [0, 3, 4, 5])
def test_stopped_and_resumed(root, tmp_path, batches):
    """16 images are 4 batches in each of two passes."""
    whole = dissect_folder(Net(), root, "norm", tmp_path / "whole", preprocess=preprocess, batch_size=4)
    told = []
    with pytest.raises(KeyboardInterrupt):
        dissect_folder(
            Net(), root, "norm", tmp_path / "out", preprocess=preprocess, batch_size=4,
            progress=told.append, stop=lambda: batches_in(told) == batches,
        )  # fmt: skip
    assert batches_in(told) == batches
    resumed = []
    found = dissect_folder(
        Net(), root, "norm", tmp_path / "out", preprocess=preprocess, batch_size=4, resume=True, progress=resumed.append, stop=lambda: False
    )
    assert found == whole
    assert batches_in(resumed) == 8 - batches


def test_stopped_while_labels_are_read(root, tmp_path):
    stages = []
    with pytest.raises(KeyboardInterrupt):
        dissect(
            Net(), "norm", Broden(root), preprocess=preprocess, score="ap", batch_size=4,
            progress=lambda progress: stages.append(progress.stage), stop=lambda: stages[-1:] == ["labels"],
        )  # fmt: skip
    assert stages.count("labels") == 1


def test_rows_and_summary(root, tmp_path):
    found = dissect(Net(), "norm", Broden(root), preprocess=preprocess)["norm"]
    assert [row["unit"] for row in found.rows()] == [row.unit for row in found.best("iou")]
    assert found.rows("gain")[0]["score"] == found.best("gain")[0].score
    assert found.summary()["best"] == found.rows()[:20]
    assert len(found.summary((0.5,))["concepts"]) == 1


def test_old_names_warn_and_work(root, tmp_path):
    broden = Broden(root)
    with pytest.warns(DeprecationWarning, match="dissect: the argument 'images' is deprecated, use 'rows'"):
        found = dissect(Net(), "norm", broden, preprocess=preprocess, images=[1, 2], quantile=0.05)["norm"]
    assert found.images.tolist() == [1, 2]
    with pytest.warns(DeprecationWarning, match=r"use Dissection.summary\(\)"):
        assert study.summary(found) == found.summary()
    with pytest.warns(DeprecationWarning, match=r"use torchprobe.common.runs.Progress"):
        assert study.Progress is Progress
    with pytest.warns(DeprecationWarning, match="BrodenWriter: the argument 'unlabelled' is deprecated, use 'unlabeled'"):
        assert BrodenWriter(tmp_path / "set", {"object": ["sky"]}, unlabelled=(0, 9)).unlabeled == {0, 9}
