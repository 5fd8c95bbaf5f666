"""The short form of ``make sanitize``: some hundred calls of every operator, none of which a sanitizer reports."""

from __future__ import annotations

import pytest
from sanitize import build, corpus
from sanitize.__main__ import check_alert, compare, run

from torchprobe.ops import kernels

pytestmark = [
    pytest.mark.slow("compiles the kernels with the sanitizers"),
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(not kernels()["cpu"].startswith("loaded"), reason=f"no native kernel: {kernels()['cpu']}"),
]
CASES = 100


@pytest.mark.parametrize("kind", build.SANITIZERS)
def test_the_kernels_are_quiet(kind: str) -> None:
    driver = build.build(kind)
    check_alert(driver, kind)  # what was planted is reported
    made = corpus.calls(CASES)
    refused = compare(made, run(driver, made))  # the bytes that the installed kernels leave
    assert 0 < refused < len(made) / 2
    for instructions in ("avx2", "baseline"):
        run(driver, made, instructions)
    if kind == "address":
        run(driver, corpus.on_cuda(made)[: CASES // 2])
