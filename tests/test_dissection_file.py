"""Dissections on disk, from anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dissection_of_before as before
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from torchprobe.datasets.broden import Label
from torchprobe.dissection import Dissection, dissect
from torchprobe.dissection.average_precision import Support
from torchprobe.dissection.overlap import Counts
from torchprobe.dissection.ranking import Ranking


def small() -> Dissection:
    labels = (Label(3, "sky", "object", ("object",), 5, 1.5, ("heaven",)), Label(300, "<img src=x>", "scene", ("scene",), 2, 2.0))
    dissection = Dissection(
        "block.1", labels, ("object", "scene"), torch.tensor([0, 1]), 2, torch.tensor([4, 7, 9]), metadata={"mode": "default"}
    )
    dissection.thresholds = torch.tensor([0.5, torch.nan])
    dissection.counts = Counts(torch.tensor([[1, 0], [2, 3]]), torch.tensor([[4, 4], [5, 5]]), torch.tensor([6, 7]))
    dissection.average_precision = torch.tensor([[0.5, torch.nan], [1.0, 0.25]], dtype=torch.float64)
    dissection.p_values = torch.tensor([[0.5, torch.nan], [0.01, 0.9]], dtype=torch.float64)
    dissection.support = Support(torch.tensor([3, 3]), torch.tensor([1, 0]))
    dissection.top = torch.tensor([[9, 4], [7, -1]]), torch.tensor([[2.0, 1.0], [3.0, -torch.inf]])
    dissection.scores = torch.arange(6.0).view(2, 3)
    dissection.ranking = Ranking(torch.tensor([0, 1, 1, 1]), torch.tensor([0]), torch.ones(3, 2, dtype=torch.bool), dissection.category)
    return dissection


def test_round_trip(tmp_path):
    small().save(tmp_path / "a.safetensors")
    assert Dissection.load(tmp_path / "a.safetensors") == small()
    bare = Dissection("", (), (), torch.zeros(0, dtype=torch.int64), 1, torch.tensor([0]))
    bare.save(tmp_path / "b.safetensors")
    assert Dissection.load(tmp_path / "b.safetensors") == bare
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_units_without_any_label():
    dissection = small()
    dissection.counts = Counts(torch.zeros(2, 2, dtype=torch.int64), *dissection.counts[1:])
    assert [(row.unit, row.label, row.index, row.score) for row in dissection.best()] == [(0, "", -1, 0.0), (1, "", -1, 0.0)]


def change(path, tensors=None, values=None, metadata=None):
    """Writes the file anew with something else in it."""
    with safe_open(path, "pt") as file:
        found = {key: file.get_tensor(key) for key in list(file.keys())}
        about = file.metadata()
    inside = json.loads(about["values"])
    found.update(tensors or {})
    inside.update(values or {})
    found = {key: value for key, value in found.items() if value is not None}
    del about["checksums"]  # as the version before wrote it
    save_file(found, path, {**about, "format": "1", "values": json.dumps(inside), **(metadata or {})})


def sky(**other):
    given = {"number": 3, "name": "sky", "category": "object", "categories": ["object"], "frequency": 5, "coverage": 1.5, "synonyms": []}
    return {**given, **other}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"metadata": {"kind": "other"}}, "kind 'other'"),
        ({"metadata": {"values": "{"}}, "not JSON"),
        ({"metadata": {"values": "[]"}}, "expected a JSON object"),
        ({"values": {"labels": [{"number": 1}]}}, "each label has"),
        ({"values": {"categories": [1, 2]}}, "names are text"),
        ({"values": {"units": 0}}, "expected a number of units"),
        ({"values": {"units": 3}}, "expected the shape"),
        ({"values": {"layer": 3}}, "expected str, got int"),
        ({"tensors": {"category": torch.tensor([0, 2])}}, "numbers from 0 to 1"),
        ({"tensors": {"thresholds": torch.zeros(2, dtype=torch.float64)}}, "expected torch.float32"),
        ({"tensors": {"counts/truth": torch.tensor([-1, 2])}}, "negative counts"),
        ({"tensors": {"counts/activation": None}}, "'counts/activation': missing"),
        ({"tensors": {"average_precision": torch.full((2, 2), 1.5, dtype=torch.float64)}}, "numbers from 0 to 1"),
        ({"tensors": {"p_values": None}}, "'p_values': missing"),
        ({"tensors": {"ranking/crow": torch.tensor([0, 2, 1, 1])}}, "expected the rows of a matrix"),
        ({"tensors": {"ranking/column": torch.tensor([2])}}, "expected the rows of a matrix"),
        ({"values": {"ranking": {"sign": "?"}}}, "unknown sign"),
        ({"values": {"units": 10**12, "labels": []}}, "expected a number of units"),  # before any memory is taken
        ({"values": {"labels": [sky(), sky()]}}, "two have the same number"),
        ({"values": {"labels": [sky(), sky(number=-4)]}}, "numbers are positive"),
        ({"values": {"labels": [sky(), sky(number=4, coverage=float("nan"))]}}, "coverage at least 0"),
        ({"tensors": {"images": torch.tensor([4, 4, 9])}}, "each once"),
        ({"tensors": {"counts/intersection": torch.full((2, 2), 10**9)}}, "more pixels with a label than there are"),  # an IoU of 1e9
        ({"tensors": {"counts/truth": torch.full((2,), 2**62)}}, "larger ones than any data set"),
        ({"tensors": {"support/positives": torch.tensor([4, 0])}}, "more images show a label than were ranked"),
        ({"tensors": {"top/ids": torch.tensor([[9, 4], [7, 10**9]])}}, "images that were not read"),
        ({"tensors": {"top/scores": torch.full((2, 2), torch.nan)}}, "'top/scores': holds nan"),
        ({"tensors": {"scores": torch.full((2, 3), torch.nan)}}, "'scores': holds nan"),
        ({"values": {"metadata": {"quantile": "1e999999999"}}}, "expected a share"),
        ({"values": {"metadata": {"seed": [1]}}}, "expected a whole number"),
    ],
)
def test_files_that_cannot_be_believed(tmp_path, what, message):
    path = tmp_path / "a.safetensors"
    small().save(path)
    change(path, **what)
    with pytest.raises(ValueError, match=message) as error:
        Dissection.load(path)
    assert str(path) in str(error.value)


def test_other_files(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Dissection.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Dissection.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no folder"):
        small().save(tmp_path / "none" / "a.safetensors")


# -- files of the version before ---------------------------------------------------------------------------------------------


def as_before(found, saved):
    """A dissection as the version before wrote it: without the place of the thresholds and what the network was shown, and with p-values
    that were drawn."""
    torch.testing.assert_close(found.p_values, saved.p_values, atol=0.01, rtol=0, equal_nan=True)
    found.level, found.outside, found.top_maps, found.p_values = None, None, None, saved.p_values
    data = {key: found.metadata["dataset"][key] for key in saved.metadata["dataset"]}
    found.metadata = {key: value for key, value in found.metadata.items() if key in saved.metadata} | {"dataset": data}
    return found


def test_files_of_the_version_before_load_and_are_written_the_same(tmp_path):
    broden = before.write_set(tmp_path)
    saved = Dissection.load(before.DATA / "maps.safetensors")
    found = dissect(before.Pixels(), "maps", broden, **before.OPTIONS)["maps"]
    assert as_before(found, saved) == saved and saved.ranking is not None
    saved.save(tmp_path / "again.safetensors")
    with safe_open(before.DATA / "maps.safetensors", "pt") as old, safe_open(tmp_path / "again.safetensors", "pt") as new:
        added = {"format", "checksums"}
        assert sorted(old.keys()) == sorted(new.keys()) and new.metadata().keys() == old.metadata().keys() | added
        assert all(new.metadata()[key] == value for key, value in old.metadata().items() if key not in added)
    for name, score in (("maps.csv", "iou"), ("maps-ap.csv", "ap")):
        assert saved.to_csv(tmp_path / name, score=score).read_bytes() == (before.DATA / name).read_bytes()


def test_a_presence_cache_of_the_version_before_is_made_anew(tmp_path):
    """It does not know what its label maps held."""
    broden = before.write_set(tmp_path)
    computed = before.write_set(tmp_path / "other").presence()
    cache = shutil.copy(before.DATA / "presence.safetensors", tmp_path / "presence.safetensors")
    written = Path(cache).read_bytes()
    found = broden.presence(cache)
    for name in ("crow", "number", "area"):
        assert torch.equal(getattr(found, name), getattr(computed, name))
    assert Path(cache).read_bytes() != written


def test_a_checkpoint_of_the_version_before_is_refused(tmp_path):
    """It does not know which files it has read."""
    broden = before.write_set(tmp_path)
    shutil.copytree(before.DATA / "checkpoint", tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="by another version of torchprobe"):
        dissect(before.Pixels(), "maps", broden, checkpoint=tmp_path / "checkpoint", resume=True, **before.OPTIONS)
