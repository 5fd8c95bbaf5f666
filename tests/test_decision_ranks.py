"""From numbers to decisions on two ranks: jumps, forecasts, the difference of two runs and the live table, of one real training."""

from __future__ import annotations

from pathlib import Path

import decision_ranks
import numpy as np
import pytest
import torch
from processes import two_ranks
from torch import Tensor, distributed

import torchprobe
from torchprobe.analysis.quantization import forecast, measure
from torchprobe.cli import main
from torchprobe.statistics import Exponents
from torchprobe.studies.diff_recordings import diff_recordings

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")
ways = pytest.mark.parametrize("way", [way.__name__ for way in decision_ranks.WAYS])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes train eagerly and then compiled."""
    path = tmp_path_factory.mktemp("decisions")
    assert two_ranks(decision_ranks.one_of_two, path) == [0, 0]
    return path


def recordings(path: Path, way: str) -> list[torchprobe.Recording]:
    return [torchprobe.load(path / way / f"{rank}.safetensors") for rank in range(2)]


def outputs(path: Path, way: str) -> Tensor:
    return torch.cat([torch.load(path / f"{way}.{rank}.outputs", weights_only=True) for rank in range(2)])


@ways
def test_the_planted_jump_is_found_on_both_ranks(ran: Path, way: str) -> None:
    errors = [file.read_text() for file in sorted(ran.glob(f"{way}.*.error"))]
    assert not errors, "\n".join(errors)


@ways
def test_the_exponents_of_two_ranks_are_those_of_all_values(ran: Path, way: str) -> None:
    one, two = (found.total for found in recordings(ran, way))
    exponents = one.merge(two)["head"][Exponents]
    values = outputs(ran, way)
    _, found = np.frexp(np.abs(values.numpy()[values.numpy() != 0]))
    assert exponents.exponents == dict(zip(*(part.tolist() for part in np.unique(found - 1, return_counts=True)), strict=True))
    assert exponents.largest.tolist() == values.abs().amax(0).tolist()
    for name in ("int8_tensor", "e4m3"):
        assert forecast(exponents, name).sqnr_db == pytest.approx(measure(values, name).sqnr_db, abs=1)


def test_eager_and_compiled_are_the_same_run(ran: Path) -> None:
    found = diff_recordings(ran / "eager", ran / "compiled")
    assert found.first is None and found.windows == (340, 340)


@ways
def test_the_live_table_shows_both_ranks(ran: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(ran / way / f"{rank}.safetensors") for rank in range(2)]
    with pytest.raises(SystemExit) as ended:
        main(["watch", *files, "--terminal"])
    assert ended.value.code == 0
    table = capsys.readouterr().out
    assert all(layer in table for layer in ("blocks.0", "blocks.1", "head"))
