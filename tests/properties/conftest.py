"""The two profiles, and a table of what was tried.

``python -m pytest tests/properties --hypothesis-profile=long`` tries 10,000 cases a test, new ones every time, or as many as
TORCHPROBE_CASES says. Without the option every test tries a few, always the same ones.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

from properties.tried import counts

_ALWAYS = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("quick", max_examples=25, derandomize=True, **_ALWAYS)
_LONG = int(os.environ.get("TORCHPROBE_CASES", "10000"))
settings.register_profile("long", max_examples=_LONG, phases=(Phase.explicit, Phase.generate), **_ALWAYS)  # a smaller case is not sought
settings.load_profile("quick")  # before the option --hypothesis-profile is read


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if counts and terminalreporter.config.getoption("--hypothesis-profile"):
        terminalreporter.section("cases")
        for name, (cases, seconds) in counts.items():
            terminalreporter.write_line(f"{name:<60}{cases:>10,} cases{seconds:>8.0f} s")
        total, seconds = (sum(numbers) for numbers in zip(*counts.values(), strict=True))
        terminalreporter.write_line(f"{'all':<60}{total:>10,} cases{seconds:>8.0f} s")
