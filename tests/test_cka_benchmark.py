"""The contestants of the CKA benchmark compute the same numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks are no part of the installed package

from benchmarks import cka

CPU = torch.device("cpu")


def test_the_section_runs():
    section = cka.run(CPU, 0, layers=3, cases={"two": (8, 1, 2), "one": (8, 2, 1)})
    assert len(section.rows) in (2, 4)
    assert all(row.timing.median > 0 for row in section.rows)
    assert ("is not installed" in section.note) == (len(section.rows) == 2)


def test_the_package_gives_the_same():
    pytest.importorskip("torch_cka", reason="torch_cka is not installed; see benchmarks/cka.py")
    models = [cka.Stored.random(3, 32, 2, seed, CPU) for seed in (0, 1)]
    ours, theirs = (call() for call in cka.contestants(*models, torch.zeros(32, 1)).values())
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-4)
