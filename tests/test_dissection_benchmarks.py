"""The contestants of the dissection benchmark compute the same numbers, and its synthetic Broden resembles the real one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are not part of the installed package

from benchmarks import dissection, dissection_full, synthetic_broden
from torchprobe.dissection import LabelBatch, Overlap, dissect

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case():
    maps = synthetic_broden.smooth_maps(4, 16, 7)
    return maps, maps.movedim(1, 0).flatten(1).quantile(0.9, dim=1), synthetic_broden.SyntheticBroden(4)


def test_overlaps_are_the_same(case):
    maps, thresholds, broden = case
    labels = [[part for part in broden.image_labels(i) if part[0] in ("color", "object")] for i in range(4)]  # each pixel has two of these
    ours = Overlap(thresholds, broden.primary, 6)
    ours.update(maps, LabelBatch.pack(labels, [(112, 112)] * 4))
    batched = dissection._interpolate(maps, thresholds, labels)
    assert (batched - ours.counts().intersection).abs().sum() <= 1e-4 * batched.sum()
    loops = dissection._loops(maps, thresholds, labels)
    found = torch.zeros_like(ours.counts().intersection)
    for (unit, number), count in loops.items():
        found[unit, number] = count
    assert (found - ours.counts().intersection).abs().sum() <= 1e-4 * found.sum() and found.sum() > 0


def test_thresholds_are_the_same(case):
    maps, _, _ = case
    kept = [torch.zeros(16, 5)]
    dissection._topk(kept, maps)
    values = dissection._partition(maps.numpy())
    level = int(0.995 * 4 * 49)
    assert [kept[0][unit, 4 * 49 - 1 - level] for unit in range(16)] == values
    assert values == [float(np.sort(maps[:, unit].numpy().ravel())[level]) for unit in range(16)]


def test_the_section_runs():
    section = dissection.run(CPU, 0.01, units=32, images=4, quick=True)
    assert {row.case.partition(",")[0] for row in section.rows} == {"thresholds", "overlap", "average precision"}
    assert all(row.extrapolated and row.timing.median > 0 for row in section.rows)


def test_the_synthetic_data_set_resembles_broden():
    broden = synthetic_broden.SyntheticBroden(600)
    presence = broden.presence()
    assert 13 < len(presence.number) / 600 < 20  # labels an image
    assert len(broden.labels) == synthetic_broden.LABELS and len({label.number for label in broden.labels}) == synthetic_broden.LABELS
    entries = presence.number[presence.crow[7] : presence.crow[8]].tolist()
    assert entries == sorted({int(n) for _, found in broden.image_labels(7) for n in found.unique()})
    model = synthetic_broden.GeneratedMaps(8)
    found = dissect(model, "maps", broden, feature_dim=1, preprocess=synthetic_broden.number, geometry="whole", rows=range(50))["maps"]
    assert found.counts.truth.sum() > 0 and found.scores is None and len(found.scores or []) == 0


def test_the_whole_run(tmp_path):
    from click.testing import CliRunner

    result = CliRunner().invoke(dissection_full.main, ["--images", "70", "--units", "8", "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 0, result.output
    assert '"peak_gigabytes"' in (tmp_path / "a.json").read_text()
