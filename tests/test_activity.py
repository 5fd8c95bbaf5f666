"""Units whose threshold leaves nothing active: found, with the cause, and said wherever units are counted."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.dissection import Dissection, dissect
from torchprobe.dissection.activity import CAUSES, Level, causes, explanation, held_back, never_active
from torchprobe.dissection.overlap import Counts
from torchprobe.dissection.report import Report, write_report
from torchprobe.statistics import Quantile

SIZE, GRID = 32, 8


class Kinds(nn.Module):
    """Units that: follow the red channel; are clipped at 6 on a tenth of all positions; are constant; are 0 nearly everywhere."""

    def forward(self, x):
        red = nn.functional.avg_pool2d(x[:, :1], SIZE // GRID) * 10
        rare = (red == red.amax((2, 3), keepdim=True)).float() * (x.mean((1, 2, 3), keepdim=True) > 0.5)
        return torch.cat([red, (red + 2).clamp(max=6), torch.full_like(red, 3.0), rare], 1)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.kinds, self.pooled = Kinds(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.pooled(self.kinds(x))


def to_tensor(image):
    return torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255


@pytest.fixture(scope="module")
def broden(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("broden"), np.random.default_rng(0)
    with BrodenWriter(folder, {"object": ["bright"]}, size=SIZE, image_format="png") as writer:
        for i in range(20):
            pixels = rng.integers(0, 256, (SIZE // 4, SIZE // 4, 3)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
            writer.add(f"a/{i}", pixels, {"object": (pixels[..., 0] > 230).astype(int)})
    return Broden(folder)


@pytest.fixture(scope="module")
def found(broden):
    with pytest.warns(UserWarning, match=r"2 of 4 units are never active.*1 unit has a share of more than 0.05.*1 unit is constant"):
        return dissect(Layer(), "kinds", broden, feature_dim=1, preprocess=to_tensor, quantile=0.05)["kinds"]


def test_each_cause_is_found(found):
    assert found.silence() == ["", "clipped", "constant", ""]
    assert found.never_active.tolist() == [False, True, True, False]
    positions = 20 * GRID * GRID
    assert found.level.values.tolist() == [positions] * 4
    assert found.level.above[0] == pytest.approx(0.05, abs=2 / positions)
    assert found.level.above[1] == 0 and 0.5 < found.level.equal[1] < 0.7  # red ≥ 0.4 of its range
    assert found.level.equal[2] == 1
    assert 0 < found.level.above[3] < 0.025 and found.level.equal[3] > 0.95
    assert held_back(found.level, found.never_active, found.quantile).tolist() == [False, False, False, True]


def test_they_are_said_and_not_counted(found, tmp_path, broden):
    assert found.summary()["never_active"] == {"too few values": 0, "constant": 1, "clipped": 1, "elsewhere": 0}
    report = Report(found)
    facts = {fact.label: fact for fact in report.facts()}
    assert facts["Never active"].value == "2"
    assert f"{100 / 2:.0f}% of the 2 units that are ever active" in facts["Detectors"].note or facts["Detectors"].value != "1"
    rows = {row.values["unit"]: row for row in report.units()}
    assert rows[1].values["others"].startswith("never active: 6") and "never active" in rows[1].search
    assert "3" in rows[2].values["others"] and "constant" in rows[2].values["others"]
    assert report.comparison()[0]["never_active"] == 2
    assert {row.unit: row.never_active for row in found.best()} == {0: False, 1: True, 2: True, 3: False}
    page = write_report(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "2 of 4 units are never active" in page and "1 unit is active on less than half of that share" in page
    found.save(tmp_path / "kinds.safetensors")
    assert Dissection.load(tmp_path / "kinds.safetensors") == found


def test_too_few_values(broden):
    with pytest.warns(UserWarning, match=r"4 of 4 units are never active.* 1 unit is constant; 3 units have fewer than 200 values: use"):
        found = dissect(Layer(), "pooled", broden, preprocess=to_tensor, score="iou", rows=range(8))["pooled"]
    assert found.silence() == ["too few values", "too few values", "constant", "too few values"]


def test_given_thresholds_have_no_cause_and_no_warning(broden):
    given = {"kinds": torch.tensor([0.0, 99.0, 99.0, 0.0])}
    found = dissect(Layer(), "kinds", broden, feature_dim=1, preprocess=to_tensor, score="iou", thresholds=given)["kinds"]
    assert found.level is None and found.silence() == ["", "elsewhere", "elsewhere", ""]


def test_causes_and_messages():
    counts = Counts(torch.zeros(3, 2), torch.tensor([[0, 0], [0, 3], [0, 0]]), torch.ones(2))
    assert never_active(counts).tolist() == [True, False, True]
    level = Level(torch.full((5,), 400), torch.tensor([0, 0, 0, 0.1, torch.nan]), torch.tensor([0.01, 1.0, 0.01, 0.0, torch.nan]))
    never = torch.tensor([True, True, False, True, True])
    assert causes(never, level, Fraction(1, 200)) == ["clipped", "constant", "", "elsewhere", "elsewhere"]
    assert causes(never, level._replace(values=torch.full((5,), 199)), Fraction(1, 200))[0] == "too few values"
    assert explanation("a", ["", ""], Fraction(1, 200)) == ""
    for cause in CAUSES:
        assert "1 of 1 units are never active" in explanation("a", [cause], Fraction(1, 200))


@pytest.mark.parametrize("memory", [1 << 20, 6000])
def test_shares_of_a_quantile(memory):
    """Exact while everything fits; a sample of the values otherwise."""
    torch.manual_seed(0)
    x = torch.cat(
        [torch.randn(20_000, 1), torch.randn(20_000, 1).clamp(max=1.5), torch.full((20_000, 1), 2.0), torch.randn(20_000, 1).relu()], 1
    )
    q = Quantile(4, 0.01, memory=memory)
    for part in x.split(500):
        q.update(part)
    value = q.value()
    above, equal = q.shares(value)
    exact = (x > value).double().mean(0), (x == value).double().mean(0)
    assert q.exact == (memory == 1 << 20)
    if q.exact:
        torch.testing.assert_close((above, equal), exact, rtol=1e-12, atol=0)
    else:
        torch.testing.assert_close(above, exact[0], atol=0.003, rtol=0)
        torch.testing.assert_close(equal, exact[1], atol=0.02, rtol=0.2)
    assert above[1] == 0 and above[2] == 0
    empty = Quantile(2, 0.01)
    assert empty.shares(empty.value())[0].isnan().all()
