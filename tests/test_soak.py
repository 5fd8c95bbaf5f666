"""A recording that is left on through restarts loses nothing; ``python -m benchmarks.soak`` does the same for 100,000 steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import soak


@pytest.mark.slow("trains in three processes, 20 s")
def test_history_and_log_are_whole_after_two_restarts(tmp_path: Path) -> None:
    results = soak.soak(600, tmp_path)
    assert [len(result["steps"]) for result in results] == [2, 4, 6]
    for result in results:
        assert result["memory"][-1][1] - result["memory"][0][1] < 20  # MB; python -m benchmarks.soak looks longer
