"""Two ranks: each guards its own share, and together they know which one went bad first."""

from __future__ import annotations

from pathlib import Path

import guard_ranks
import pytest
from processes import two_ranks
from torch import distributed

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch has no torch.distributed")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes run every way, one after the other."""
    path = tmp_path_factory.mktemp("ranks")
    assert two_ranks(guard_ranks.one_of_two, path) == [0, 0]
    return path


@pytest.mark.parametrize("way", guard_ranks.WAYS, ids=lambda way: way.__name__)
def test_the_rank_and_the_layer_that_went_bad_first(ran: Path, way: object) -> None:
    errors = [file.read_text() for file in sorted(ran.glob(f"{way.__name__}.*.error"))]  # type: ignore[attr-defined]
    assert not errors, "\n".join(errors)
